"""Localization: the pointing games, and the share of instances with a peak of the map."""

from collections.abc import Callable, Sequence
from math import ceil, floor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d
from torchvision.tv_tensors import BoundingBoxes

from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.guards import corners, warn_of_unit_boxes
from captum_fusion._engine.saliency import checked_attributions, saliency_map
from captum_fusion.arguments import Sign

Regions = Tensor | Sequence[Any] | np.ndarray[Any, Any]


@fill_docstring
def pointing_game(
    attributions: Tensor,
    regions: Regions,
    size: tuple[int, ...] | None = None,
    sign: Sign = "positive",
    *,
    channel_dim: int = 1,
) -> Tensor:
    r"""Computes whether the maximum of the attribution lies on the object.

    Its mean over a dataset is the accuracy of the pointing game (https://arxiv.org/abs/1608.00507), without a margin
    around the object. If several pixels have the maximum, the first in row order counts. A map of zeros is a miss.

    Args:
        attributions (Tensor): Attributions of any method, (N, C, \*s) at the input's or at a layer's resolution, see
            ``saliency_map``.
        regions (Tensor or list[Tensor]): Where the object is, for each example: boxes of shape (K, 4) in pixels, as
            ``torchvision.tv_tensors.BoundingBoxes`` of any format or as (x1, y1, x2, y2), or a mask of the shape S of
            dtype bool. One tensor of dtype bool and shape (N, \*S) or (N, 1, \*S) holds a mask for each. Arrays and
            lists of numbers are taken for tensors.
        size (tuple[int, ...], optional): The spatial shape S of the image in which the regions lie, height before
            width. Default: None, which means that of the attributions
        {sign}
        {attributions_channel_dim}

    Returns:
        *Tensor* of shape (N,): 1 for a hit, 0 for a miss, NaN where there is no region.

    Raises:
        ValueError: If the attributions do not fit the size or hold NaN, if there are not as many regions as examples,
            or if a region does not lie inside the image.

    Examples::

        >>> attributions = torch.zeros(2, 1, 4, 4)
        >>> attributions[:, :, 1, 2] = 1
        >>> pointing_game(attributions, [torch.tensor([[2, 0, 4, 2]]), torch.empty(0, 4)])
        tensor([1., nan])
    """

    def hit(saliency: Tensor, region: Tensor) -> Tensor:
        return region.flatten()[saliency.argmax()] & saliency.any()

    return _per_region(hit, checked_attributions(attributions, channel_dim), regions, size, sign)


@fill_docstring
def energy_pointing_game(
    attributions: Tensor,
    regions: Regions,
    size: tuple[int, ...] | None = None,
    sign: Sign = "positive",
    *,
    channel_dim: int = 1,
) -> Tensor:
    r"""Computes the share of the attribution that lies on the object.

    Its mean over a dataset is the energy-based pointing game of Score-CAM (https://arxiv.org/abs/1910.01279). In
    symbols, for the saliency map m and the region B:

    .. math::

        \mathrm{energy} = \frac{\sum_{p \in B} m_p}{\sum_p m_p}

    A map of zeros has the value 0.

    Args:
        attributions (Tensor): Attributions of any method, (N, C, \*s) at the input's or at a layer's resolution, see
            ``saliency_map``.
        regions (Tensor or list[Tensor]): Where the object is, for each example: boxes of shape (K, 4) in pixels, as
            ``torchvision.tv_tensors.BoundingBoxes`` of any format or as (x1, y1, x2, y2), or a mask of the shape S of
            dtype bool. One tensor of dtype bool and shape (N, \*S) or (N, 1, \*S) holds a mask for each. Arrays and
            lists of numbers are taken for tensors.
        size (tuple[int, ...], optional): The spatial shape S of the image in which the regions lie, height before
            width. Default: None, which means that of the attributions
        {sign}
        {attributions_channel_dim}

    Returns:
        *Tensor* of shape (N,) with values in [0, 1], NaN where there is no region.

    Raises:
        ValueError: If the attributions do not fit the size or hold NaN, if there are not as many regions as examples,
            or if a region does not lie inside the image.

    Examples::

        >>> attributions = torch.tensor([[[[0.0, 1.0], [0.0, 3.0]]]])
        >>> energy_pointing_game(attributions, [torch.tensor([[1, 1, 2, 2]])])
        tensor([0.7500])
    """

    def share(saliency: Tensor, region: Tensor) -> Tensor:
        total = saliency.sum()
        return (saliency.flatten() * region.flatten()).sum() / torch.where(total > 0, total, 1)

    return _per_region(share, checked_attributions(attributions, channel_dim), regions, size, sign)


