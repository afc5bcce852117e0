"""The weights that the gradient methods compute from gradients and activations."""

from math import inf

import torch
from torch import Tensor
from torch.nn.functional import relu

from captum_fusion.functional._numerics import as_float, full_precision, nonzero, safe_divide
from captum_fusion.functional.maps import normalize, upsample, weighted_sum


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
    return safe_divide(relu(gradients), divisor, terms).sum(dim=2)


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
    return safe_divide((gradients * activations).sum(dim=2), activations.sum(dim=2), terms)


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


def finer_scores(scores: Tensor, others: Tensor, strength: float, references: int) -> Tensor:
    r"""Computes the score that Finer-CAM (https://arxiv.org/abs/2501.11309) explains.

    It is the target's score minus gamma times the mean of the closest other scores. In symbols, for the closest scores
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
    r"""The ReST utility (https://arxiv.org/abs/2501.06261): each class's logit plus its log-probability.

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
    r"""The amount that batch normalization adds to every pixel of a channel, apart from the multiple of its input.

    In symbols, for the mean, the variance, the weight and the bias:

    .. math::

        b - \frac{w \mu}{\sqrt{\sigma^2 + \epsilon}}

    Args:
        mean (Tensor): Shape (C,).
        variance (Tensor): Shape (C,).
        eps (float): The constant that is added to the variance.
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


def le_grad_map(gradients: Tensor, values: Tensor) -> Tensor:
    r"""The map of one attention in LeGrad (https://arxiv.org/abs/2404.03214).

    An attention returns o_i, the mean of the values v_j weighted by its probabilities, in each of its heads. The
    gradient of a score with respect to a probability is therefore the inner product of a value and the gradient of the
    score with respect to o_i. In symbols, for these gradients g:

    .. math::

        L_j = \mathrm{mean}_{hi}(\mathrm{ReLU}(g_{hi} \cdot v_{hj}))

    Args:
        gradients (Tensor): g, shape (N, h, Q, d) for h heads and Q queries.
        values (Tensor): v, shape (N, h, T, d).

    Returns:
        *Tensor* of shape (N, T).

    Examples::

        >>> gradients = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
        >>> le_grad_map(gradients, torch.tensor([[[[3.0, 1.0], [-1.0, 2.0], [-1.0, -1.0]]]]))
        tensor([[2.5000, 2.0000, 0.0000]])
    """
    with full_precision():
        return relu(as_float(gradients) @ as_float(values).mT).mean(dim=(1, 2))


def winsorized_weights(importances: Tensor, percentile: float) -> Tensor:
    r"""The weights of the layers in Winsor-CAM (https://arxiv.org/abs/2507.10846).

    Positive importances above their percentile tau are set to it, and then scaled linearly to [0.1, 1]; the others have
    no weight. In symbols, for positive importances I:

    .. math::

        w_l = 0.1 + 0.9 \frac{\min(I_l, \tau) - \min_l I_l}{\tau - \min_l I_l}

    If all positive importances are equal after the first step, all their weights are 1.

    Args:
        importances (Tensor): I, shape (N, layers).
        percentile (float): In [0, 100].

    Returns:
        *Tensor* of shape (N, layers).

    Examples::

        >>> winsorized_weights(torch.tensor([[-1.0, 1.0, 2.0, 3.0, 9.0]]), 50.0)
        tensor([[0.0000, 0.1000, 0.7000, 1.0000, 1.0000]])
    """
    values = as_float(importances)
    positive = values.masked_fill(values <= 0, torch.nan)
    highest = positive.nanquantile(percentile / 100, dim=1, keepdim=True)
    clipped = torch.minimum(positive, highest)
    lowest = positive.nan_to_num(inf).amin(dim=1, keepdim=True)
    scaled = 0.1 + 0.9 * (clipped - lowest) / nonzero(highest - lowest)
    return torch.where(highest > lowest, scaled, clipped.sign()).nan_to_num(0)
