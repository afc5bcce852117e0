"""From any attribution to a map in [0, 1]."""

import torch
from torch import Tensor
from torch.nn.functional import relu

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.guards import batch_hint, check_finite
from captum_fusion._engine.token_grid import channels_first
from captum_fusion.arguments import SIGNS, InterpolateMode, Sign
from captum_fusion.functional import as_float, normalize, upsample
from captum_fusion.functional._numerics import broadcast_to


def layer_attributions(channels: Tensor, attr_dim_summation: bool, relu_attributions: bool) -> Tensor:
    """Sums and rectifies the channels' contributions, (N, C, *s), as Captum's layer attributions do."""
    attributions = channels.sum(dim=1, keepdim=True) if attr_dim_summation else channels
    return relu(attributions) if relu_attributions else attributions


@fill_docstring
def saliency_map(
    attributions: Tensor,
    size: tuple[int, ...],
    sign: Sign = "positive",
    interpolate_mode: InterpolateMode = "bilinear",
    *,
    channel_dim: int = 1,
) -> Tensor:
    r"""Converts attributions of any method to a saliency map, which fusions and metrics use as a mask.

    The attributions are summed over the channels, the sign is applied, and the result is interpolated to a spatial size
    and min-max normalized. A constant positive map becomes all ones, because it keeps everything; any other constant
    map becomes all zeros.

    Args:
        attributions (Tensor): Attributions of shape (N, C, \*s) with one to three spatial axes; C is 1 for a layer's
            map.
        size (tuple[int, ...]): The spatial shape S of the result.
        sign (str, optional): The values that count, as in ``captum.attr.visualization.visualize_image_attr``:
            "positive", "negative", "absolute_value", or "all" (from the most negative value, which becomes 0, to the
            most positive value). Default: "positive"
        {interpolate_mode}
        {attributions_channel_dim}

    Returns:
        *Tensor* of shape (N, 1, \*S) with values in [0, 1], float32 or wider.

    Raises:
        ValueError: If the sign is unknown, if the attributions do not have as many spatial axes as the size, or if
            some, or their sums over the channels, are not finite.

    Examples::

        >>> saliency_map(torch.tensor([[[1.0, -3.0], [1.0, 2.0]]]), (4,), sign="all")
        tensor([[[1.0000, 0.7500, 0.2500, 0.0000]]])
    """
    if sign not in SIGNS:
        raise ValueError(f"sign is {sign!r}; expected one of {SIGNS}")
    if not isinstance(size, (tuple, list)):
        raise TypeError(f"size is {size!r}; expected a tuple with one number for each spatial axis")
    evidence = _evidence(checked_attributions(attributions, channel_dim), size)
    if sign == "positive":
        evidence = relu(evidence)
    elif sign == "negative":
        evidence = relu(0 - evidence)
    elif sign == "absolute_value":
        evidence = evidence.abs()
    return _as_mask(upsample(evidence, size, interpolate_mode))


def region_map(attributions: Tensor, size: tuple[int, ...], interpolate_mode: InterpolateMode) -> Tensor:
    """R: the saliency map of positive evidence, but with the ReLU after the interpolation, as in Score-CAM's own code.

    The order matters for negative attributions: interpolated first, they lower their positive neighbours.
    """
    return _as_mask(relu(upsample(_evidence(attributions, size), size, interpolate_mode)))


def checked_attributions(attributions: object, channel_dim: int) -> Tensor:
    """Attributions with their channels in dimension 1."""
    if not isinstance(attributions, Tensor):
        raise TypeError(f"attributions are a {type(attributions).__name__}; expected a tensor (N, C, *s)")
    return channels_first(attributions, channel_dim)


def _evidence(attributions: Tensor, size: tuple[int, ...]) -> Tensor:
    """The sum over the channels, after checks."""
    if not 3 <= attributions.dim() == len(size) + 2 or attributions.is_complex():
        raise ValueError(
            f"attributions have shape {tuple(attributions.shape)} and dtype {attributions.dtype}; expected real "
            f"numbers (N, C, *s) with {len(size)} spatial axes, to interpolate to {tuple(size)}"
        )
    evidence = as_float(attributions.detach()).sum(dim=1, keepdim=True)
    check_finite(attributions, evidence)
    return evidence