@fill_docstring
def instances_reached(
    attributions: Tensor,
    instances: Sequence[Regions],
    size: tuple[int, ...] | None = None,
    sign: Sign = "positive",
    *,
    channel_dim: int = 1,
) -> Tensor:
    r"""Computes the share of the objects of a class that have a peak of the attribution on them.

    For K objects, the K highest peaks of the saliency map count. A peak is a pixel that none of its eight neighbours
    exceeds, or a group of adjacent equal pixels. An object is reached if one of these peaks lies on it. With one
    object, the metric equals the pointing game. The idea that peaks separate the instances of a class comes from peak
    response maps (https://arxiv.org/abs/1804.00880). The limit of K peaks stops a map with peaks everywhere from
    reaching every object.

    Args:
        attributions (Tensor): Attributions of any method, (N, C, H, W) at the input's or at a layer's resolution, see
            ``saliency_map``.
        instances (list): For each example the regions of its objects, one for each object: a tensor of boxes (K, 4), a
            tensor of dtype bool and shape (K, H, W) or a list of masks (H, W). See ``pointing_game``.
        size (tuple[int, int], optional): The height and width of the image in which the regions lie. Default: None,
            which means those of the attributions
        {sign}
        {attributions_channel_dim}

    Returns:
        *Tensor* of shape (N,) with values in [0, 1], NaN where there is no object.

    Raises:
        ValueError: If the attributions do not have two spatial axes, do not fit the size or hold NaN, if there are not
            as many lists of regions as examples, or if a region does not lie inside the image.

    Examples::

        >>> attributions = torch.tensor([[[[4.0, 0.0, 3.0, 0.0, 1.0]] * 3]])
        >>> boxes = torch.tensor([[0, 0, 1, 3], [4, 0, 5, 3]])
        >>> instances_reached(attributions, [boxes])
        tensor([0.5000])
    """
    maps, shape = _maps(checked_attributions(attributions, channel_dim), size, sign)
    if len(shape) != 2:
        raise ValueError(f"The image has the shape {shape}; expected two spatial axes")

    def share(saliency: Tensor, masks: list[Tensor]) -> Tensor:
        points = _highest_peaks(saliency, len(masks))
        return torch.stack([(points & mask).any() for mask in masks]).float().mean()

    masks = [_instances(regions, shape, example) for example, regions in enumerate(_checked(instances, maps))]
    return _values(maps, masks, share)


def _highest_peaks(saliency: Tensor, count: int) -> Tensor:
    """The pixels of the highest peaks of a map (1, H, W)."""
    left = (saliency > 0) & (saliency == _of_neighbours(saliency))
    points = torch.zeros_like(left)
    for _ in range(count):
        peak = torch.zeros_like(left)
        peak.view(-1)[(saliency * left).argmax()] = left.any()
        # Pixels of a peak that touch are equal, or they would be none.
        while (grown := left & (_of_neighbours(peak.float()) > 0)).sum() > peak.sum():
            peak = grown
        points |= peak
        left &= ~peak
    return points[0]


def _of_neighbours(values: Tensor) -> Tensor:
    """The maximum of each pixel and its eight neighbours."""
    return max_pool2d(values, kernel_size=3, stride=1, padding=1)


def _per_region(
    measure: Callable[[Tensor, Tensor], Tensor],
    attributions: Tensor,
    regions: Regions,
    size: tuple[int, ...] | None,
    sign: Sign,
) -> Tensor:
    """The measure of each example's saliency map and region, NaN without a region."""
    maps, shape = _maps(attributions, size, sign)
    masks = [_as_mask(_as_tensor(region, i), shape, i) for i, region in enumerate(_checked(regions, maps))]
    return _values(maps, [[mask] if mask.any() else [] for mask in masks], lambda m, mask: measure(m, mask[0]))


