"""Finds the layer to explain: the last feature map of a network that all of the image reaches."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import log, prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Linear, Module
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd

from captum_fusion._engine.call import checked_inputs
from captum_fusion._engine.captum import eager
from captum_fusion._engine.guards import batch_hint, check_not_scripted, last_run_chosen
from captum_fusion._engine.outputs import scores_in
from captum_fusion._engine.spatial_view import attach_view, unwrap
from captum_fusion._engine.state import preserved
from captum_fusion._engine.token_grid import Grid, TokenGridTracker, channel_axis, channels_first

Form = Literal["channels first", "channels last", "tokens"]


@dataclass(frozen=True)
class FeatureMap:
    r"""A layer to explain, and the form of its feature map.

    Args:
        name (str): The layer's dotted name in the model.
        layer (torch.nn.Module): The layer.
        shape (tuple[int, ...]): The shape of one example's feature map, (C, \*s).
        form (str): The form of the layer's output: "channels first", (N, C, \*s), which needs no view; "channels last",
            (N, \*s, C); or "tokens", (N, T, C).
        grid (tuple[int, ...] or None): The grid of the tokens. Default: None, which infers it from each input
    """

    name: str
    layer: Module
    shape: tuple[int, ...]
    form: Form
    grid: Grid | None = None

    @contextmanager
    def view(self) -> Iterator[Module]:
        """Provides, inside a ``with`` block, the module to pass as ``layer``: the layer, or its ``spatial_view``."""
        with ExitStack() as stack:
            layer = self.layer
            if self.form != "channels first":
                layer = stack.enter_context(attach_view(self.layer, self.grid)).module
            last_run_chosen.add(layer)
            stack.callback(last_run_chosen.discard, layer)
            yield layer

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape[1:]))
        view = "" if self.form == "channels first" else f", a view of {self.form}"
        return f"{self.name}, {self.shape[0]} channels of {size}{view}"


def last_feature_map(
    model: Module, inputs: Tensor | tuple[Tensor, ...], forward_func: Callable[..., Any] | None = None
) -> FeatureMap:
    r"""Finds the layer that class activation maps usually explain: the last feature map that feeds the whole output.

    The choice depends on the shapes of outputs and on the gradients, not on names. Most pixels of the map must have a
    gradient, and the layer must not be one of several parallel branches. In a convolutional network, this is the last
    map before the pooling. In a ViT that classifies by its class token, it is the normalization before the last
    attention, because the other tokens do not count after that. Maps of one pixel, pooling to a fixed size, dropout,
    linear projections of tokens, and maps of the scores themselves are excluded.

    Networks that compare maps of several sizes in parallel, such as detectors, have no such layer near their output.
    For them the result is the layer where their branches part; choose a layer yourself.

    Args:
        model (torch.nn.Module): A model of images, videos or volumes, preferably in evaluation mode. It runs once and
            is left unchanged.
        inputs (Tensor or tuple[Tensor, ...]): Inputs as for ``attribute``. One example is enough.
        forward_func (Callable, optional): The function to explain, if it is not the model itself but runs the model.
            Default: None, which means the model

    Returns:
        *FeatureMap*: the layer; its ``view()`` provides the module to pass as ``layer`` inside a ``with`` block.

    Raises:
        ValueError: If no layer returns such a feature map, or if no input is an image, a video or a volume.

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
    check_not_scripted(model)
    images = (i for i, tensor in enumerate(tensors) if 4 <= tensor.dim() <= 5 and tensor.is_floating_point())
    position = next(images, None)
    if position is None:
        raise ValueError(
            f"inputs have shapes {[tuple(tensor.shape) for tensor in tensors]}; expected an image (N, C, H, W), or a "
            f"video or volume (N, C, D, H, W). For any other input, choose the layer yourself.{batch_hint(tensors)}"
        )
    with preserved(tensors) as state, torch.inference_mode(False), torch.enable_grad():
        copies = [tensor.clone() for tensor in tensors]
        image = copies[position].detach().requires_grad_()
        copies[position] = image.clone()
        with eager(), state.tracking(forward_func or model):
            size = tuple(channels_first(image, channel_axis(image.shape)).shape[2:])
            try:
                runs, output = _run(model, forward_func or model, copies, size)
            except (RuntimeError, ValueError, IndexError) as error:
                if hint := batch_hint(tensors):
                    raise type(error)(f"{str(error).rstrip('.')}.{hint}") from error
                raise
        scores = _scores(output)
        if not scores:
            raise ValueError(f"The model returned {type(output).__name__}; expected scores that depend on the inputs")
        last = last_whole_map(candidates(runs, len(image)), scores, image)
    if last is None:
        raise ValueError(
            f"No single feature map of this {type(model).__name__} feeds the whole output. Choose a layer yourself; if "
            "it returns tokens or a channels-last map, see spatial_view."
        )
    return last.feature_map


