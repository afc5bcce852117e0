"""Feature-map views of layers whose output is not (N, C, *s)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Identity, Module

from captum_fusion._engine.state import warn
from captum_fusion._engine.token_grid import (
    PREFIX_LIMIT,
    Grid,
    TokenGridTracker,
    changes_where_perturbed,
    channel_axis,
    channels_first,
    differs_by_chance,
    fits,
    perturb,
    probe_cells,
    repeat_first_row,
    tensors_in,
)

ToMap = Callable[[Any], Tensor]
FromMap = Callable[[Tensor, Any], Any]

# The grids on which a layer's tokens were checked, so that no view checks them again.
_ordered: WeakKeyDictionary[Module, set[Grid]] = WeakKeyDictionary()


class ViewHook:
    """A forward hook that passes a layer's output through an identity on its feature-map view."""

    def __init__(self, to_map: ToMap, from_map: FromMap) -> None:
        self.to_map = to_map
        self.from_map = from_map
        self.module = Identity()
        self.ran = False
        self.tokens = False
        self.recorded: Tensor | None = None
        self.recording = False

    def __call__(self, _: Module, __: tuple[Any, ...], output: Any) -> Any:
        self.ran = True
        self.tokens = getattr(unwrap(output), "ndim", 0) == 3
        if self.recording:
            # Past the identity, whose hooks are those of the attribution.
            self.recorded = self.to_map(output)
            return output
        return self.from_map(self.module(self.to_map(output)), output)


@contextmanager
def spatial_view(
    layer: Module,
    grid: Grid | None = None,
    *,
    to_map: ToMap | None = None,
    from_map: FromMap | None = None,
) -> Iterator[Module]:
    r"""Provides a module to explain in place of a layer that outputs tokens or channels-last maps.

    Inside the ``with`` block, the layer's output passes through an identity on its view of shape (N, C, \*s). The
    activations and gradients of this identity are the layer's own. Every layer attribution of this package or of Captum
    accepts it as ``layer``. The network's results are the same bit for bit, and nothing remains after the block.

    Without ``to_map`` and ``from_map``, an output of three dimensions holds tokens (N, T, C): any class or register
    tokens, which the view omits, and then the tokens of the grid in row order (ViT, DeiT). An output of four or five
    dimensions is a channels-last map (N, \*s, C) (Swin, the inside of ConvNeXt blocks). If the output is a tuple, a
    list or a dictionary, its first entry is viewed.

    The order of tokens cannot be read from their shape. The first pass of a token layer is therefore repeated once with
    some perturbed patches, and the layer is refused unless its map changes at these patches.

    Args:
        layer (torch.nn.Module): The layer to view. If only some of the tokens reach the model's output, as after the
            last attention of a ViT, all others have no gradient. In this case choose an earlier layer, such as the
            normalization before the last attention.
        grid (tuple[int, ...], optional): The spatial shape s of the tokens, one to three axes. Default: None, which
            infers the grid from the convolution that cuts the input into patches, or from the shape of the input
        to_map (Callable, optional): Converts the layer's output to its view, (N, C, \*s). Default: None
        from_map (Callable, optional): Converts such a view back; takes the view and the layer's output, and returns an
            output with the view's values. Required together with ``to_map``. Default: None

    Yields:
        *torch.nn.Module* to pass as ``layer``.

    Raises:
        ValueError: If only one of ``to_map`` and ``from_map`` is passed, or if the layer already has a view. When the
            layer runs: if its output has no such view or needs none, if the number of its tokens does not fit the grid,
            if its tokens are not in row order, or if no grid is passed and none or several can be inferred.
        RuntimeError: At the end of the block, if the layer never ran.

    Examples::

        >>> from captum.attr import LayerGradCam
        >>> from torchvision.models import vit_b_16
        >>> model = vit_b_16(weights=None, image_size=32).eval()
        >>> with spatial_view(model.encoder.layers[-1].ln_1) as view:
        ...     LayerGradCam(model, view).attribute(torch.rand(1, 3, 32, 32), target=281).shape
        torch.Size([1, 1, 2, 2])
    """
    with attach_view(layer, grid, to_map, from_map) as view:
        yield view.module
    if not view.ran:
        raise RuntimeError(
            f"The viewed {type(layer).__name__} never ran; expected a forward pass of its model inside the with block"
        )


