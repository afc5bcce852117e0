"""The grid of a layer's tokens or map: inferred from the shapes of a forward pass, and checked by perturbed inputs."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from inspect import signature
from itertools import product
from math import ceil, log, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Conv1d, Conv2d, Conv3d, Module
from torch.nn.modules import module as module_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

Grid = tuple[int, ...]

# A known grid has fewer than this many tokens in front of it: class and register tokens are at most 8.
PREFIX_LIMIT = 9
# The rows of cells that are perturbed. Their first and last columns tell a shift by one token from a blurred peak,
# since a shifted row goes on at the other side of the map.
_PROBED_ROWS = 4
# Of 8 perturbed cells, tokens in order may miss one, as where a model's attention copies a patch elsewhere.
_MIN_HIT_RATE = 0.8


class _Shapes:
    """The shapes of images and of convolutions' outputs, from which the grid of tokens follows."""

    def __init__(self) -> None:
        self.images: dict[int, set[Grid]] = {}
        self.convolved: set[Grid] = set()
        self.sequences: set[tuple[int, ...]] = set()

    def grids(self, tokens: int, channels: int) -> set[Grid]:
        """The grids that this number of tokens may have, with further tokens in front.

        Most networks cut patches by a convolution, whose output is the grid whatever its stride and padding. Without
        one, a grid is the image's size divided by a whole number, either exactly, or rounded with no token in front.
        """
        if (tokens, channels) in self.sequences:  # (N, C, T)
            return set()
        convolved = {grid for grid in self.convolved if prod(grid) > 1 and fits(tokens, grid, PREFIX_LIMIT)}
        exact = convolved or {grid for grid in self._divided(exactly=True) if fits(tokens, grid)}
        if exact:
            return exact
        rounded = {grid for grid in self._divided() if fits(tokens, grid)}
        return rounded if any(prod(grid) == tokens for grid in rounded) else set()

    def has_map(self, grid: Grid) -> bool:
        """Tells whether a feature map of the image may have this grid, judged by its height and width."""
        return grid in self.convolved or any(grid[-2:] == divided[-2:] for divided in self._divided())

    def likeness(self, grid: Grid) -> tuple[bool, bool, float]:
        """Rates how much a grid looks like a feature map's: given by a convolution, and of the image's aspect ratio."""
        sizes = [size for sizes in self.images.values() for size in sizes]
        stretch = min((abs(log(grid[-2] * size[-1] / (grid[-1] * size[-2]))) for size in sizes), default=0.0)
        return grid in self.convolved, self.has_map(grid), -stretch

    def is_fine(self, grid: Grid) -> bool:
        """Tells whether a grid is finer than every convolution's output, as upsampled scores are."""
        return prod(grid) > max(map(prod, self.convolved), default=prod(grid))

    def _divided(self, exactly: bool = False) -> set[Grid]:
        return {grid for sizes in self.images.values() for size in sizes for grid in _divided(size, exactly)}


