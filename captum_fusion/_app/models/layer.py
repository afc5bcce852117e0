"""The layer to explain, chosen by name or by what its output is."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from captum_fusion import FeatureMap, feature_maps, last_feature_map
from captum_fusion._app.messages import close_names

# The number of feature maps in a message.
_MOST_NAMES = 24


def choose_layer(model: nn.Module, inputs: Tensor, name: str | None, grid: tuple[int, ...] | None = None) -> FeatureMap:
    """The layer of this dotted name, or that of ``last_feature_map`` without a name.

    Args:
        model (Module): The model.
        inputs (Tensor): Images of the size that the model will see.
        name (str or None): The layer's name.
        grid (tuple[int, int] or None): The grid of its tokens, where it does not follow from the input.

    Raises:
        ValueError: If there is no such layer, or if it gives no feature map, naming those that do.
    """
    if name is None:
        if grid is not None:
            raise ValueError(f"The grid is {grid}, but no layer is named; name the layer whose tokens have this grid")
        chosen = last_feature_map(model, inputs[:1])
        return replace(chosen, grid=chosen.shape[1:] if chosen.form == "tokens" else None)
    modules: dict[str, nn.Module] = {layer: module for layer, module in model.named_modules() if layer}
    candidates = feature_maps(model, inputs)
    maps = [f"{layer} {each.shape}" for layer, each in candidates.items() if isinstance(each, FeatureMap)]
    earlier = f" and {len(maps) - _MOST_NAMES} earlier ones" if len(maps) > _MOST_NAMES else ""
    available = f"Its feature maps: {', '.join(maps[-_MOST_NAMES:])}{earlier}" if maps else "It has no feature maps"
    if name not in modules:
        raise ValueError(f"The model has no layer {name!r}.{close_names(name, modules)} {available}")
    if name not in candidates:
        raise ValueError(f"The layer {name!r} does not run in a forward pass of the model. {available}")
    candidate = candidates[name]
    if grid is not None:
        return _on_grid(model, inputs, FeatureMap(name, modules[name], (), "tokens", grid))
    if isinstance(candidate, str):
        raise ValueError(
            f"The layer {name!r} returns {candidate}; expected a feature map (N, C, H, W) with more than one pixel, a "
            f"channels-last map, or tokens (N, T, C), which may need a grid. {available}"
        )
    return replace(candidate, grid=candidate.shape[1:] if candidate.form == "tokens" else None)


def _on_grid(model: nn.Module, inputs: Tensor, tokens: FeatureMap) -> FeatureMap:
    """The feature map of a layer of tokens on its grid."""
    shapes: list[tuple[int, ...]] = []
    with (
        tokens.view() as layer,
        layer.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:]))),
        torch.no_grad(),
    ):
        model(inputs[:1])
    return replace(tokens, shape=shapes[-1])
