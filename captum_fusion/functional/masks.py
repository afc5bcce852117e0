"""Masks and other perturbations, and the weights that follow from their scores."""

from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import relu

from captum_fusion.functional._numerics import as_float, broadcast_to, full_precision, nonzero

# The residual, relative to the first one, at which the equations of imputed pixels count as solved.
_RESIDUAL = 1e-5


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
    return (scores - ablated_scores) / nonzero(scores.abs())


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
    return broadcast_to((steps + 1).to(masks) / count, masks) * masks


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
            coordinates = ((pixels.to(masks.dtype) + 0.5) * cells / ((cells + 1) * cell) - 0.5).clamp(0, cells - 1)
            # The weight of each cell of the grid in each pixel.
            weights = relu(1 - (coordinates.unsqueeze(2) - torch.arange(cells, device=masks.device)).abs())
            moved = masks.movedim(axis, -1)
            masks = (moved.flatten(1, -2) @ weights.mT).reshape(*moved.shape[:-1], length).movedim(-1, axis)
    return masks


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
    kept_values = torch.where(kept, inputs, 0)
    count = nonzero(_neighbours(torch.ones_like(inputs[:1, :1])))

    def apply_matrix(values: Tensor) -> Tensor:
        """Applies the matrix of the removed pixels' equations, which is symmetric and positive definite."""
        return torch.where(kept, 0, count * values - _neighbours(values))

    # Conjugate gradients, preconditioned by the number of neighbours, for each channel by itself.
    solution = torch.zeros_like(inputs)
    residual = torch.where(kept, 0, _neighbours(kept_values))
    enough = _RESIDUAL**2 * residual.flatten(2).square().sum(dim=2)
    preconditioned = residual / count
    direction, size = preconditioned, (residual * preconditioned).flatten(2).sum(dim=2)
    for _ in range(inputs.shape[2:].numel()):
        unsolved = residual.flatten(2).square().sum(dim=2) > enough
        if not unsolved.any():
            break
        product = apply_matrix(direction)
        step = broadcast_to(unsolved * size / nonzero((direction * product).flatten(2).sum(dim=2)), inputs)
        solution, residual = solution + step * direction, residual - step * product
        preconditioned = residual / count
        last, size = size, (residual * preconditioned).flatten(2).sum(dim=2)
        direction = preconditioned + broadcast_to(size / nonzero(last), inputs) * direction
    return torch.where(kept, inputs, solution)


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
