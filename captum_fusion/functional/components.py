"""Principal components and factors of activations."""

import torch
from torch import Tensor

from captum_fusion.functional._numerics import as_float, broadcast_to, nonzero, rounding
from captum_fusion.functional.maps import weighted


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
    scale = nonzero(points.detach().abs().amax(dim=(1, 2), keepdim=True))
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
    within = (directions * torch.where(gaps > 0, along / nonzero(gaps), 0)).sum(dim=1, keepdim=True)
    beyond = (change - (directions * along).sum(dim=1, keepdim=True)) / nonzero(variances[:, :1])
    return weighted(points, (axis + within + beyond).squeeze(1)).reshape(channels.shape)


def seg_eigen_maps(gradients: Tensor, activations: Tensor) -> Tensor:
    r"""Seg-Eigen-CAM (https://doi.org/10.3390/app15137562): each channel's share of its principal component.

    The component is that of ``principal_component`` for the activations times the absolute gradients. Its sign makes
    its largest absolute value positive.

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
    return channels * broadcast_to(torch.where(-lowest > highest, -1, 1), channels)


def fem_maps(activations: Tensor) -> Tensor:
    r"""FEM (https://hal.science/hal-02963298): what each channel adds to the map.

    In symbols, for the mean and the standard deviation over pixels:

    .. math::

        \mathrm{mean}(A_k) \text{ if } A_k > \mathrm{mean}(A_k) + 2 \, \mathrm{std}(A_k) \text{ else } 0

    Args:
        activations (Tensor): A, shape (N, C, \*s).

    Returns:
        *Tensor* of shape (N, C, \*s). Zeros in channels that are constant up to rounding.

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
        *Tensor* of shape (N, 1, \*s). Zeros if every channel is constant up to rounding.

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
    axis = axis + vectors @ torch.where(gaps > 0, 1 / nonzero(gaps), 0).unsqueeze(2).mul(along)
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
        seed (int, optional): The seed of the random start; torch's global random state is neither used nor changed.
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
