"""From a map to regions, in torchvision's formats: masks, boxes and scores."""

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d
from torchvision.ops import masks_to_boxes

from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.saliency import checked_attributions, saliency_map
from captum_fusion.arguments import InterpolateMode, Sign


@fill_docstring
def region_masks(
    attributions: Tensor,
    threshold: float = 0.5,
    size: tuple[int, ...] | None = None,
    sign: Sign = "positive",
    interpolate_mode: InterpolateMode = "bilinear",
    *,
    channel_dim: int = 1,
) -> Tensor:
    r"""Computes the mask of each map: the pixels whose saliency reaches a share of the map's maximum.

    Pass the masks as regions to ``captum_fusion.metrics.pointing_game``, or the row of one image to
    ``torchvision.utils.draw_segmentation_masks``.

    Args:
        {map_attributions}
        {threshold}
        {map_size}
        {sign}
        {interpolate_mode}
        {attributions_channel_dim}

    Returns:
        *Tensor* of dtype bool and shape (N, 1, \*S). The mask of a map of zeros is empty.

    Raises:
        {region_errors}

    Examples::

        >>> region_masks(torch.tensor([[[0.0, 1.0, 2.0, 4.0]]]))
        tensor([[[False, False,  True,  True]]])
    """
    return _saliency(attributions, threshold, size, sign, interpolate_mode, channel_dim) >= threshold


@fill_docstring
def instances(
    attributions: Tensor,
    threshold: float = 0.5,
    size: tuple[int, ...] | None = None,
    sign: Sign = "positive",
    interpolate_mode: InterpolateMode = "bilinear",
    *,
    channel_dim: int = 1,
) -> list[dict[str, Tensor]]:
    r"""Computes the connected regions of each map of images, as torchvision's detectors return objects.

    Pixels whose saliency reaches a share of the map's maximum belong to one region if they touch, at a side or at a
    corner. The region with the map's maximum is the first.

    Args:
        {map_attributions}
        {threshold}
        {map_size}
        {sign}
        {interpolate_mode}
        {attributions_channel_dim}

    Returns:
        *list* with a *dict* for each example, of its K regions by falling scores:

        - **masks** (*Tensor*): The pixels of each region, of dtype bool and shape (K, H, W).
        - **boxes** (*Tensor*): The smallest box around each region, (x1, y1, x2, y2) in pixels, shape (K, 4). The
          region's last column and row end at x2 and y2, so that a single pixel has a box of width 1.
        - **scores** (*Tensor*): The highest saliency in each region, in [threshold, 1], shape (K,).

    Raises:
        {region_errors}

    Examples::

        >>> (found,) = instances(torch.tensor([[[[4.0, 4.0, 0.0, 0.0], [0.0, 4.0, 0.0, 3.0]]]]))
        >>> found["boxes"], found["scores"]
        (tensor([[0., 0., 2., 2.],
                [3., 1., 4., 2.]]), tensor([1.0000, 0.7500]))
    """
    maps = _saliency(attributions, threshold, size, sign, interpolate_mode, channel_dim)
    if maps.dim() != 4:
        raise ValueError(f"The maps have the shape {tuple(maps.shape)}; expected two spatial axes, (N, 1, H, W)")
    return [_instances(saliency, saliency >= threshold) for saliency in maps[:, 0]]


def _saliency(
    attributions: Tensor,
    threshold: float,
    size: tuple[int, ...] | None,
    sign: Sign,
    interpolate_mode: InterpolateMode,
    channel_dim: int,
) -> Tensor:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold!r}; expected a number in (0, 1]")
    attributions = checked_attributions(attributions, channel_dim)
    return saliency_map(attributions, tuple(attributions.shape[2:] if size is None else size), sign, interpolate_mode)


def _instances(saliency: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The regions of one map, (H, W)."""
    labels = _components(mask.cpu()).to(mask.device)
    names = torch.unique(labels[mask]).flip(0)
    masks = labels == names.reshape(-1, 1, 1)
    scores = torch.stack([saliency[own].amax() for own in masks]) if len(masks) else saliency.new_zeros(0)
    scores, order = scores.sort(descending=True, stable=True)
    masks = masks[order]
    boxes = masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0], device=mask.device)
    return {"masks": masks, "boxes": boxes, "scores": scores}


def _components(mask: Tensor) -> Tensor:
    """A number for each region of a mask, (H, W), 0 outside: the highest number of its pixels, counted backwards."""
    labels = torch.arange(mask.numel(), 0, -1).reshape(mask.shape) * mask
    highest = torch.arange(mask.numel() + 1)
    while True:
        near = max_pool2d(labels[None].double(), kernel_size=3, stride=1, padding=1)[0].long() * mask
        # What a number has become at one pixel, it becomes at all: a long region takes few steps.
        highest = highest.scatter_reduce(0, labels.flatten(), near.flatten(), "amax")
        highest = highest[highest]
        if torch.equal(near, labels):
            return labels
        labels = highest[near]
