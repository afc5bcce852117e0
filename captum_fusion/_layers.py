"""The layer to explain: the last place in a network where all of the image still matters."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import log, prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Linear, Module
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd

from captum_fusion._call import checked_inputs
from captum_fusion._captum import eager
from captum_fusion._outputs import scores_in
from captum_fusion._state import PASSES, preserved
from captum_fusion._views import Grid, PassShapes, first_of, spatial_view

Form = Literal["channels first", "channels last", "tokens"]


@dataclass(frozen=True)
class FeatureMap:
    r"""A layer to explain, and how its output is a feature map.

    Args:
        name (str): The layer's dotted name in the model.
        layer (torch.nn.Module): The layer.
        shape (tuple[int, ...]): The shape of one example's feature map, (C, \*s).
        form (str): What the layer gives: a map with "channels first", (N, C, \*s), which needs no view; one with
            "channels last", (N, \*s, C); or "tokens", (N, T, C).
    """

    name: str
    layer: Module
    shape: tuple[int, ...]
    form: Form

    def view(self) -> AbstractContextManager[Module]:
        """Gives, inside a ``with``, the module to pass as ``layer``: the layer, or its ``spatial_view``."""
        return nullcontext(self.layer) if self.form == "channels first" else spatial_view(self.layer)

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape[1:]))
        viewed = "" if self.form == "channels first" else f", a view of {self.form}"
        return f"{self.name}, {self.shape[0]} channels of {size}{viewed}"


def last_feature_map(
    model: Module, inputs: Tensor | tuple[Tensor, ...], forward_func: Callable[..., Any] | None = None
) -> FeatureMap:
    r"""Finds the layer that class activation maps usually explain: the last feature map that matters as a whole.

    What a layer gives decides, and where gradients go; its name does not. From most of the map's places there is a
    way to the output, and no other such layer lies beside it, as one of several branches does. In a convolutional
    network that is the last map before the pooling; where the output is read off a class token, the normalization
    before the last attention, after which the other tokens no longer matter. Left out are maps of one pixel, pooling to
    a fixed size, dropout, linear projections of tokens, and maps of the scores themselves.

    Networks that compare maps of several sizes side by side, such as detectors, have no such layer near their output:
    the one found is where their branches part. Name a layer for them.

    Args:
        model (torch.nn.Module): A model of images, videos or volumes, best in evaluation mode. It runs once, and stays
            as it is.
        inputs (Tensor or tuple[Tensor, ...]): As for ``attribute``. One example is enough.
        forward_func (Callable, optional): What is explained, where it is a function that runs the model. Default: None,
            which means the model

    Returns:
        *FeatureMap*: the layer, and ``view()``, which gives the module to pass as ``layer`` inside a ``with``.

    Raises:
        ValueError: If no layer gives such a feature map, or if no input is an image, a video or a volume.

    Examples::

        >>> from captum.attr import LayerGradCam
        >>> from torchvision.models import vit_b_16
        >>> model = vit_b_16(weights=None, image_size=32).eval()
        >>> inputs = torch.rand(1, 3, 32, 32)
        >>> feature_map = last_feature_map(model, inputs)
        >>> print(feature_map)
        encoder.layers.encoder_layer_11.ln_1, 768 channels of 2x2, a view of tokens
        >>> with feature_map.view() as layer:
        ...     LayerGradCam(model, layer).attribute(inputs, target=281).shape
        torch.Size([1, 1, 2, 2])
    """
    tensors = checked_inputs(inputs)
    position = next((index for index, tensor in enumerate(tensors) if 4 <= tensor.dim() <= 5), None)
    if position is None:
        raise ValueError(
            f"inputs have shapes {[tuple(tensor.shape) for tensor in tensors]}; expected an image (N, C, H, W), or a "
            "video or volume (N, C, D, H, W). For any other input, name the layer."
        )
    with preserved(tensors) as state, torch.inference_mode(False), torch.enable_grad():
        copies = [tensor.clone() for tensor in tensors]
        image = copies[position].detach().requires_grad_()
        copies[position] = image.clone()
        with PASSES, eager(), state.watching():
            places, output = _run(model, forward_func or model, copies, tuple(image.shape[2:]))
        scores = _scores(output)
        if not scores:
            raise ValueError(f"The model returned {type(output).__name__}; expected scores that depend on the inputs")
        found = _last(places, scores, image)
    if found is None:
        raise ValueError(
            f"No layer of this {type(model).__name__} gives a feature map from all of which there is a way to the "
            "output. Name a layer; where it gives tokens or a channels-last map, see spatial_view."
        )
    return FeatureMap(found.name, found.module, found.shape, found.form)


# A node of the autograd graph, and which of its results.
_Key = tuple[Node, int]


@dataclass(frozen=True)
class _Place:
    """What a module gave, read as a feature map."""

    name: str
    module: Module
    key: _Key
    output: tuple[int, ...]
    form: Form
    grid: Grid

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.output[self._channels], *self.grid)

    @property
    def _channels(self) -> int:
        return 1 if self.form == "channels first" else -1

    def places(self, entries: Tensor) -> Tensor:
        """Which places of the grid have any of these entries of the output."""
        return entries.any(dim=self._channels).flatten(1)[:, -prod(self.grid) :]

    def channels(self, entries: Tensor) -> Tensor:
        """Which channels have any of these entries of the output."""
        return entries.movedim(self._channels, 0).flatten(1).any(dim=1)


def _run(model: Module, forward_func: Callable[..., Any], inputs: list[Tensor], size: Grid) -> tuple[list[_Place], Any]:
    """Runs the model, and lists what its modules gave that can be read as a feature map, in order."""
    places: dict[_Key, _Place] = {}
    shapes = PassShapes()

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Module, _: object, given: object) -> None:
            output = first_of(given)
            if (
                not isinstance(output, Tensor)
                or output.grad_fn is None
                or len(output) != len(inputs[0])
                or isinstance(module, (_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _DropoutNd))
            ):
                return
            key = output.grad_fn, output.output_nr
            if key in places:
                # Of the modules that give the same tensor, the outermost around the first one.
                if places[key].name.startswith(f"{name}."):
                    places[key] = replace(places[key], name=name, module=module)
                return
            read = _read(tuple(output.shape), size, shapes) if 3 <= output.dim() <= 5 else None
            if read is not None and prod(read[1]) > 1 and (output is given or read[0] != "channels first"):
                places[key] = _Place(name, module, key, tuple(output.shape), *read)

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    try:
        with shapes.collected():
            output = forward_func(*inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return list(places.values()), output


def _read(shape: tuple[int, ...], size: Grid, shapes: PassShapes) -> tuple[Form, Grid] | None:
    """How an output is a feature map of an image of this size, and the map's grid."""
    if len(shape) == 3:
        tokens, channels = shape[1:]
        # A map that was flattened, (N, C, T), or pooled, is none of tokens.
        if channels == 1 or (shapes.convolved(channels) and not shapes.convolved(tokens)):
            return None
        grids = shapes.grids(tokens, channels)
        return ("tokens", grids.pop()) if len(grids) == 1 else None
    forms: list[tuple[Form, Grid]] = [("channels first", shape[2:]), ("channels last", shape[1:-1])]

    def stretch(grid: Grid) -> float:
        """How far the map's height to width is from the image's."""
        return abs(log(grid[-2] * size[-1] / (grid[-1] * size[-2])))

    return min(
        ((form, grid) for form, grid in forms if shapes.has_map(grid)), key=lambda read: stretch(read[1]), default=None
    )