def _as_mask(evidence: Tensor) -> Tensor:
    """N, but ones for a map that is constant and positive: it keeps everything."""
    maps = normalize(evidence)
    keeps_everything = (maps.flatten(1).amax(dim=1) == 0) & (evidence.flatten(1).amin(dim=1) > 0)
    return torch.where(broadcast_to(keeps_everything, maps), 1, maps)


# Neighbours in order within so many units in the last place are tied: an interpolation leaves such differences on
# plateaus. The units are those of the values: units of 1 would tie all pixels of a map with one large value.
_TIED = 4


def ranks(maps: Tensor) -> Tensor:
    """The rank of each pixel by importance, 0 for the most important one; ties, within rounding, in row order."""
    values, order = maps.flatten(1).sort(dim=1, descending=True, stable=True)
    rounding = _TIED * torch.finfo(values.dtype).eps
    # Normalization leaves values that are rounded in units of 1 beside the minimum.
    steps = (values.diff(dim=1).neg() > rounding * values[:, :-1]) & (values[:, :-1] > rounding)
    level = torch.zeros_like(order).scatter_(1, order[:, 1:], steps.cumsum(dim=1))
    return level.argsort(dim=1, stable=True).argsort(dim=1).reshape(maps.shape)


def saliency_maps(call: ModelCall, attributions: Tensor | tuple[Tensor | None, ...], sign: Sign) -> dict[int, Tensor]:
    """The saliency map of each input that is masked, by the input's position.

    Where an example has attributions of some inputs only, its maps of the others are NaN: they are left as they are.
    """
    tensors = call.tensors
    if isinstance(attributions, list):
        attributions = tuple(attributions)
    parts = attributions if isinstance(attributions, tuple) else (attributions,)
    if not all(value is None or isinstance(value, Tensor) for value in parts):
        held = ", ".join(type(value).__name__ for value in parts)
        raise TypeError(f"attributions are ({held}); expected a tensor, or for several inputs a tuple of them")
    if isinstance(attributions, Tensor):
        # One map is for every input with its spatial axes, as LayerFusionCam makes it; masks and indices beside them
        # pass through.
        maskable = [tensor.is_floating_point() for tensor in tensors]
        per_input = tuple(
            attributions if (mask or not any(maskable)) and tensor.dim() == attributions.dim() else None
            for mask, tensor in zip(maskable, tensors, strict=True)
        )
        shape = str(tuple(attributions.shape))
    else:
        per_input = attributions
        shape = str([None if value is None else tuple(value.shape) for value in per_input])
    shapes = [tuple(tensor.shape) for tensor in tensors]
    maps = {
        position: call.of_input(value, position) if position < len(tensors) else value
        for position, value in enumerate(per_input)
        if value is not None and 3 <= value.dim() <= 5
    }
    if (
        len(per_input) != len(tensors)
        or not maps
        or any(len(value) != len(tensors[0]) or value.dim() != tensors[i].dim() for i, value in maps.items())
    ):
        raise ValueError(
            f"attributions have shape {shape} for inputs of shapes {shapes}; expected for each input (N, C, *s) with "
            "the input's number of examples and of spatial axes, or None, and at least one such attribution."
            f"{batch_hint(tensors)}"
        )
    # An input that was not explained has zeros and is not masked; if all are zero, all are masked.
    explained = {position: value.flatten(1).any(dim=1) for position, value in maps.items()}
    device = next(iter(maps.values())).device
    anything = torch.stack([rows.to(device) for rows in explained.values()]).any(dim=0)
    chosen: dict[int, Tensor] = {}
    for position, value in maps.items():
        left = anything.to(value.device) & ~explained[position]
        if not left.all():
            saliency = saliency_map(value, tuple(tensors[position].shape[2:]), sign)
            chosen[position] = saliency.masked_fill(broadcast_to(left, saliency), torch.nan)
    return chosen


def explained_pixels(maps: dict[int, Tensor], example: int) -> Tensor:
    """The pixels of all maps of one example, (1, pixels), without those of inputs that are left as they are."""
    rows = [maps[position][example].flatten() for position in sorted(maps)]
    return torch.cat([row[~row.isnan()] for row in rows])[None]