def _maps(attributions: Tensor, size: tuple[int, ...] | None, sign: Sign) -> tuple[Tensor, tuple[int, ...]]:
    """The saliency maps, and the shape of the image in which the regions lie."""
    shape = tuple(attributions.shape[2:]) if size is None else size
    return saliency_map(attributions, shape, sign), tuple(shape)


def _checked(regions: Any, maps: Tensor) -> Any:
    """The regions, one entry for each map."""
    if not isinstance(regions, (Tensor, np.ndarray, Sequence)) or isinstance(regions, str):
        raise TypeError(f"regions are a {type(regions).__name__}; expected a list with an entry for each example")
    if len(regions) != len(maps):
        raise ValueError(f"regions has {len(regions)} entries; expected one for each of the {len(maps)} examples")
    return regions


def _values(maps: Tensor, masks: list[list[Tensor]], measure: Callable[[Tensor, list[Tensor]], Tensor]) -> Tensor:
    """The measure of each map and its masks, NaN where there are none."""
    values = maps.new_full((len(maps),), torch.nan)
    for example, own in enumerate(masks):
        if own:
            values[example] = measure(maps[example], [mask.to(maps.device) for mask in own])
    return values


def _as_tensor(region: Any, example: int) -> Tensor:
    """A region in the form of a tensor."""
    if isinstance(region, Tensor):
        return region
    if isinstance(region, (list, tuple)) and not len(region):
        return torch.empty(0, 4)
    try:
        return torch.as_tensor(np.asarray(region))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"The region of example {example} is a {type(region).__name__} that is no array of numbers ({error}); "
            "expected boxes (K, 4), or a mask of dtype bool"
        ) from None


def _instances(regions: Any, shape: tuple[int, ...], example: int) -> list[Tensor]:
    """A mask for each object."""
    if isinstance(regions, (list, tuple)) and all(isinstance(region, (Tensor, np.ndarray)) for region in regions):
        own = [_as_tensor(region, example) for region in regions]
        return [_as_mask(region[None] if region.dim() == 1 else region, shape, example) for region in own]
    all_regions = _as_tensor(regions, example)
    if all_regions.dtype == torch.bool:
        return [_as_mask(region, shape, example) for region in all_regions]
    return [_filled(box[None], shape) for box in _checked_boxes(all_regions, shape, example)]


def _as_mask(region: Tensor, shape: tuple[int, ...], example: int) -> Tensor:
    """A region as a mask of the image's shape."""
    if region.dtype == torch.bool:
        if region.numel() == 0 or tuple(region.shape) not in (shape, (1, *shape)):
            raise ValueError(
                f"The mask of example {example} has shape {tuple(region.shape)}; expected the image's, {shape}"
            )
        return region.reshape(shape)
    return _filled(_checked_boxes(region, shape, example), shape)


def _filled(boxes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask of the pixels that boxes touch."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for x1, y1, x2, y2 in boxes.tolist():
        mask[floor(y1) : ceil(y2), floor(x1) : ceil(x2)] = True
    return mask


def _checked_boxes(region: Tensor, shape: tuple[int, ...], example: int) -> Tensor:
    """Boxes inside the image as x1, y1, x2, y2."""
    if len(shape) != 2 or region.dim() != 2 or region.shape[1] != 4 or region.is_complex():
        raise ValueError(
            f"The region of example {example} holds {region.dtype} values of shape {tuple(region.shape)} for an image "
            f"of shape {shape}; expected boxes (K, 4) of an image with two spatial axes, or a mask of dtype bool"
        )
    if isinstance(region, BoundingBoxes) and tuple(region.canvas_size) != shape:
        raise ValueError(
            f"The boxes of example {example} lie in an image of {tuple(region.canvas_size)}; expected the size {shape}"
        )
    boxes = corners(region)
    height, width = shape
    for x1, y1, x2, y2 in boxes.tolist():
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise ValueError(
                f"A box of example {example} is {(x1, y1, x2, y2)}; expected x1 < x2 and y1 < y2 inside the image, "
                f"which is {width} wide and {height} high"
            )
    warn_of_unit_boxes(boxes, width, height, example)
    return boxes
