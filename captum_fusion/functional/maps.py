"""Normalization, resolution, thresholds and weighted sums of maps."""

from math import ceil, floor, inf

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from captum_fusion.arguments import InterpolateMode
from captum_fusion.functional._numerics import as_float, broadcast_to, full_precision, rounding

_LINEAR_MODE = {1: "linear", 2: "bilinear", 3: "trilinear"}


def normalize(maps: Tensor) -> Tensor:
    r"""N: min-max normalization of each example's map to [0, 1].

    In symbols, for a map m:

    .. math::

        N(m) = \frac{m - \min(m)}{\max(m) - \min(m)}

    Args:
        maps (Tensor): Maps of shape (N, 1, \*S).

    Returns:
        *Tensor* of shape (N, 1, \*S): each map scaled to [0, 1]. A constant map becomes all zeros. So does a map that
        is constant up to rounding (100 units in the last place), whose normalization would be noise.

    Examples::

        >>> normalize(torch.tensor([[[1.0, 2.0, 5.0]], [[7.0, 7.0, 7.0]]]))
        tensor([[[0.0000, 0.2500, 1.0000]],
                [[0.0000, 0.0000, 0.0000]]])
    """
    maps = as_float(maps)
    # On a CPU, aminmax takes five times as long as both.
    lowest, highest = maps.flatten(1).amin(dim=1), maps.flatten(1).amax(dim=1)
    # Halved, so that the span of the largest finite values is finite too.
    span = highest / 2 - lowest / 2
    noise = rounding(torch.maximum(lowest.abs(), highest.abs()) / 2)
    # A sum instead of a difference, because -0 minus 0 is -0. Every mask is computed here, so whole maps take two
    # operations instead of four.
    shifted = torch.add(broadcast_to(0 - lowest / 2, maps), maps, alpha=0.5)
    return shifted / broadcast_to(span.masked_fill(~(span > noise), inf), maps)


def upsample(maps: Tensor, size: tuple[int, ...], mode: InterpolateMode = "bilinear") -> Tensor:
    r"""U: linear, bilinear or trilinear interpolation to a spatial size, with ``align_corners=False``.

    Args:
        maps (Tensor): Maps of shape (N, 1, \*s) with one to three spatial axes.
        size (tuple[int, ...]): The spatial shape S of the result.
        mode (str): "bilinear" for U, whatever the number of axes; or "nearest", "nearest-exact" or "area" of
            ``torch.nn.functional.interpolate``. Default: "bilinear"

    Returns:
        *Tensor* of shape (N, 1, \*S), with values between the smallest and the largest of the map.

    Examples::

        >>> upsample(torch.tensor([[[0.0, 1.0]]]), (4,))
        tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
    """
    if mode == "bilinear":
        return interpolate(as_float(maps), size=size, mode=_LINEAR_MODE[len(size)], align_corners=False)
    return interpolate(as_float(maps), size=size, mode=mode)


def percentile_threshold(maps: Tensor, percentile: float) -> Tensor:
    r"""tau: the percentile of each example's values, linear between order statistics.

    ``torch.quantile`` computes the same value, but many releases refuse more than 16 million values.

    Args:
        maps (Tensor): Maps of shape (N, 1, \*S).
        percentile (float): In [0, 100).

    Returns:
        *Tensor* of shape (N,).

    Examples::

        >>> percentile_threshold(torch.tensor([[[0.0, 1.0, 2.0, 3.0, 4.0]]]), 10.0)
        tensor([0.4000])
    """
    values = as_float(maps).flatten(1)
    rank = percentile / 100 * (values.shape[1] - 1)
    below, above = (values.kthvalue(1 + bound(rank), dim=1).values for bound in (floor, ceil))
    return torch.lerp(below, above, rank - floor(rank))


def denoise(maps: Tensor, percentile: float) -> Tensor:
    r"""Step 1 of Fusion-CAM: the map without its lowest values.

    In symbols, for the percentile tau of the values of G:

    .. math::

        G' &= G \text{ if } G \ge \tau \text{ else } 0 \\
        D &= N(G')

    Args:
        maps (Tensor): G, gradient maps of shape (N, 1, \*S).
        percentile (float): theta, in [0, 100).

    Returns:
        *Tensor* of shape (N, 1, \*S) with values in [0, 1].

    Examples::

        >>> denoise(torch.tensor([[[0.2, 0.4, 0.6, 1.0]]]), 50.0)
        tensor([[[0.0000, 0.0000, 0.6000, 1.0000]]])
    """
    threshold = broadcast_to(percentile_threshold(maps, percentile), maps)
    return normalize(torch.where(maps >= threshold, maps, 0))


def weighted_sum(activations: Tensor, weights: Tensor) -> Tensor:
    r"""Computes the class activation map: the sum of the channels, each times its weight.

    .. math::

        L = \sum_k w_k A_k

    Args:
        activations (Tensor): A, shape (N, C, \*s).
        weights (Tensor): w, shape (N, C), or (N, C, \*s) if each pixel has its own weight.

    Returns:
        *Tensor* of shape (N, 1, \*s).

    Examples::

        >>> weighted_sum(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[10.0, 1.0]]))
        tensor([[[13., 24.]]])
    """
    return weighted(activations, weights).sum(dim=1, keepdim=True)


def weighted(activations: Tensor, weights: Tensor) -> Tensor:
    r"""Multiplies the channels by their weights, w_k A_k.

    Args:
        activations (Tensor): A, shape (N, C, \*s).
        weights (Tensor): w, shape (N, C), or (N, C, \*s) if each pixel has its own weight.

    Returns:
        *Tensor* of shape (N, C, \*s).

    Examples::

        >>> weighted(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[10.0, 1.0]]))
        tensor([[[10., 20.],
                 [ 3.,  4.]]])
    """
    # 0 is added since 0 by a negative weight is -0.
    return broadcast_to(as_float(weights), activations) * as_float(activations) + 0


def gaussian_blur(inputs: Tensor, kernel_size: int, sigma: float) -> Tensor:
    r"""Blurs along each spatial axis with a Gaussian kernel; the input is mirrored at its borders.

    The function equals ``torchvision.transforms.v2.functional.gaussian_blur``, and also takes any number of spatial
    axes and inputs that are smaller than the kernel.

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
    inputs = as_float(inputs)
    offsets = torch.arange(kernel_size, device=inputs.device) - kernel_size // 2
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2)).to(inputs.dtype)
    kernel = kernel / kernel.sum()
    with full_precision():
        for axis in range(2, inputs.dim()):
            length = inputs.shape[axis]
            # Mirrored without repeating the border: 0 1 2 3 2 1 0 1 ...
            period = max(2 * (length - 1), 1)
            neighbours = (torch.arange(length, device=inputs.device).unsqueeze(1) + offsets) % period
            neighbours = torch.minimum(neighbours, period - neighbours) if length > 1 else neighbours
            matrix = inputs.new_zeros(length, length).scatter_add(1, neighbours, kernel.expand(length, -1))
            inputs = (inputs.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    return inputs
