"""Measures that compare two maps or combine several figures."""

import torch
from torch import Tensor

from captum_fusion.functional._numerics import as_float, nonzero
from captum_fusion.functional.maps import normalize


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
    correlations = (first * second).sum(dim=1) / nonzero(norms)
    return correlations.clamp(-1, 1).masked_fill(same, 1)


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


def arcc(road: Tensor, coherency: Tensor, complexity: Tensor) -> Tensor:
    r"""ARCC (https://arxiv.org/abs/2605.14641): the harmonic mean of ROAD, coherency and 1 - complexity.

    ROAD is doubled, so that its best value is 1, and negative values count as 0:

    .. math::

        r &= \mathrm{ReLU}(2\ \mathrm{ROAD}) \\
        \mathrm{ARCC} &= \frac{3}{1 / r + 1 / \mathrm{coherency} + 1 / (1 - \mathrm{complexity})}

    Args:
        road (Tensor): Shape (N,), in [-0.5, 0.5]: the combined value of both orders.
        coherency (Tensor): Shape (N,), in [0, 1].
        complexity (Tensor): Shape (N,), in [0, 1].

    Returns:
        *Tensor* of shape (N,) with values in [0, 1]; 0 if one of the three terms is 0.

    Examples::

        >>> arcc(torch.tensor([0.5, -0.1]), torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.5]))
        tensor([0.7500, 0.0000])
    """
    return adcc(1 - (2 * as_float(road)).clamp(0, 1), coherency, complexity)