def feature_maps(model: Module, inputs: Tensor) -> dict[str, FeatureMap | str]:
    """Describes the output of each module's last run, by name, in order: a feature map, or another value.

    Args:
        model (torch.nn.Module): A model, in evaluation mode.
        inputs (Tensor): Images, (N, 3, H, W).
    """
    with preserved((inputs,)) as state, eager(), state.tracking(), torch.no_grad():
        runs, _ = _run(model, model, [inputs.clone()], tuple(inputs.shape[2:]))
    return {
        run.name: run.feature_map if run.form and prod(run.grid) > 1 else run.description for run in _last_runs(runs)
    }


# A node of the autograd graph, and which of its results.
_Key = tuple[Node, int]


@dataclass(frozen=True)
class _Run:
    """A run of a module, and the layout of its output as a feature map."""

    name: str
    module: Module
    description: str
    output: tuple[int, ...]
    key: _Key | None
    form: Form | None
    grid: Grid
    wrapped: bool = False

    @property
    def _channels(self) -> int:
        return 1 if self.form == "channels first" else -1

    @property
    def feature_map(self) -> FeatureMap:
        assert self.form is not None
        return FeatureMap(self.name, self.module, (self.output[self._channels], *self.grid), self.form)

    def cells(self, entries: Tensor) -> Tensor:
        """The cells of the grid that have any of these entries of the output."""
        return entries.any(dim=self._channels).flatten(1)[:, -prod(self.grid) :]

    def channels(self, entries: Tensor) -> Tensor:
        """The channels that have any of these entries of the output."""
        return entries.movedim(self._channels, 0).flatten(1).any(dim=1)


