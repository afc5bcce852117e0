r"""The equations of the papers as pure tensor functions.

A map is a tensor of shape (N, 1, \*S): N examples, one channel, 1 to 3 spatial axes S. A layer's activations A and
gradients g have the shape (N, C, \*s). Every function treats each example on its own. Symbols are those of Fusion-CAM
(https://arxiv.org/abs/2603.05386).
"""

from math import ceil, floor
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import interpolate, relu

Weighting = Literal["normalized", "raw", "released"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)

# Differences of up to so many units in the last place are taken for rounding.
_ROUNDING = 100

_LINEAR_MODE = {1: "linear", 2: "bilinear", 3: "trilinear"}


def _per_example(values: Tensor, like: Tensor) -> Tensor:
    """Values of shape (N,) that broadcast against maps of shape (N, 1, *S)."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))


def normalize(maps: Tensor) -> Tensor:
    r"""N: min-max normalization of each example's map to [0, 1].

    Args:
        maps (Tensor): Maps of shape (N, 1, \*S).

    Returns:
        *Tensor* of shape (N, 1, \*S): each map scaled to [0, 1]. A constant map becomes all zeros, and so does one
        that is constant but for rounding (100 units in the last place), which would be scaled up to noise.

    Examples::

        >>> normalize(torch.tensor([[[1.0, 2.0, 5.0]], [[7.0, 7.0, 7.0]]]))
        tensor([[[0.0000, 0.2500, 1.0000]],
                [[0.0000, 0.0000, 0.0000]]])
    """
    lowest, highest = torch.aminmax(maps.flatten(1), dim=1)
    # Halved, so that the span of the largest finite values is finite too.
    span = highest / 2 - lowest / 2
    rounding = _ROUNDING * torch.finfo(maps.dtype).eps * torch.maximum(lowest.abs(), highest.abs()) / 2
    shifted = maps / 2 - _per_example(lowest / 2, maps)
    return torch.where(_per_example(span > rounding, maps), shifted / _per_example(span, maps), 0)


def upsample(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    r"""U: linear, bilinear or trilinear interpolation to a spatial size, with ``align_corners=False``.

    Args:
        maps (Tensor): Maps of shape (N, 1, \*s) with one to three spatial axes.
        size (tuple[int, ...]): The spatial shape S to reach.

    Returns:
        *Tensor* of shape (N, 1, \*S), with values between the smallest and the largest of the map.

    Examples::

        >>> upsample(torch.tensor([[[0.0, 1.0]]]), (4,))
        tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
    """
    return interpolate(maps, size=size, mode=_LINEAR_MODE[len(size)], align_corners=False)


def percentile_threshold(maps: Tensor, percentile: float) -> Tensor:
    r"""tau: the percentile of each example's values, linear between order statistics.

    ``torch.quantile`` computes the same, but in many releases refuses more than 16 million values.

    Args:
        maps (Tensor): Maps of shape (N, 1, \*S).
        percentile (float): In [0, 100).

    Returns:
        *Tensor* of shape (N,).

    Examples::

        >>> percentile_threshold(torch.tensor([[[0.0, 1.0, 2.0, 3.0, 4.0]]]), 10.0)
        tensor([0.4000])
    """
    values = maps.flatten(1)
    rank = percentile / 100 * (values.shape[1] - 1)
    below, above = (values.kthvalue(1 + bound(rank), dim=1).values for bound in (floor, ceil))
    return torch.lerp(below, above, rank - floor(rank))


def denoise(maps: Tensor, percentile: float) -> Tensor:
    r"""Step 1 of Fusion-CAM: D = N(G'), where G' is G with all values below their percentile tau set to 0.

    Args:
        maps (Tensor): G, gradient maps of shape (N, 1, \*S).
        percentile (float): theta, in [0, 100).

    Returns:
        *Tensor* of shape (N, 1, \*S) with values in [0, 1].

    Examples::

        >>> denoise(torch.tensor([[[0.2, 0.4, 0.6, 1.0]]]), 50.0)
        tensor([[[0.0000, 0.0000, 0.6000, 1.0000]]])
    """
    threshold = _per_example(percentile_threshold(maps, percentile), maps)
    return normalize(torch.where(maps >= threshold, maps, 0))


def contribution(kept: Tensor, without: Tensor) -> Tensor:
    """c: how much of the target's probability a map keeps when it masks the input, P(mask(x, m)) - P(b).

    Args:
        kept (Tensor): P(mask(x, m)), shape (N,).
        without (Tensor): P(b), shape (N,).

    Returns:
        *Tensor* of shape (N,), negative where the map hurts the class. A difference that is no larger than what
        rounding alone makes (100 units in the last place) is 0, since weights divide contributions by each other.

    Examples::

        >>> contribution(torch.tensor([0.75, 0.25, 0.1]), torch.tensor([0.5, 0.5, 0.1000001]))
        tensor([ 0.2500, -0.2500,  0.0000])
    """
    rounding = _ROUNDING * torch.finfo(kept.dtype).eps * torch.maximum(kept.abs(), without.abs())
    difference = kept - without
    return torch.where(difference.abs() > rounding, difference, 0)


def contribution_weights(first: Tensor, second: Tensor, weighting: Weighting = "normalized") -> tuple[Tensor, Tensor]:
    """The weights of two maps from their contributions.

    Args:
        first (Tensor): Contributions of the first map, shape (N,). Negative ones count as 0.
        second (Tensor): Contributions of the second map, shape (N,). Negative ones count as 0.
        weighting (str): "raw" takes the contributions as they are; "normalized" and "released" divide them by their
            sum. Default: "normalized"

    Returns:
        *tuple* of two *Tensors* of shape (N,), finite and not negative. Where both contributions are 0, both weights
        are equal: 0.5, or 1 if "raw".

    Examples::

        >>> contribution_weights(torch.tensor([0.6, -0.1]), torch.tensor([0.2, 0.0]))
        (tensor([0.7500, 0.5000]), tensor([0.2500, 0.5000]))
    """
    first, second = relu(first), relu(second)
    largest = torch.maximum(first, second)
    none = largest == 0
    first, second = first.masked_fill(none, 1), second.masked_fill(none, 1)
    if weighting == "raw":
        return first, second
    # Relative to the larger one, so that the sum neither overflows nor vanishes.
    scale = largest.masked_fill(none, 1)
    first, second = first / scale, second / scale
    return first / (first + second), second / (first + second)


def combine(first: Tensor, second: Tensor, first_weight: Tensor, second_weight: Tensor) -> Tensor:
    r"""Step 2 of Fusion-CAM: the contribution-weighted union C = N(w_D D + w_R R).

    Args:
        first (Tensor): D, maps of shape (N, 1, \*S).
        second (Tensor): R, maps of shape (N, 1, \*S).
        first_weight (Tensor): w_D, shape (N,).
        second_weight (Tensor): w_R, shape (N,).

    Returns:
        *Tensor* of shape (N, 1, \*S) with values in [0, 1].

    Examples::

        >>> weights = torch.tensor([0.75]), torch.tensor([0.25])
        >>> combine(torch.tensor([[[0.0, 1.0, 0.0]]]), torch.tensor([[[0.0, 0.0, 1.0]]]), *weights)
        tensor([[[0.0000, 1.0000, 0.3333]]])
    """
    return normalize(_per_example(first_weight, first) * first + _per_example(second_weight, second) * second)


def fuse(first: Tensor, second: Tensor, first_weight: Tensor, second_weight: Tensor) -> Tensor:
    r"""Step 3 of Fusion-CAM: the similarity fusion N(F) of A = w_C C and B = w_R R.

    Where the two agree (sim near 1) F takes the larger, where they conflict their mean:
    sim = clip(1 - \|A - B\|, 0, 1), F = sim max(A, B) + (1 - sim) (A + B) / 2.

    Args:
        first (Tensor): C, maps of shape (N, 1, \*S).
        second (Tensor): R, maps of shape (N, 1, \*S).
        first_weight (Tensor): w_C, shape (N,).
        second_weight (Tensor): w_R, shape (N,).

    Returns:
        *Tensor* of shape (N, 1, \*S) with values in [0, 1].

    Examples::

        >>> fuse(torch.tensor([[[0.0, 1.0, 0.5]]]), torch.tensor([[[0.0, 0.0, 0.5]]]), torch.ones(1), torch.ones(1))
        tensor([[[0., 1., 1.]]])
    """
    a = _per_example(first_weight, first) * first
    b = _per_example(second_weight, second) * second
    similarity = (1 - (a - b).abs()).clamp(0, 1)
    return normalize(similarity * torch.maximum(a, b) + (1 - similarity) * (a + b) / 2)


def weighted_sum(activations: Tensor, weights: Tensor) -> Tensor:
    r"""The class activation map of channel weights: L = sum_k w_k A_k.

    Args:
        activations (Tensor): A, shape (N, C, \*s).
        weights (Tensor): w, shape (N, C).

    Returns:
        *Tensor* of shape (N, 1, \*s).

    Examples::

        >>> weighted_sum(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[10.0, 1.0]]))
        tensor([[[13., 24.]]])
    """
    return (weights.reshape(*weights.shape, *(1,) * (activations.dim() - 2)) * activations).sum(dim=1, keepdim=True)


def grad_cam_plus_plus_weights(gradients: Tensor, activations: Tensor) -> Tensor:
    r"""Grad-CAM++ (https://arxiv.org/abs/1710.11063): w_k = sum over pixels of alpha ReLU(g).

    alpha = g^2 / (2 g^2 + sum(A) g^3), which is 1 / (2 + sum(A) g) where g is not 0; 0 where g or the divisor is 0.

    Args:
        gradients (Tensor): g, shape (N, C, \*s).
        activations (Tensor): A, shape (N, C, \*s).

    Returns:
        *Tensor* of shape (N, C).

    Examples::

        >>> grad_cam_plus_plus_weights(torch.tensor([[[0.5, 0.0, -1.0]]]), torch.tensor([[[1.0, 2.0, 1.0]]]))
        tensor([[0.1250]])
    """
    gradients, activations = gradients.flatten(2), activations.flatten(2)
    divisor = 2 + activations.sum(dim=2, keepdim=True) * gradients
    return _quotient(relu(gradients), divisor).sum(dim=2)


def x_grad_cam_weights(gradients: Tensor, activations: Tensor) -> Tensor:
    r"""XGrad-CAM (https://arxiv.org/abs/2008.02312): w_k = sum(g A) / sum(A), 0 where the divisor is 0.

    Args:
        gradients (Tensor): g, shape (N, C, \*s).
        activations (Tensor): A, shape (N, C, \*s).

    Returns:
        *Tensor* of shape (N, C).

    Examples::

        >>> x_grad_cam_weights(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 1.0]]]))
        tensor([[1.2500]])
    """
    return _quotient((gradients * activations).flatten(2).sum(dim=2), activations.flatten(2).sum(dim=2))


def group_maps(gradients: Tensor, activations: Tensor, groups: int) -> Tensor:
    r"""The maps of Group-CAM (https://arxiv.org/abs/2103.13859): ReLU of sums of w_k A_k, where w_k = mean(g).

    Args:
        gradients (Tensor): g, shape (N, C, \*s).
        activations (Tensor): A, shape (N, C, \*s).
        groups (int): Number of groups of consecutive channels, from 1 to C. Where they cannot have the same size, the
            first ones have one channel more.

    Returns:
        *Tensor* of shape (N, groups, \*s).

    Examples::

        >>> group_maps(torch.ones(1, 3, 2), torch.tensor([[[1.0, 2.0], [3.0, 4.0], [-5.0, 6.0]]]), 2)
        tensor([[[4., 6.],
                 [0., 6.]]])
    """
    weights = gradients.flatten(2).mean(dim=2)
    parts = zip(activations.tensor_split(groups, dim=1), weights.tensor_split(groups, dim=1), strict=True)
    return relu(torch.cat([weighted_sum(*part) for part in parts], dim=1))


def denoised_gradient_map(gradients: Tensor, activations: Tensor, percentile: float) -> Tensor:
    r"""The denoised map of Union-CAM (https://doi.org/10.3389/fnbot.2024.1490198): L = sum_k W_k A_k / sum(W_k).

    W is ReLU(g) after each channel's gradients below their percentile are set to 0. Channels without any positive
    gradient left do not count.

    Args:
        gradients (Tensor): g, shape (N, C, \*s).
        activations (Tensor): A, shape (N, C, \*s).
        percentile (float): theta, in [0, 100).

    Returns:
        *Tensor* of shape (N, 1, \*s).

    Examples::

        >>> denoised_gradient_map(torch.tensor([[[1.0, 3.0, -4.0]]]), torch.tensor([[[8.0, 4.0, 2.0]]]), 0.0)
        tensor([[[2., 3., 0.]]])
    """
    threshold = percentile_threshold(gradients.flatten(0, 1).unsqueeze(1), percentile)
    threshold = threshold.reshape(*gradients.shape[:2], *(1,) * (gradients.dim() - 2))
    kept = relu(torch.where(gradients >= threshold, gradients, 0))
    totals = kept.flatten(2).sum(dim=2).reshape(threshold.shape)
    return (_quotient(kept, totals) * activations).sum(dim=1, keepdim=True)


def gaussian_blur(inputs: Tensor, kernel_size: int, sigma: float) -> Tensor:
    r"""Blurs along each spatial axis with a Gaussian kernel; beyond its borders the input is mirrored.

    As ``torchvision.transforms.v2.functional.gaussian_blur``, for any number of spatial axes and for inputs that are
    smaller than the kernel.

    Args:
        inputs (Tensor): Shape (N, C, \*S).
        kernel_size (int): Length of the kernel in pixels, odd.
        sigma (float): Standard deviation of the Gaussian in pixels.

    Returns:
        *Tensor* of the inputs' shape.

    Examples::

        >>> gaussian_blur(torch.tensor([[[0.0, 0.0, 1.0, 0.0, 0.0]]]), 3, 1.0)
        tensor([[[0.0000, 0.2741, 0.4519, 0.2741, 0.0000]]])
    """
    offsets = torch.arange(kernel_size, device=inputs.device) - kernel_size // 2
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2)).to(inputs.dtype)
    kernel = kernel / kernel.sum()
    # Autocast would blur in half precision.
    with torch.autocast(inputs.device.type, enabled=False):
        for axis in range(2, inputs.dim()):
            length = inputs.shape[axis]
            # Mirrored without repeating the border: 0 1 2 3 2 1 0 1 ...
            period = max(2 * (length - 1), 1)
            seen = (torch.arange(length, device=inputs.device).unsqueeze(1) + offsets) % period
            seen = torch.minimum(seen, period - seen) if length > 1 else seen
            matrix = inputs.new_zeros(length, length).scatter_add(1, seen, kernel.expand(length, -1))
            inputs = (inputs.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    return inputs


def _quotient(numerator: Tensor, divisor: Tensor) -> Tensor:
    """The quotient, 0 where the divisor is 0."""
    return torch.where(divisor == 0, 0, numerator / torch.where(divisor == 0, 1, divisor))