def _scores(output: Any) -> list[Tensor]:
    """The scores in what a model returns; all tensors of it where they are not known."""
    scores = scores_in(output)
    if isinstance(scores, Tensor):
        return [scores] if scores.requires_grad else []
    parts = scores.values() if isinstance(scores, Mapping) else scores if isinstance(scores, (list, tuple)) else ()
    return [score for part in parts for score in _scores(part)]


def _last(places: list[_Place], scores: list[Tensor], image: Tensor) -> _Place | None:
    """The last place of which most reaches the scores, and beside which no other such place lies."""
    reached = _reached(places, scores, image)
    whole = [
        place
        for place in places
        if place.key in reached
        and place.places(reached[place.key]).float().mean() > 0.5
        and not isinstance(place.module, Linear)
        and not _is_scores(place, scores)
    ]
    upstream = [_upstream(place.key[0]) for place in whole]
    for index in reversed(range(len(whole))):
        node = whole[index].key[0]
        if all(
            node in others or other.key[0] in upstream[index] for other, others in zip(whole, upstream, strict=True)
        ):
            return whole[index]
    return None


def _reached(places: list[_Place], scores: list[Tensor], image: Tensor) -> dict[_Key, Tensor]:
    """Which entries of what each place gave have a way to the scores.

    Gradients that are not numbers spread wherever there is a way, also through weights that are zero.
    """
    reached: dict[_Key, Tensor] = {}

    def note(key: _Key) -> Callable[..., None]:
        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[key[1]]
            if gradient is not None:
                reached[key] = gradient.isnan()

        return hook

    hooks = [place.key[0].register_prehook(note(place.key)) for place in places]
    try:
        with torch.autograd.set_detect_anomaly(False):
            torch.autograd.grad(
                scores, image, [torch.full_like(score, torch.nan) for score in scores], retain_graph=True
            )
    finally:
        for handle in hooks:
            handle.remove()
    return reached


def _is_scores(place: _Place, scores: list[Tensor]) -> bool:
    """Whether each channel is a map of one of the scores."""
    if len(scores) > 1 or scores[0].dim() < 2 or scores[0].shape[1] != place.shape[0]:
        return False
    one = torch.zeros_like(scores[0])
    one[:, 0] = torch.nan
    with torch.autograd.set_detect_anomaly(False):
        (gradient,) = torch.autograd.grad(scores, [GradientEdge(*place.key)], [one], retain_graph=True)
    return int(place.channels(gradient.isnan()).sum()) <= 1


def _upstream(node: Node) -> set[Node]:
    """The nodes of the autograd graph from which a node comes."""
    found = {node}
    stack = [node]
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None and following not in found:
                found.add(following)
                stack.append(following)
    return found
