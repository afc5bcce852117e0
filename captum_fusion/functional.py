r"""The equations of the papers as pure tensor functions.

A map is a tensor of shape (N, 1, \*S): N examples, one channel, 1 to 3 spatial axes S. A layer's activations A and
gradients g have the shape (N, C, \*s). Every function treats each example on its own. It computes and returns float32
or wider, whatever the precision of its arguments. Symbols are those of Fusion-CAM (https://arxiv.org/abs/2603.05386).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import ceil, floor, inf, sqrt
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import interpolate, relu

from captum_fusion.arguments import InterpolateMode, Weighting

# Differences of up to so many units in the last place are taken for rounding: a network's value is a sum of many terms,
# and their order, which follows from the batch, changes it by some dozens of units.
_ROUNDING = 100

# How exactly the equations of imputed pixels are solved, in relation to what they begin with.
_IMPUTED = 1e-5

MapFusion = Literal["mean", "maximum", "product"]
MAP_FUSIONS: tuple[MapFusion, ...] = get_args(MapFusion)

_LINEAR_MODE = {1: "linear", 2: "bilinear", 3: "trilinear"}


def as_float(values: Tensor) -> Tensor:
    """Converts values to float32, except for float64: half precision is too coarse for sums and differences.

    Args:
        values (Tensor): Values of any type and shape.

    Returns:
        *Tensor* of the same shape, float32 or float64.

    Examples::

        >>> as_float(torch.tensor([1, 2]))
        tensor([1., 2.])
    """
    exact = values.dtype in (torch.float32, torch.float64)
    return values if exact else values.to(torch.promote_types(values.dtype, torch.float32))


def _like(values: Tensor, maps: Tensor) -> Tensor:
    """Values of shape (N,) or (N, C) that broadcast against maps of shape (N, C, *S)."""
    return values.reshape(*values.shape, *(1,) * (maps.dim() - values.dim()))


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
    # No difference, since -0 less 0 is -0. Masks are made by this: two operations on whole maps, not four.
    shifted = torch.add(_like(0 - lowest / 2, maps), maps, alpha=0.5)
    return shifted / _like(span.masked_fill(~(span > noise), inf), maps)


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
    threshold = _like(percentile_threshold(maps, percentile), maps)
    return normalize(torch.where(maps >= threshold, maps, 0))


def rounding(values: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    r"""Computes the largest difference between two values of a network that counts as rounding.

    Equal scores may differ by rounding, and by other amounts in another batch. A choice or a quotient must not depend
    on such a difference. The error of a probability is proportional to the probability and to the absolute error of the
    logits, which grows with the largest number in the network:

    .. math::

        r = \min(\mathrm{eps} \max(100, 10 \mathrm{scale}), \mathrm{sqrt}(\mathrm{eps})) |\mathrm{value}|

    Args:
        values (Tensor): The value with the larger absolute value.
        scale (Tensor or float, optional): The largest absolute value in the network's inputs and outputs, of the shape
            of the values. Default: 1.0

    Returns:
        *Tensor* of the values' shape.

    Examples::

        >>> rounding(torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([1.0, 1e6])) < 1e-12
        tensor([ True, False])
    """
    values = as_float(values)
    eps = torch.finfo(values.dtype).eps
    if isinstance(scale, Tensor):
        return (10 * eps * scale).clamp(min=_ROUNDING * eps, max=sqrt(eps)) * values.abs()
    return min(eps * max(10 * scale, _ROUNDING), sqrt(eps)) * values.abs()


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
        *Tensor* of shape (N,), negative if the map lowers the probability. A difference within ``rounding`` is 0,
        because weights are quotients of contributions.

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
    return normalize(_like(first_weight, first) * first + _like(second_weight, second) * second)


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
    a = _like(first_weight, first) * first
    b = _like(second_weight, second) * second
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
    return _like(as_float(weights), activations) * as_float(activations) + 0


def grad_cam_plus_plus_weights(gradients: Tensor, activations: Tensor) -> Tensor:
    r"""The weights of Grad-CAM++ (https://arxiv.org/abs/1710.11063).

    In symbols, for sums over pixels:

    .. math::

        \alpha_k &= \frac{g_k^2}{2 g_k^2 + \sum(A_k) g_k^3} = \frac{1}{2 + \sum(A_k) g_k} \\
        w_k &= \sum(\alpha_k \mathrm{ReLU}(g_k))

    Alpha is 0 if the gradient is 0, or if the divisor is 0 up to rounding.

    Args:
        gradients (Tensor): g, shape (N, C, \*s).
        activations (Tensor): A, shape (N, C, \*s).

    Returns:
        *Tensor* of shape (N, C).

    Examples::

        >>> grad_cam_plus_plus_weights(torch.tensor([[[0.5, 0.0, -1.0]]]), torch.tensor([[[1.0, 2.0, 1.0]]]))
        tensor([[0.1250]])
    """
    gradients, activations = as_float(gradients).flatten(2), as_float(activations).flatten(2)
    divisor = 2 + activations.sum(dim=2, keepdim=True) * gradients
    terms = 2 + activations.abs().sum(dim=2, keepdim=True) * gradients.abs()
    return _quotient(relu(gradients), divisor, terms).sum(dim=2)


def x_grad_cam_weights(gradients: Tensor, activations: Tensor) -> Tensor:
    r"""The weights of XGrad-CAM (https://arxiv.org/abs/2008.02312).

    In symbols, for sums over pixels:

    .. math::

        w_k = \frac{\sum(g_k A_k)}{\sum(A_k)}

    The weight is 0 if the channel's sum is 0 up to rounding, as after an instance normalization.

    Args:
        gradients (Tensor): g, shape (N, C, \*s).
        activations (Tensor): A, shape (N, C, \*s).

    Returns:
        *Tensor* of shape (N, C).

    Examples::

        >>> x_grad_cam_weights(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 1.0]]]))
        tensor([[1.2500]])
    """
    gradients, activations = as_float(gradients).flatten(2), as_float(activations).flatten(2)
    terms = torch.linalg.vector_norm(activations.detach(), ord=1, dim=2)
    return _quotient((gradients * activations).sum(dim=2), activations.sum(dim=2), terms)


def grad_cam_weights(gradients: Tensor) -> Tensor:
    r"""The weights of Grad-CAM (https://arxiv.org/abs/1610.02391).

    In symbols, for the mean over pixels:

    .. math::

        w_k = \mathrm{mean}(g_k)

    Args:
        gradients (Tensor): g, shape (N, C, \*s).

    Returns:
        *Tensor* of shape (N, C).

    Examples::

        >>> grad_cam_weights(torch.tensor([[[0.5, -1.5]]]))
        tensor([[-0.5000]])
    """
    return as_float(gradients).flatten(2).mean(dim=2)


def finer_scores(scores: Tensor, others: Tensor, strength: float, references: int) -> Tensor:
    r"""Computes the score that Finer-CAM (https://arxiv.org/abs/2501.11309) explains.

    It is the target's score minus the weighted mean of the closest other scores. In symbols, for the closest scores
    y_d:

    .. math::

        y - \gamma \mathrm{mean}_d y_d

    Args:
        scores (Tensor): y, the target's score, shape (N,).
        others (Tensor): The scores of the other classes, shape (N, K).
        strength (float): gamma.
        references (int): The number of closest scores; all scores if there are fewer.

    Returns:
        *Tensor* of shape (N,), with the graph of its arguments.

    Examples::

        >>> finer_scores(torch.tensor([3.0]), torch.tensor([[5.0, 2.5, 0.0]]), 0.5, 2)
        tensor([1.1250])
    """
    distances = (others - scores.unsqueeze(1)).detach().abs()
    closest = distances.argsort(dim=1, stable=True)[:, :references]
    return scores - strength * others.gather(1, closest).mean(dim=1)


def rest_scores(scores: Tensor) -> Tensor:
    r"""The ReST utility (https://arxiv.org/abs/2501.06261): each class's logit and the logarithm of its probability.

    In symbols, for the logits y:

    .. math::

        u_c = y_c + \log \mathrm{softmax}(y)_c

    Args:
        scores (Tensor): y, logits with the classes in dimension 1, shape (N, classes, ...).

    Returns:
        *Tensor* of the same shape.

    Examples::

        >>> rest_scores(torch.tensor([[2.0, 2.0]]))
        tensor([[1.3069, 1.3069]])
    """
    scores = as_float(scores)
    return scores + scores.log_softmax(dim=1)


def shapley_gradients(gradients: Tensor, hessian_products: Tensor) -> Tensor:
    r"""The terms of Shapley-CAM's weights: the gradients, corrected to second order.

    In symbols, for the Hessian H of the target's score with respect to the activations A:

    .. math::

        g - \frac{1}{2} H A

    Args:
        gradients (Tensor): g, shape (N, C, \*s).
        hessian_products (Tensor): H A, shape (N, C, \*s).

    Returns:
        *Tensor* of shape (N, C, \*s).

    Examples::

        >>> shapley_gradients(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[2.0, 4.0]]]))
        tensor([[[ 2., -1.]]])
    """
    return as_float(gradients) - as_float(hessian_products) / 2


def layer_cam_weights(gradients: Tensor) -> Tensor:
    r"""The weights of Layer-CAM (https://doi.org/10.1109/TIP.2021.3089943), one for each pixel.

    .. math::

        w_k = \mathrm{ReLU}(g_k)

    Args:
        gradients (Tensor): g, shape (N, C, \*s).

    Returns:
        *Tensor* of shape (N, C, \*s).

    Examples::

        >>> layer_cam_weights(torch.tensor([[[0.5, -1.0]]]))
        tensor([[[0.5000, 0.0000]]])
    """
    return relu(as_float(gradients))


def element_wise_weights(gradients: Tensor, activations: Tensor) -> Tensor:
    r"""The weights of element-wise Grad-CAM, one for each pixel.

    With these weights, w_k A_k is the positive part of g_k A_k. In symbols:

    .. math::

        w_k = g_k \text{ if } g_k A_k > 0 \text{ else } 0

    Args:
        gradients (Tensor): g, shape (N, C, \*s).
        activations (Tensor): A, shape (N, C, \*s).

    Returns:
        *Tensor* of shape (N, C, \*s).

    Examples::

        >>> element_wise_weights(torch.tensor([[[0.5, -1.0, -2.0]]]), torch.tensor([[[1.0, 2.0, -1.0]]]))
        tensor([[[ 0.5000,  0.0000, -2.0000]]])
    """
    gradients, activations = as_float(gradients), as_float(activations)
    return torch.where((gradients.sign() * activations.sign()) > 0, gradients, 0)


def principal_component(channels: Tensor) -> Tensor:
    r"""Eigen-CAM (https://arxiv.org/abs/2008.00299): each channel's share of the first principal component.

    The pixels are points in the space of the channels, centred at their mean; v is the direction in which they vary
    most. The sign of v is chosen so that its sum is positive: the component correlates positively with the sum of the
    channels. In symbols, the component is:

    .. math::

        L = \sum_k v_k(A_k - \mathrm{mean}(A_k))

    Args:
        channels (Tensor): A, shape (N, C, \*s).

    Returns:
        *Tensor* of shape (N, C, \*s): v_k (A_k - mean(A_k)). Their sum over the channels is the component. It is 0 if
        every channel is constant up to rounding.

    Examples::

        >>> principal_component(torch.tensor([[[1.0, 3.0], [4.0, 4.0]]])).sum(dim=1)
        tensor([[-1.,  1.]])
    """
    channels = as_float(channels)
    values = channels.flatten(2)
    points = values - values.mean(dim=2, keepdim=True)
    noise = rounding(values.abs().amax(dim=2, keepdim=True))
    points = torch.where(points.abs().amax(dim=2, keepdim=True) > noise, points, 0)
    # In relation to the largest one, so that no square overflows or vanishes.
    scale = _or_one(points.detach().abs().amax(dim=(1, 2), keepdim=True))
    scaled = points / scale
    with torch.no_grad():
        vectors, sizes, _ = torch.linalg.svd(scaled, full_matrices=False)
        directions, variances = vectors.mT, sizes.square().unsqueeze(2)
        axis = directions[:, :1] * torch.where(directions[:, :1].sum(dim=2, keepdim=True) < 0, -1, 1)
    # The axis is known without a graph, since the derivative of a decomposition is not defined where other directions
    # vary alike. What is added is 0, and its derivative is that of the axis: (v I - S)^+ dS axis, for the scatter S.
    pulled = (scaled * (scaled * axis.mT).sum(dim=1, keepdim=True)).sum(dim=2).unsqueeze(1)
    change = pulled - pulled.detach()
    along = (directions * change).sum(dim=2, keepdim=True)
    gaps = variances[:, :1] - variances
    within = (directions * torch.where(gaps > 0, along / _or_one(gaps), 0)).sum(dim=1, keepdim=True)
    beyond = (change - (directions * along).sum(dim=1, keepdim=True)) / _or_one(variances[:, :1])
    return weighted(points, (axis + within + beyond).squeeze(1)).reshape(channels.shape)


def seg_eigen_maps(gradients: Tensor, activations: Tensor) -> Tensor:
    r"""Seg-Eigen-CAM (https://doi.org/10.3390/app15137562): each channel's share of its principal component.

    It is that of ``principal_component`` for the activations times the absolute gradients, of the sign by which its
    largest absolute value is positive.

    Args:
        gradients (Tensor): g, shape (N, C, \*s).
        activations (Tensor): A, shape (N, C, \*s).

    Returns:
        *Tensor* of shape (N, C, \*s), which sums over the channels to the component.

    Examples::

        >>> seg_eigen_maps(torch.tensor([[[-1.0, 1.0, 1.0]]]), torch.tensor([[[0.0, 3.0, 3.0]]]))
        tensor([[[ 2., -1., -1.]]])
    """
    channels = principal_component(as_float(gradients).abs() * as_float(activations))
    lowest, highest = torch.aminmax(channels.detach().sum(dim=1).flatten(1), dim=1)
    return channels * _like(torch.where(-lowest > highest, -1, 1), channels)


def fem_maps(activations: Tensor) -> Tensor:
    r"""FEM (https://hal.science/hal-02963298): what each channel adds to the map.

    In symbols, for the mean and the standard deviation over pixels:

    .. math::

        \mathrm{mean}(A_k) \text{ if } A_k > \mathrm{mean}(A_k) + 2 \, \mathrm{std}(A_k) \text{ else } 0

    Args:
        activations (Tensor): A, shape (N, C, \*s).

    Returns:
        *Tensor* of shape (N, C, \*s). Zeros in channels that are constant, or are so but for rounding.

    Examples::

        >>> fem_maps(torch.tensor([[[0.0, 0.0, 0.0, 0.0, 0.0, 6.0]]]))
        tensor([[[0., 0., 0., 0., 0., 1.]]])
    """
    activations = as_float(activations)
    values = activations.flatten(2)
    mean = values.mean(dim=2, keepdim=True)
    noise = rounding(values.abs().amax(dim=2, keepdim=True))
    threshold = mean + 2 * values.std(dim=2, correction=0, keepdim=True).detach() + noise
    return torch.where(values > threshold, mean, 0).reshape(activations.shape)


def kernel_principal_component(channels: Tensor) -> Tensor:
    r"""KPCA-CAM (https://arxiv.org/abs/2410.00267): the first principal component by a sigmoid kernel.

    The pixels are points in the space of the channels, centred at their mean. The kernel compares them, and its
    matrix, centred too, has the eigenvector v of the largest eigenvalue. In symbols, for points p and q of C channels:

    .. math::

        K_{pq} &= \tanh\left(\frac{1}{C} p \cdot q + 1\right) \\
        L &= \sqrt{\lambda} v

    The sign of v is such that the component correlates with the sum of the channels.

    Args:
        channels (Tensor): A, shape (N, C, \*s). The kernel's matrix takes the square of the number of pixels.

    Returns:
        *Tensor* of shape (N, 1, \*s). Zeros where every channel is constant, or is so but for rounding.

    Examples::

        >>> kernel_principal_component(torch.tensor([[[1.0, 1.0, 4.0]]])).round(decimals=2)
        tensor([[[-0.6200, -0.6200,  1.2400]]])
    """
    values = as_float(channels).flatten(2)
    centred = values - values.mean(dim=2, keepdim=True)
    noise = rounding(values.abs().amax(dim=2, keepdim=True))
    points = torch.where(centred.abs().amax(dim=2, keepdim=True) > noise, centred, 0).double()
    kernel = (points.mT @ points / points.shape[1] + 1).tanh()
    kernel = kernel - kernel.mean(dim=1, keepdim=True)
    kernel = kernel - kernel.mean(dim=2, keepdim=True)
    with torch.no_grad():
        sizes, vectors = torch.linalg.eigh((kernel + kernel.mT) / 2)
        axis = vectors[:, :, -1:]
        axis = axis * torch.where((axis * points.sum(dim=1).unsqueeze(2)).sum(dim=1, keepdim=True) < 0, -1, 1)
        gaps = sizes[:, -1:] - sizes
        varies = sizes[:, -1:, None] > 1e-13 * kernel.shape[1]
    # As in principal_component: the axis is known without a graph, and what is added is 0 with the derivative of it.
    pulled = kernel @ axis
    along = vectors.mT @ (pulled - pulled.detach())
    axis = axis + vectors @ torch.where(gaps > 0, 1 / _or_one(gaps), 0).unsqueeze(2).mul(along)
    size = torch.where(varies, axis.detach().mT @ pulled, 0)
    component = torch.where(varies, axis * torch.where(varies, size, 1).sqrt(), 0)
    return component.mT.to(values).reshape(len(values), 1, *channels.shape[2:])


def non_negative_factors(values: Tensor, count: int, iterations: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    r"""The non-negative factors of a matrix, by the multiplicative updates of Lee and Seung.

    In symbols, for a matrix V, each step divides and multiplies entry by entry:

    .. math::

        H &\leftarrow H \frac{V W^T}{H W W^T} \\
        W &\leftarrow W \frac{H^T V}{H^T H W}

    No step increases the squared error of H W. The start is random.

    Args:
        values (Tensor): V, not negative, shape (P, C).
        count (int): K, the number of factors, at least 1.
        iterations (int, optional): The number of steps. Default: 200
        seed (int, optional): What the start follows from; torch's own random state is neither used nor changed.
            Default: 0

    Returns:
        2-element tuple of *Tensor*: H of shape (P, K) and W of shape (K, C), whose product is close to V.

    Examples::

        >>> values = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
        >>> left, right = non_negative_factors(values, 2)
        >>> torch.allclose(left @ right, values, atol=1e-3)
        True
    """
    values = as_float(values)
    tiny = torch.finfo(values.dtype).tiny
    generator = torch.Generator().manual_seed(seed)
    size = (values.mean() / count).sqrt()
    left, right = (
        size * torch.rand(shape, generator=generator, dtype=values.dtype).to(values.device)
        for shape in ((len(values), count), (count, values.shape[1]))
    )
    for _ in range(iterations):
        left = left * (values @ right.mT) / (left @ (right @ right.mT)).clamp_min(tiny)
        right = right * (left.mT @ values) / (left.mT @ left @ right).clamp_min(tiny)
    return left, right


def full_grad_map(products: Tensor, size: tuple[int, ...]) -> Tensor:
    r"""The part of a layer in FullGrad (https://arxiv.org/abs/1905.00780).

    In symbols, for the products z of values and their gradients:

    .. math::

        L = U\left(\sum_k N(|z_k|)\right)

    Args:
        products (Tensor): z, shape (N, C, \*s).
        size (tuple[int, ...]): S.

    Returns:
        *Tensor* of shape (N, 1, \*S).

    Examples::

        >>> full_grad_map(torch.tensor([[[0.0, 2.0, -4.0], [1.0, 1.0, 0.0]]]), (3,))
        tensor([[[1.0000, 1.5000, 1.0000]]])
    """
    channels = normalize(as_float(products).abs().flatten(0, 1).unsqueeze(1)).reshape(products.shape)
    return upsample(channels.sum(dim=1, keepdim=True), size)


def implicit_bias(
    mean: Tensor, variance: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    r"""What batch normalization adds to every pixel of a channel, apart from the multiple of its input.

    In symbols, for the mean, the variance, the weight and the bias:

    .. math::

        b - \frac{w \mu}{\sqrt{\sigma^2 + \epsilon}}

    Args:
        mean (Tensor): Shape (C,).
        variance (Tensor): Shape (C,).
        eps (float): What is added to the variance.
        weight (Tensor, optional): w, shape (C,). Default: None, which means 1
        bias (Tensor, optional): b, shape (C,). Default: None, which means 0

    Returns:
        *Tensor* of shape (C,).

    Examples::

        >>> implicit_bias(torch.tensor([4.0]), torch.tensor([4.0]), 0.0, torch.tensor([3.0]), torch.tensor([1.0]))
        tensor([-5.])
    """
    scaled = -as_float(mean) / (as_float(variance) + eps).sqrt()
    scaled = scaled if weight is None else scaled * weight
    return scaled if bias is None else scaled + bias


def ablation_weights(scores: Tensor, ablated_scores: Tensor) -> Tensor:
    r"""The weights of Ablation-CAM (https://doi.org/10.1109/WACV45572.2020.9093360).

    .. math::

        w_k = \frac{y - y_k}{|y|}

    Args:
        scores (Tensor): y, the target's score of each unmodified example, shape (N,).
        ablated_scores (Tensor): y_k, the score with channel k of the layer set to 0, shape (N, C).

    Returns:
        *Tensor* of shape (N, C). The paper divides by y, which inverts every sign if the score is negative: a channel
        that raises the score would count against the class. If y is 0, w_k = -y_k.

    Examples::

        >>> ablation_weights(torch.tensor([4.0, -4.0]), torch.tensor([[3.0, 6.0], [-5.0, -4.0]]))
        tensor([[ 0.2500, -0.5000],
                [ 0.2500,  0.0000]])
    """
    scores, ablated_scores = as_float(scores).unsqueeze(1), as_float(ablated_scores)
    return (scores - ablated_scores) / _or_one(scores.abs())


def integration_masks(masks: Tensor, steps: Tensor, count: int) -> Tensor:
    r"""The masks of IS-CAM (https://arxiv.org/abs/2010.03023).

    In symbols, for the steps i from 1 to n:

    .. math::

        m_i = \frac{i M}{n}

    Args:
        masks (Tensor): M, shape (N, 1, \*S).
        steps (Tensor): i - 1, shape (N,).
        count (int): n.

    Returns:
        *Tensor* of shape (N, 1, \*S).

    Examples::

        >>> integration_masks(torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]]), torch.tensor([0, 1]), 2)
        tensor([[[0.0000, 0.5000]],
                [[0.0000, 1.0000]]])
    """
    masks = as_float(masks)
    return _like((steps + 1).to(masks) / count, masks) * masks


def random_masks(grids: Tensor, shifts: Tensor, size: tuple[int, ...]) -> Tensor:
    r"""The masks of RISE (https://arxiv.org/abs/1806.07421): enlarged grids, cropped at random.

    Along each axis, the length of a cell is the size divided by the number of cells, rounded up. The grid is enlarged
    linearly, as in ``upsample``, to the length of one additional cell. The crop of the given size begins at a pixel of
    the first cell.

    Args:
        grids (Tensor): Values in [0, 1], shape (N, 1, \*s).
        shifts (Tensor): The start of the crop inside the first cell, as a fraction of the cell in [0, 1) for each axis,
            shape (N, axes).
        size (tuple[int, ...]): The spatial shape S of the masks.

    Returns:
        *Tensor* of shape (N, 1, \*S) with values in [0, 1].

    Examples::

        >>> random_masks(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[0.5]]), (4,))
        tensor([[[0.0000, 0.3333, 0.6667, 1.0000]]])
    """
    masks = as_float(grids)
    with full_precision():
        for axis, length in enumerate(size, start=2):
            cells = grids.shape[axis]
            cell = ceil(length / cells)
            pixels = torch.arange(length, device=masks.device) + (shifts[:, axis - 2 : axis - 1] * cell).floor()
            places = ((pixels.to(masks.dtype) + 0.5) * cells / ((cells + 1) * cell) - 0.5).clamp(0, cells - 1)
            # The weight of each cell of the grid in each pixel.
            weights = relu(1 - (places.unsqueeze(2) - torch.arange(cells, device=masks.device)).abs())
            moved = masks.movedim(axis, -1)
            masks = (moved.flatten(1, -2) @ weights.mT).reshape(*moved.shape[:-1], length).movedim(-1, axis)
    return masks


def group_maps(gradients: Tensor, activations: Tensor, groups: int) -> Tensor:
    r"""The maps of Group-CAM (https://arxiv.org/abs/2103.13859).

    In symbols, for the channels k of the group j and means over pixels:

    .. math::

        m_j = \mathrm{ReLU}(\sum_{k \in j} \mathrm{mean}(g_k) A_k)

    Args:
        gradients (Tensor): g, shape (N, C, \*s).
        activations (Tensor): A, shape (N, C, \*s).
        groups (int): Number of groups of consecutive channels, from 1 to C. If they cannot have the same size, the
            first groups have one channel more.

    Returns:
        *Tensor* of shape (N, groups, \*s).

    Examples::

        >>> group_maps(torch.ones(1, 3, 2), torch.tensor([[[1.0, 2.0], [3.0, 4.0], [-5.0, 6.0]]]), 2)
        tensor([[[4., 6.],
                 [0., 6.]]])
    """
    weights = grad_cam_weights(gradients)
    parts = zip(activations.tensor_split(groups, dim=1), weights.tensor_split(groups, dim=1), strict=True)
    return relu(torch.cat([weighted_sum(*part) for part in parts], dim=1))


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
    kept = relu(torch.where(gradients >= _like(threshold, gradients), gradients, 0))
    totals = _like(kept.flatten(2).sum(dim=2), kept)
    return weighted_sum(activations, _quotient(kept, totals, totals))


def impute(inputs: Tensor, kept: Tensor) -> Tensor:
    r"""The linear imputation of ROAD (https://arxiv.org/abs/2202.00449): a removed pixel is the mean of its neighbours.

    The weight of a neighbour is halved for each axis along which it differs from the pixel: in an image 1/6 for each of
    the four adjacent pixels and 1/12 for each of the four diagonal ones. There are no neighbours beyond a border.
    Removed neighbours are imputed themselves: the equations of all removed pixels are solved together, by conjugate
    gradients.

    Args:
        inputs (Tensor): Shape (N, C, \*S).
        kept (Tensor): True for the pixels to keep, dtype bool, shape (N, 1, \*S).

    Returns:
        *Tensor* of the inputs' shape, with the inputs' values in the pixels to keep. Zeros if no pixel is kept.

    Examples::

        >>> impute(torch.tensor([[[1.0, 9.0, 9.0, 4.0]]]), torch.tensor([[[True, False, False, True]]]))
        tensor([[[1., 2., 3., 4.]]])
    """
    inputs = as_float(inputs)
    known = torch.where(kept, inputs, 0)
    count = _or_one(_neighbours(torch.ones_like(inputs[:1, :1])))

    def residual(values: Tensor) -> Tensor:
        """Applies the matrix of the removed pixels' equations, which is symmetric and positive definite."""
        return torch.where(kept, 0, count * values - _neighbours(values))

    # By conjugate gradients, each scaled by the number of neighbours, for every channel on its own.
    found = torch.zeros_like(inputs)
    missing = torch.where(kept, 0, _neighbours(known))
    enough = _IMPUTED**2 * missing.flatten(2).square().sum(dim=2)
    scaled = missing / count
    direction, size = scaled, (missing * scaled).flatten(2).sum(dim=2)
    for _ in range(inputs.shape[2:].numel()):
        unsolved = missing.flatten(2).square().sum(dim=2) > enough
        if not unsolved.any():
            break
        moved = residual(direction)
        step = _like(unsolved * size / _or_one((direction * moved).flatten(2).sum(dim=2)), inputs)
        found, missing = found + step * direction, missing - step * moved
        scaled = missing / count
        last, size = size, (missing * scaled).flatten(2).sum(dim=2)
        direction = scaled + _like(size / _or_one(last), inputs) * direction
    return torch.where(kept, inputs, found)


def _neighbours(values: Tensor) -> Tensor:
    """The sum of the neighbours, each by a half for each axis along which it differs."""
    total = values
    for axis in range(2, values.dim()):
        before, after = (torch.zeros_like(total) for _ in range(2))
        length = values.shape[axis]
        before.narrow(axis, 1, length - 1).copy_(total.narrow(axis, 0, length - 1))
        after.narrow(axis, 0, length - 1).copy_(total.narrow(axis, 1, length - 1))
        total = total + (before + after) / 2
    return total - values


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Computes Pearson's correlation of two maps over their pixels.

    Args:
        first (Tensor): Shape (N, pixels).
        second (Tensor): Shape (N, pixels).

    Returns:
        *Tensor* of shape (N,) with values in [-1, 1]. If a map is constant: 1 if both maps are the same, else 0.

    Examples::

        >>> correlation(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 5.0, 7.0]]))
        tensor([1.])
    """
    first, second = as_float(first), as_float(second)
    same = (first == second).all(dim=1)
    first, second = (normalize(part.unsqueeze(1)).squeeze(1) for part in (first, second))
    first, second = (part - part.mean(dim=1, keepdim=True) for part in (first, second))
    norms = (first.square().sum(dim=1) * second.square().sum(dim=1)).sqrt()
    found = (first * second).sum(dim=1) / _or_one(norms)
    return found.clamp(-1, 1).masked_fill(same, 1)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Computes Spearman's correlation of two maps: Pearson's correlation of the pixels' ranks, with ties averaged.

    Args:
        first (Tensor): Shape (N, pixels).
        second (Tensor): Shape (N, pixels).

    Returns:
        *Tensor* of shape (N,) with values in [-1, 1]. If a map is constant: 1 if both maps are constant, else 0.

    Examples::

        >>> rank_correlation(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[0.0, 0.1, 0.2]]))
        tensor([1.])
    """

    def ranked(values: Tensor) -> Tensor:
        _, row_of, counts = torch.unique(values, return_inverse=True, return_counts=True)
        middle: Tensor = counts.cumsum(dim=0) - (counts - 1).double() / 2
        return middle[row_of]

    ranks = (torch.stack([ranked(row) for row in part]) for part in (first, second))
    return correlation(*ranks).to(as_float(first).dtype)


def adcc(drop: Tensor, coherency: Tensor, complexity: Tensor) -> Tensor:
    r"""ADCC (https://arxiv.org/abs/2104.10252): the harmonic mean of 1 - drop, coherency and 1 - complexity.

    .. math::

        \mathrm{ADCC} = \frac{3}{1 / (1 - \mathrm{drop}) + 1 / \mathrm{coherency} + 1 / (1 - \mathrm{complexity})}

    Args:
        drop (Tensor): Shape (N,), in [0, 1].
        coherency (Tensor): Shape (N,), in [0, 1].
        complexity (Tensor): Shape (N,), in [0, 1].

    Returns:
        *Tensor* of shape (N,) with values in [0, 1]; 0 if one of the three terms is 0.

    Examples::

        >>> adcc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.5]))
        tensor([0.7500, 0.0000])
    """
    parts = torch.stack([1 - as_float(drop), as_float(coherency), 1 - as_float(complexity)])
    none = (parts <= 0).any(dim=0)
    mean: Tensor = 3 / parts.masked_fill(parts <= 0, 1).reciprocal().sum(dim=0)
    return mean.masked_fill(none, 0)


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
            seen = (torch.arange(length, device=inputs.device).unsqueeze(1) + offsets) % period
            seen = torch.minimum(seen, period - seen) if length > 1 else seen
            matrix = inputs.new_zeros(length, length).scatter_add(1, seen, kernel.expand(length, -1))
            inputs = (inputs.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    return inputs


def _or_one(values: Tensor) -> Tensor:
    """Divisors, with 1 for 0."""
    return torch.where(values == 0, 1, values)


def _quotient(numerator: Tensor, divisor: Tensor, terms: Tensor) -> Tensor:
    """The quotient, 0 where the divisor is 0 but for the rounding of a sum whose terms have this total size."""
    return numerator / divisor.masked_fill(divisor.detach().abs() <= rounding(terms.detach()), inf)


@contextmanager
def full_precision() -> Iterator[None]:
    """Computes in the tensors' own type, without the caller's autocast and reduced precision of matrix products.

    A regression solved in bfloat16 or TF32 has the errors of its factorization as large as its results; masks and blurs
    are off by some thousandths.
    """
    torch_backends: Any = torch.backends
    backends: tuple[Any, Any] = (torch_backends.cuda.matmul, getattr(torch_backends.mkldnn, "matmul", None))
    # Each backend has its own setting from torch 2.9 on, where the one of all fails if they differ.
    apart = all(hasattr(backend, "fp32_precision") for backend in backends)
    before = [backend.fp32_precision for backend in backends] if apart else [torch.get_float32_matmul_precision()]

    def set_precisions(precisions: list[str]) -> None:
        if not apart:
            torch.set_float32_matmul_precision(precisions[0])
        for backend, precision in zip(backends if apart else (), precisions, strict=apart):
            backend.fp32_precision = precision

    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        set_precisions(["ieee"] * 2 if apart else ["highest"])
        stack.callback(set_precisions, before)
        yield