@lru_cache(maxsize=64)
def _divided(size: Grid, exactly: bool) -> set[Grid]:
    """A size divided by each whole number, rounded down and up, or only by those that divide it exactly."""
    return {
        tuple((side + up) // patch for side in size)
        for patch in range(1, max(size) + 1)
        for up in (0, patch - 1)
        if not exactly or not any(side % patch for side in size)
    }


class TokenGridTracker(threading.local):
    """Collects the shapes of each forward pass, for each thread its own.

    A pass is one call of a module from outside all modules. If a function calls the parts of a network one by one, and
    the part with the layer does not take the image, the shapes of all calls since the layer last ran count.
    """

    def __init__(self) -> None:
        self._depth = 0
        # Whether no module with weights has run, so that what modules take in may be the image.
        self._raw = True
        self._call = _Shapes()
        self._calls = _Shapes()
        self._done = False

    @contextmanager
    def collected(self, at_end: Callable[[Module, Any, Any], None] | None = None) -> Iterator[None]:
        """Collects inside the ``with``; at the end of each pass, calls a function of its module and arguments."""

        def leave(module: Module, args: Any, *kwargs_and_output: Any) -> None:
            self._leave(module, kwargs_and_output[-1])
            if at_end is not None and self._depth == 0 and kwargs_and_output[-1] is not None:
                at_end(module, args, kwargs_and_output[0] if len(kwargs_and_output) > 1 else {})

        # Releases of torch before 2.6 keep keyword arguments from global hooks.
        options = {"with_kwargs": True} if "with_kwargs" in signature(register_module_forward_hook).parameters else {}
        hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(leave, always_call=True, **options),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
                # torch forgets to remove this, which would slow each module of the process down from now on.
                getattr(module_hooks, "_global_forward_hooks_with_kwargs", {}).pop(hook.id, None)

    def grids(self, tokens: int, channels: int) -> set[Grid]:
        """The grids that this number of tokens may have, for a layer that runs now."""
        self._done = True
        return self._call.grids(tokens, channels) or self._calls.grids(tokens, channels)

    def convolved(self, tokens: int) -> bool:
        """Tells whether a convolution of this pass gave this number of tokens, apart from some in front."""
        return any(fits(tokens, grid, PREFIX_LIMIT) for grid in self._call.convolved)

    @property
    def shapes(self) -> _Shapes:
        """The shapes of the current pass."""
        return self._call

    def grid(self, tokens: int, channels: int) -> Grid:
        """The only grid that this number of tokens may have."""
        grids = self.grids(tokens, channels)
        if len(grids) == 1:
            return grids.pop()
        sizes = set().union(*(self._call.images or self._calls.images).values())
        raise ValueError(
            f"The grid of {tokens} tokens "
            + (f"may be {_any_of(grids)}" if grids else "cannot be inferred from the input")
            + (f" of {_any_of(sizes)}" if sizes else "")
            + "; pass the grid, as in spatial_view(layer, grid=(8, 10)) for an image, grid=(4, 8, 10) for a volume or "
            f"a video and grid=({tokens},) for a sequence, or pass to_map and from_map"
        )

    def _enter(self, _: Module, args: tuple[Any, ...]) -> None:
        if self._depth == 0:
            self._call, self._raw = _Shapes(), True
            if self._done:
                self._calls, self._done = _Shapes(), False
        for value in tensors_in(args) if self._raw else ():
            if 4 <= value.dim() <= 5:
                channels, *size = channels_first(value, channel_axis(value.shape)).shape[1:]
                # Further in, an image that was resized has as many channels as it had, and one that the network took
                # by keyword, which these hooks do not see, is the first there is.
                if self._depth == 0 or channels in self._call.images or not self._call.images:
                    for shapes in (self._call, self._calls):
                        shapes.images.setdefault(channels, set()).add(tuple(size))
        self._depth += 1

    def _leave(self, module: Module, output: Any) -> None:
        self._depth -= 1
        if next(module.parameters(recurse=False), None) is not None:
            self._raw = False
        if isinstance(module, (Conv1d, Conv2d, Conv3d)) and isinstance(output, Tensor):
            for shapes in (self._call, self._calls):
                if isinstance(module, Conv1d):
                    shapes.sequences.add(tuple(output.shape[1:]))
                else:
                    shapes.convolved.add(tuple(output.shape[2:]))


def _any_of(shapes: Iterable[Grid]) -> str:
    return " or ".join(map(str, sorted(shapes)))


def fits(tokens: int, grid: Grid, in_front: int = 0) -> bool:
    """Tells whether tokens are a grid with few others in front: fewer than ``in_front`` or than its longest side."""
    return min(grid) > 0 and 0 <= tokens - prod(grid) < max(in_front, *grid)


def channel_axis(shape: tuple[int, ...]) -> int:
    """Guesses the axis of an image's channels from its shape: 1, or the only other axis of length 1 or 3."""
    if len(shape) == 5 and shape[1] in (2, 4) and shape[2] == 3:
        # A video of few frames rather than a volume of three slices.
        return 2
    others = (2,) * (len(shape) == 5) + (-1,) * (len(shape) > 2)
    return next((axis for axis in others if shape[axis] in (1, 3) and shape[1] > 4), 1)


def channels_first(tensor: Tensor, channel_dim: int) -> Tensor:
    """The tensor with the axis of its channels as dimension 1, where it has that axis and spatial ones."""
    return tensor.movedim(channel_dim, 1) if has_channels(tensor, channel_dim) else tensor


def channels_back(tensor: Tensor, channel_dim: int) -> Tensor:
    """Undoes ``channels_first``."""
    return tensor.movedim(1, channel_dim) if has_channels(tensor, channel_dim) else tensor


def has_channels(tensor: Tensor, channel_dim: int) -> bool:
    """Tells whether a tensor has spatial axes and this axis of channels."""
    return tensor.dim() > 2 and channel_dim != 0 and -tensor.dim() < channel_dim < tensor.dim()


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def repeat_first_row(value: Any, rows: int, count: int) -> Any:
    """Repeats the first row ``count`` times in each tensor of ``rows`` rows, in nested containers too."""
    if isinstance(value, Tensor):
        return value[:1].repeat(count, *(1,) * (value.dim() - 1)) if value.dim() and len(value) == rows else value
    if isinstance(value, Mapping):
        return {name: repeat_first_row(part, rows, count) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [repeat_first_row(part, rows, count) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def probe_cells(grid: Grid) -> list[Grid]:
    """The cells to perturb: the first and the last cell of a few rows."""
    rows = sorted({round(i * (grid[-2] - 1) / (_PROBED_ROWS - 1)) for i in range(_PROBED_ROWS)}) if grid[1:] else []
    depths = [range(0, side, max(1, ceil(side / 2))) for side in grid[:-2]]
    columns = sorted({0, grid[-1] - 1}) if rows else sorted({i * (grid[-1] - 1) // 7 for i in range(8)})
    return list(product(*depths, *([rows] if rows else []), columns))


def perturb(images: Tensor, grid: Grid, cells: list[Grid]) -> None:
    """Inverts, in place, the pixels of one cell of the grid in each image but the last."""
    for image, cell in zip(images, cells, strict=False):
        pixels = (
            slice(None),
            *(
                slice(index * size // count, max(index * size // count + 1, (index + 1) * size // count))
                for index, count, size in zip(cell, grid, image.shape[1:], strict=True)
            ),
        )
        image[pixels] = image.mean() + (image.std(correction=0) or 1) - image[pixels]


def changes_where_perturbed(maps: Tensor, cells: list[Grid]) -> bool | None:
    r"""Tells whether a layer's map changes where the image was perturbed.

    Args:
        maps (Tensor): The maps of ``perturb``'s images, (P + 2, C, \*s); the last two are of the same image.
        cells (list[tuple[int, ...]]): The cell that was perturbed in each of the others.

    Returns:
        *bool*: False where the changes are sharp and lie elsewhere for more than a few cells, None where they are not
        sharp.
    """
    changes = (maps[:-2] - maps[-1:]).double().square().sum(dim=1)
    # In relation to how far a token changes on average, since some change most whatever is perturbed.
    average = changes.mean(dim=0)
    shares = changes / torch.where(average > 0, average, 1)
    # The receptive fields of overlapping windows may be centred one cell further.
    reach = [1 if side > 3 else 0 for side in changes.shape[1:]]
    hits = []
    # A patch that changes nothing is not in the map, so that another token has its place.
    complete = bool(shares.flatten(1).any(dim=1).all())
    for share, change, cell in zip(shares, changes, cells, strict=True):
        # A layer that mixes all tokens changes everywhere alike, which tells nothing about their order.
        if share.max() > len(cells) / 2:
            # All tokens of an attention's window may change by this cell alone, those most that hold it.
            peaks = share > 0.99 * share.max()
            peaks &= change >= change[peaks].max() / 2
            peaks |= change == change.max()
            near = tuple(slice(max(c - r, 0), c + r + 1) for c, r in zip(cell, reach, strict=True))
            hits.append(bool(peaks[near].any()))
    if len(hits) < len(cells) / 2:
        return None
    return complete and sum(hits) / len(hits) > _MIN_HIT_RATE


def differs_by_chance(maps: Tensor) -> bool:
    """Tells whether the last two maps, which are of the same image, differ as if a patch had been perturbed."""
    changes = (maps[:-1] - maps[-1:]).double().square().flatten(1).sum(dim=1)
    return bool(changes[-1] > changes[:-1].mean() / 10)
