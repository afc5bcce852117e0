"""Contributions of maps to a class, and the fusions of two maps or more."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import relu

from captum_fusion.arguments import Weighting
from captum_fusion.functional._numerics import as_float, broadcast_to, rounding, safe_divide
from captum_fusion.functional.maps import normalize, percentile_threshold, weighted, weighted_sum

MapFusion = Literal["mean", "maximum", "product"]
MAP_FUSIONS: tuple[MapFusion, ...] = get_args(MapFusion)


def contribution(masked: Tensor, baseline: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """c: the gain of the target's probability when a map masks the input, over the baseline alone.

    In symbols, for a map m and the baseline b:

    .. math::

        c(m) = P(m x + (1 - m) b) - P(b)

    Args:
        masked (Tensor): P(m x + (1 - m) b), shape (N,).
        baseline (Tensor): P(b), shape (N,).
        scale (Tensor or float, optional): The largest absolute value in the network's inputs and outputs, see
            ``rounding``. Default: 1.0

    Returns:
        *Tensor* of shape (N,), negative if the map lowers the probability. A difference within ``rounding`` is 0, so
        that rounding decides no weight and no choice between maps.

    Examples::

        >>> contribution(torch.tensor([0.75, 0.25, 0.1]), torch.tensor([0.5, 0.5, 0.1000001]))
        tensor([ 0.2500, -0.2500,  0.0000])
    """
    masked, baseline = as_float(masked), as_float(baseline)
    difference = masked - baseline
    larger = torch.maximum(masked.abs(), baseline.abs())
    return torch.where(difference.abs() > rounding(larger, scale), difference, 0)


def contribution_weights(first: Tensor, second: Tensor, weighting: Weighting = "raw") -> tuple[Tensor, Tensor]:
    r"""Computes the weights of two maps from their contributions.

    In symbols, for contributions c_1 and c_2, "raw", "released" and "normalized":

    .. math::

        w_i &= \mathrm{ReLU}(c_i) \\
        w_i &= c_i / (c_1 + c_2 + 10^{-8}) \\
        w_i &= \mathrm{ReLU}(c_i) / (\mathrm{ReLU}(c_1) + \mathrm{ReLU}(c_2))

    Args:
        first (Tensor): Contributions of the first map, shape (N,).
        second (Tensor): Contributions of the second map, shape (N,).
        weighting (str, optional): "raw" and "normalized" count a negative contribution as 0. "released" does not, and a
            weight can be negative or above 1. Default: "raw"

    Returns:
        *tuple* of two *Tensors* of shape (N,), finite. If both contributions are 0 (in "released" also if their sum is
        -1e-8), both weights are equal: 1 in "raw", otherwise 0.5.

    Examples::

        >>> contribution_weights(torch.tensor([0.6, -0.1]), torch.tensor([0.2, 0.0]))
        (tensor([0.6000, 1.0000]), tensor([0.2000, 1.0000]))
        >>> contribution_weights(torch.tensor([0.6, -0.1]), torch.tensor([0.2, 0.0]), "normalized")
        (tensor([0.7500, 0.5000]), tensor([0.2500, 0.5000]))
        >>> contribution_weights(torch.tensor([0.6]), torch.tensor([-0.2]), "released")
        (tensor([1.5000]), tensor([-0.5000]))
    """
    first, second = as_float(first), as_float(second)
    if weighting == "released":
        total = first.double() + second.double() + 1e-8
        none = (total == 0) | ((first == 0) & (second == 0))
        total = total.masked_fill(none, 1)
        # 0 is added since 0 over a negative total is -0.
        weights = ((part / total + 0).masked_fill(none, 0.5).to(part.dtype) for part in (first, second))
        return next(weights), next(weights)
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
    r"""Step 2 of Fusion-CAM: the contribution-weighted union.

    .. math::

        C = N(w_D D + w_R R)

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
    return normalize(broadcast_to(first_weight, first) * first + broadcast_to(second_weight, second) * second)