@contextmanager
def attach_view(
    layer: Module, grid: Grid | None = None, to_map: ToMap | None = None, from_map: FromMap | None = None
) -> Iterator[ViewHook]:
    """As ``spatial_view``, for a layer that need not run."""
    if (to_map is None) != (from_map is None):
        raise ValueError(
            "One of to_map and from_map was given; expected both, to_map(output) and from_map(map, output), or "
            "neither: tokens (N, T, C) and channels-last maps need none"
        )
    if grid is not None and (to_map is not None or not 1 <= len(grid) <= 3 or min(grid) < 1):
        raise ValueError(
            f"grid is {grid}; expected one to three positive numbers for a layer of tokens, and none beside to_map"
        )
    if any(isinstance(hook, ViewHook) for hook in layer._forward_hooks.values()):
        raise ValueError(f"There is a view of this {type(layer).__name__} already; expected one at a time")
    tracker = TokenGridTracker()
    view = ViewHook(to_map or (lambda output: _to_map(output, grid, tracker, layer, unchecked)), from_map or _from_map)
    unchecked: dict[str, Grid] = {}

    def check(module: Module, args: Any, kwargs: Any) -> None:
        if unchecked and not view.recording:
            _check_order(layer, view, unchecked.pop("grid"), module, (args, kwargs))

    with layer.register_forward_hook(view), tracker.collected(check) if to_map is None else nullcontext():
        yield view


def _check_order(layer: Module, view: ViewHook, grid: Grid, module: Module, arguments: tuple[Any, Any]) -> None:
    """Refuses a layer whose tokens are not where their patches are, once for each layer and grid.

    The order is data, which no shape shows: Hiera keeps the tokens of a window apart until its last stage, other
    networks shuffle them or have registers after them. So the pass that has ended runs once more on perturbed images.
    It also shows which axis of a map with as many channels as rows and columns holds the channels.
    """
    holds = any(part is layer for part in module.modules())
    image = next((t for t in tensors_in(arguments) if t.dim() == len(grid) + 2 and t.is_floating_point()), None)
    if image is None or not holds:
        if len(grid) > 1 and view.tokens:
            warn(
                f"The token order of the viewed {type(layer).__name__} was not checked, because no module that "
                "contains it takes the image. Call such a module in forward_func instead of its parts one by one."
            )
        return
    _ordered.setdefault(layer, set()).add(grid)
    cells = probe_cells(grid)
    args, kwargs = repeat_first_row(arguments, len(image), len(cells) + 2)
    training = [part for part in module.modules() if part.training]
    view.recording = True
    try:
        # Without dropout, and without statistics of perturbed images.
        for part in training:
            part.training = False
        # The random state is the caller's.
        with torch.no_grad(), torch.random.fork_rng([image.device] if image.is_cuda else []):
            images = next(t for t in tensors_in((args, kwargs)) if t.dim() == len(grid) + 2 and t.is_floating_point())
            perturb(channels_first(images, channel_axis(images.shape)), grid, cells)
            module(*args, **kwargs)
        maps = view.recorded
    except Exception:
        # A model that takes one size of batch only may fail in any way: nothing can be said of it.
        return
    finally:
        view.recording, view.recorded = False, None
        for part in training:
            part.training = True
    if maps is None or len(maps) != len(cells) + 2 or tuple(maps.shape[2:]) != grid:
        return
    if not view.tokens:
        if not changes_where_perturbed(maps, cells) and changes_where_perturbed(maps.movedim(1, -1), cells):
            _ordered[layer].remove(grid)
            raise _channels_first((len(image), *grid, maps.shape[1]))
    elif differs_by_chance(maps):
        _ordered[layer].remove(grid)
        raise ValueError(
            f"The viewed {type(layer).__name__} gives different tokens for the same image: the model draws random "
            "numbers, as one that masks or shuffles patches does, so that no token has a known place. Let forward_func "
            "fix what is drawn, or pass to_map and from_map."
        )
    elif changes_where_perturbed(maps, cells) is False:
        _ordered[layer].remove(grid)
        raise ValueError(
            f"The map of the viewed {type(layer).__name__} on the grid {grid} does not change where the image changes: "
            "its tokens are not in row order, or other tokens lie after or among them. Choose a layer whose tokens are "
            "in row order, such as that of last_feature_map, or pass to_map and from_map."
        )