def _run(model: Module, forward_func: Callable[..., Any], inputs: list[Tensor], size: Grid) -> tuple[list[_Run], Any]:
    """Runs the model, and lists the runs of its modules in order."""
    runs: list[_Run] = []
    tracker = TokenGridTracker()

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Module, _: object, given: object) -> None:
            output = unwrap(given)
            if not isinstance(output, Tensor):
                runs.append(_Run(name, module, type(given).__name__, (), None, None, ()))
                return
            shape = tuple(output.shape)
            key = None if output.grad_fn is None else (output.grad_fn, output.output_nr)
            form, grid = infer_layout(shape, size, tracker) or (None, ())
            if output is not given and form == "channels first":
                form = None  # spatial_view reads what is in a container in other ways.
            runs.append(_Run(name, module, f"shape {shape}", shape, key, form, grid, output is not given))

        return hook

    # torch.compile wraps a model in a module of its own, whose name the model's own modules do not have.
    plain: Module = getattr(model, "_orig_mod", model)
    hooks = [module.register_forward_hook(keep(name)) for name, module in plain.named_modules() if name]
    try:
        with tracker.collected():
            output = forward_func(*inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return runs, output


def _last_runs(runs: list[_Run]) -> list[_Run]:
    """The last run of each module, in order. Captum attributes that run alone."""
    last = {run.module: index for index, run in enumerate(runs)}
    return [runs[index] for index in sorted(last.values())]


def candidates(runs: list[_Run], rows: int) -> dict[_Key, _Run]:
    """The feature maps among the runs, each once."""
    maps: dict[_Key, _Run] = {}
    for run in _last_runs(runs):
        key = run.key
        if key is None or isinstance(run.module, (_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _DropoutNd)):
            continue
        if key in maps:
            # Several modules may return the same tensor: the outermost container around the first of them is taken.
            if run.form is not None and not run.wrapped and maps[key].name.startswith(f"{run.name}."):
                maps[key] = run
        elif run.form is not None and prod(run.grid) > 1 and run.output[0] == rows:
            maps[key] = run
    return maps


def infer_layout(shape: tuple[int, ...], size: Grid, tracker: TokenGridTracker) -> tuple[Form, Grid] | None:
    """Infers the layout and the grid of an output as a feature map of an image of this size."""
    if not 3 <= len(shape) <= 5:
        return None
    if len(shape) == 3:
        tokens, channels = shape[1:]
        # A flattened or pooled map, (N, C, T), holds no tokens.
        if channels == 1 or (tracker.convolved(channels) and not tracker.convolved(tokens)):
            return None
        grids = tracker.grids(tokens, channels)
        return ("tokens", grids.pop()) if len(grids) == 1 else None
    forms: list[tuple[Form, Grid]] = [("channels first", shape[2:]), ("channels last", shape[1:-1])]

    def stretch(grid: Grid) -> float:
        """The difference between the aspect ratios of map and image."""
        return abs(log(grid[-2] * size[-1] / (grid[-1] * size[-2])))

    layout = min(
        ((form, grid) for form, grid in forms if tracker.shapes.has_map(grid)),
        key=lambda each: stretch(each[1]),
        default=None,
    )
    # Upsampled scores are no feature map. They are left out only here, because the scores of a cube, read with the
    # other layout, have a coarser grid of one side and the classes.
    return None if layout is None or tracker.shapes.is_fine(layout[1]) else layout


def _scores(output: Any) -> list[Tensor]:
    """The scores in a model's output; all of its tensors if the output's form is not known."""
    scores = scores_in(output)
    if isinstance(scores, Tensor):
        return [scores] if scores.requires_grad else []
    parts = scores.values() if isinstance(scores, Mapping) else scores if isinstance(scores, (list, tuple)) else ()
    return [score for part in parts for score in _scores(part)]


def last_whole_map(maps: dict[_Key, _Run], scores: list[Tensor], image: Tensor) -> _Run | None:
    """The last map that reaches the scores by most of its cells and has no parallel map that does."""
    entries = reachable(maps, scores, image)
    whole = [
        key
        for key, run in maps.items()
        if key in entries
        and run.cells(entries[key]).float().mean() > 0.5
        and not isinstance(run.module, Linear)
        and not _is_scores(run, key, scores)
    ]
    upstream = {key: _upstream(key[0]) for key in whole}
    for key in reversed(whole):
        if all(key[0] in upstream[other] or other[0] in upstream[key] for other in whole):
            return maps[key]
    return None


def reachable(maps: dict[_Key, _Run], scores: list[Tensor], image: Tensor) -> dict[_Key, Tensor]:
    """Finds the entries of each map that the scores depend on.

    NaN gradients follow every path back from the scores, even through weights that are zero.
    """
    entries: dict[_Key, Tensor] = {}

    def note(key: _Key) -> Callable[..., None]:
        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[key[1]]
            if gradient is not None:
                entries[key] = gradient.isnan()

        return hook

    hooks = [key[0].register_prehook(note(key)) for key in maps]
    try:
        with torch.autograd.set_detect_anomaly(False):
            torch.autograd.grad(
                scores, image, [torch.full_like(score, torch.nan) for score in scores], retain_graph=True
            )
    finally:
        for handle in hooks:
            handle.remove()
    return entries


def _is_scores(run: _Run, key: _Key, scores: list[Tensor]) -> bool:
    """Tells whether each channel is a map of one of the scores."""
    if len(scores) > 1 or scores[0].dim() < 2 or scores[0].shape[1] != run.feature_map.shape[0]:
        return False
    one = torch.zeros_like(scores[0])
    one[:, 0] = torch.nan
    with torch.autograd.set_detect_anomaly(False):
        (gradient,) = torch.autograd.grad(scores, [GradientEdge(*key)], [one], retain_graph=True)
    return int(run.channels(gradient.isnan()).sum()) <= 1


def _upstream(node: Node) -> set[Node]:
    """The nodes of the autograd graph that a node depends on, with itself."""
    nodes = {node}
    stack = [node]
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None and following not in nodes:
                nodes.add(following)
                stack.append(following)
    return nodes