def fuse(first: Tensor, second: Tensor, first_weight: Tensor, second_weight: Tensor) -> Tensor:
    r"""Step 3 of Fusion-CAM: the similarity fusion N(F).

    F takes the larger value where the two maps agree (sim near 1), and their mean where they conflict. In symbols:

    .. math::

        A &= w_C C \\
        B &= w_R R \\
        \mathrm{sim} &= \mathrm{clip}(1 - |A - B|, 0, 1) \\
        F &= \mathrm{sim} \max(A, B) + \frac{(1 - \mathrm{sim}) (A + B)}{2}

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
    a = broadcast_to(first_weight, first) * first
    b = broadcast_to(second_weight, second) * second
    similarity = (1 - (a - b).abs()).clamp(0, 1)
    return normalize(similarity * torch.maximum(a, b) + (1 - similarity) * (a + b) / 2)


def fuse_maps(maps: Tensor, fusion: MapFusion) -> Tensor:
    r"""Fuses several maps of each example: N of their mean, maximum or product.

    In symbols, for maps m_k, one of:

    .. math::

        L &= N(\mathrm{mean}_k m_k) \\
        L &= N(\max_k m_k) \\
        L &= N(\prod_k m_k)

    Args:
        maps (Tensor): m, shape (N, K, \*S), with values in [0, 1].
        fusion (str): "mean", "maximum" or "product".

    Returns:
        *Tensor* of shape (N, 1, \*S) with values in [0, 1].

    Examples::

        >>> fuse_maps(torch.tensor([[[0.0, 0.5, 1.0], [0.0, 1.0, 0.5]]]), "product")
        tensor([[[0., 1., 1.]]])
    """
    maps = as_float(maps)
    if fusion == "mean":
        return normalize(maps.mean(dim=1, keepdim=True))
    return normalize(maps.amax(dim=1, keepdim=True) if fusion == "maximum" else maps.prod(dim=1, keepdim=True))


def denoised_gradient_map(gradients: Tensor, activations: Tensor, percentile: float) -> Tensor:
    r"""The denoised map of Union-CAM (https://doi.org/10.3389/fnbot.2024.1490198).

    In symbols, for the percentile tau_k of each channel's gradients and sums over pixels:

    .. math::

        W_k &= \mathrm{ReLU}(g_k) \text{ if } g_k \ge \tau_k \text{ else } 0 \\
        L &= \sum_k\left(\frac{W_k}{\sum(W_k)}\right) A_k

    A channel without positive gradients above its threshold does not count.

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
    gradients = as_float(gradients)
    threshold = percentile_threshold(gradients.flatten(0, 1).unsqueeze(1), percentile).reshape(gradients.shape[:2])
    selected = relu(torch.where(gradients >= broadcast_to(threshold, gradients), gradients, 0))
    totals = broadcast_to(selected.flatten(2).sum(dim=2), selected)
    return weighted_sum(activations, safe_divide(selected, totals, totals))


def sess_map(maps: Tensor, weights: Tensor) -> Tensor:
    r"""The fusion of the windows' maps in SESS (https://arxiv.org/abs/2207.01769).

    At each pixel, the mean of the weighted maps that are positive there. In symbols, for maps M and weights w:

    .. math::

        L = \frac{\sum_k w_k M_k}{|\{k : w_k M_k > 0\}|}

    Args:
        maps (Tensor): M, shape (N, K, \*S), not negative.
        weights (Tensor): w, shape (N, K), not negative.

    Returns:
        *Tensor* of shape (N, 1, \*S), 0 where no map is positive.

    Examples::

        >>> sess_map(torch.tensor([[[1.0, 0.5, 0.0], [1.0, 0.0, 0.0]]]), torch.tensor([[1.0, 0.5]]))
        tensor([[[0.7500, 0.5000, 0.0000]]])
    """
    parts = weighted(as_float(maps), as_float(weights))
    return parts.sum(dim=1, keepdim=True) / (parts > 0).sum(dim=1, keepdim=True).clamp(min=1)