def _channels_first(shape: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"The viewed layer returned {shape}, which already is a channels-first map: only {shape[2:]} is a fraction of "
        "the image's size. Pass the layer itself, or to_map and from_map."
    )


def unwrap(output: Any) -> Any:
    """The first entry of a tuple, list or dictionary, or anything else as it is."""
    if isinstance(output, (tuple, list, Mapping)) and output:
        return next(iter(output.values() if isinstance(output, Mapping) else output))
    return output


def _to_map(
    output: Any, grid: Grid | None, tracker: TokenGridTracker, layer: Module, unchecked: dict[str, Grid]
) -> Tensor:
    output = unwrap(output)
    if not isinstance(output, Tensor) or not 3 <= output.dim() <= 5:
        returned = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"The viewed layer returned {returned}; expected tokens (N, T, C) or a channels-last map (N, *s, C) with "
            "two or three spatial axes. For any other output, pass to_map and from_map."
        )
    shape = tuple(output.shape)
    if output.dim() > 3:
        if grid is not None:
            raise ValueError(f"grid is {grid}, but the viewed layer returned a map {shape}; expected None")
        maps, grid = output.movedim(-1, 1), shape[1:-1]
        first, last = tracker.shapes.likeness(shape[2:]), tracker.shapes.likeness(grid)
        if first > last:
            raise _channels_first(shape)
        # Rows and columns are axes of their own, whose order needs no check. Channels may look like either.
        if first == last and any(first[:2]) and grid not in _ordered.get(layer, ()):
            unchecked["grid"] = grid
        return maps
    tokens = shape[1]
    grid = tracker.grid(tokens, shape[2]) if grid is None else grid
    if not fits(tokens, grid, PREFIX_LIMIT):
        raise ValueError(
            f"{tokens} tokens do not fit the grid {grid}; expected the tokens of the grid and fewer than "
            f"{max(PREFIX_LIMIT, *grid)} in front. Pass another grid, or to_map and from_map."
        )
    maps = output[:, tokens - prod(grid) :].movedim(-1, 1)
    maps = maps.reshape(*maps.shape[:2], *grid)
    if prod(grid) > 1 and grid not in _ordered.get(layer, ()):
        unchecked["grid"] = grid
    return maps


def _from_map(view: Tensor, output: Any) -> Any:
    if isinstance(output, Mapping):
        changed: Any = copy(output)
        name = next(iter(output))
        changed[name] = _from_map(view, output[name])
        return changed
    if isinstance(output, (tuple, list)):
        parts = [_from_map(view, output[0]), *output[1:]]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    if output.dim() > 3:
        return view.movedim(1, -1)
    tokens = view.flatten(2).movedim(1, -1)
    return torch.cat([output[:, : output.shape[1] - tokens.shape[1]], tokens], dim=1)


@contextmanager
def layer_run(layer: Module, run: int, *, of: int) -> Iterator[Module]:
    r"""Provides a module to explain in place of one run of a layer that runs several times in a forward pass.

    Hooks, and therefore all layer attributions, see only the last run of a layer. Inside the ``with`` block, the output
    of the chosen run passes through the yielded module, whose activations and gradients are those of that run.

    To explain all runs, explain each of them, in one ``with`` statement or one after the other, and add up the
    attributions. The sum is defined if the maps of all runs have the same shape. If each run takes its own input, as in
    a Siamese network, pass the attributions of the runs, in the order of the inputs, to ``LayerFusionCam`` as
    ``gradient_attributions`` and ``region_attributions``.

    Args:
        layer (torch.nn.Module): The layer, such as the encoder of a Siamese network. Its output is (N, C, \*s).
        run (int): The index of the run in a forward pass, from 0.
        of (int): The number of runs in a forward pass.

    Yields:
        *torch.nn.Module* to pass as ``layer``.

    Raises:
        ValueError: If ``run`` is not below ``of``.
        RuntimeError: If the layer does not run ``of`` times in each pass. The error is raised at the end of the pass,
            or, if no module that contains the layer is called, at the end of the block.

    Examples::

        >>> import torch
        >>> from captum.attr import LayerGradCam
        >>> encoder = torch.nn.Conv2d(3, 4, 3)
        >>> def similarity(first, second):
        ...     return (encoder(first) * encoder(second)).sum((1, 2, 3))
        >>> first, second = torch.rand(2, 1, 3, 8, 8)
        >>> with layer_run(encoder, 0, of=2) as layer:
        ...     LayerGradCam(similarity, layer).attribute(first, additional_forward_args=second).shape
        torch.Size([1, 1, 6, 6])
    """
    if not 0 <= run < of:
        raise ValueError(f"run is {run} of {of} runs; expected an index from 0 to {of - 1}")
    module, runs, ran = Identity(), 0, False

    def hook(_: Module, __: tuple[Any, ...], output: Any) -> Any:
        nonlocal runs, ran
        if output is None:
            # A pass that failed in the layer: the next one begins again.
            runs = 0
            return None
        if torch._C._current_graph_task_id() != -1:
            # A backward pass that runs a checkpointed segment again.
            return None
        runs, ran = runs + 1, True
        return module(output) if (runs - 1) % of == run else None

    def end(model: Module, *_: Any) -> None:
        """At the end of a pass of a model that holds the layer, all of its runs are over."""
        nonlocal runs
        if model is not layer and any(part is layer for part in model.modules()):
            ended, runs = runs, 0
            if ended != of:
                raise _wrong_runs(layer, ended, of)

    with layer.register_forward_hook(hook, always_call=True), TokenGridTracker().collected(end):
        yield module
    if not ran or runs % of:
        raise _wrong_runs(layer, runs, of)


def _wrong_runs(layer: Module, runs: int, of: int) -> RuntimeError:
    return RuntimeError(
        f"The {type(layer).__name__} ran {runs} times; expected {of} runs in each forward pass of the model inside the "
        "with block"
    )


class PackedError(Exception):
    """Raised if Captum's hooks cannot see the layer's tensor: it is inside a container, or passed by keyword."""


def replace_only_tensor(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The value with its only tensor, in nested containers too, replaced; each container keeps its type."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        changed: Any = copy(value)
        for name, part in value.items():
            if tensors_in(part):
                changed[name] = replace_only_tensor(part, function)
        return changed
    if isinstance(value, (list, tuple)):
        parts = [replace_only_tensor(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


@contextmanager
def unpacked(layer: Module, layer_input: bool) -> Iterator[Module]:
    """Provides a module through which the only tensor of a layer's output, or input, passes."""
    module = Identity()
    if layer_input:
        handle = layer.register_forward_pre_hook(
            lambda _, args, kwargs: replace_only_tensor((args, kwargs), module), with_kwargs=True
        )
    else:
        handle = layer.register_forward_hook(lambda _, __, output: replace_only_tensor(output, module))
    with handle:
        yield module
