"""Feature-map views of layers whose output is not (N, C, *s)."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Conv1d, Conv2d, Conv3d, Identity, Module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

Grid = tuple[int, ...]
ToMap = Callable[[Any], Tensor]
FromMap = Callable[[Tensor, Any], Any]

# Where the grid is known, so many tokens are too many in front: class and register tokens are at most 8.
_REGISTERS = 9


class ViewHook:
    """A forward hook that passes a layer's output through an identity on its feature-map view."""

    def __init__(self, to_map: ToMap, from_map: FromMap) -> None:
        self.to_map = to_map
        self.from_map = from_map
        self.module = Identity()
        self.ran = False

    def __call__(self, _: Module, __: tuple[Any, ...], output: Any) -> Any:
        self.ran = True
        return self.from_map(self.module(self.to_map(output)), output)


class _Shapes:
    """The shapes from which the grid of tokens follows: of the images taken in, and of what convolutions gave."""

    def __init__(self) -> None:
        self.images: dict[int, set[Grid]] = {}
        self.convolved: set[Grid] = set()
        self.sequences: set[tuple[int, ...]] = set()

    def grids(self, tokens: int, channels: int) -> set[Grid]:
        """Each grid that so many tokens may have, with others in front.

        That of a convolution, which is how most networks cut patches, is exact whatever its stride and padding.
        Otherwise a whole number divides the image, or divides it with rounding and without any token in front.
        """
        if (tokens, channels) in self.sequences:  # (N, C, T)
            return set()
        convolved = {grid for grid in self.convolved if prod(grid) > 1 and _fits(tokens, grid, _REGISTERS)}
        exact = convolved or {grid for grid in self._divided(exactly=True) if _fits(tokens, grid)}
        if exact:
            return exact
        rounded = {grid for grid in self._divided() if _fits(tokens, grid)}
        return rounded if any(prod(grid) == tokens for grid in rounded) else set()

    def has_map(self, grid: Grid) -> bool:
        """Whether a feature map of the image may have this grid: no finer one than convolutions gave, if any did."""
        finest = max(map(prod, self.convolved), default=prod(grid))
        divided = prod(grid) <= finest and any(grid[-2:] == divided[-2:] for divided in self._divided())
        return divided or grid in self.convolved

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

    A pass is one call from outside all modules. Where a function calls the parts of a network one by one, and that one
    took no image in, all calls since the layer last ran count.
    """

    def __init__(self) -> None:
        self._depth = 0
        # Whether no module with weights has run, so that what modules take in may be the image.
        self._raw = True
        self._call = _Shapes()
        self._calls = _Shapes()
        self._done = False

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Collects inside the ``with``."""
        hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def grids(self, tokens: int, channels: int) -> set[Grid]:
        """Each grid that so many tokens of a layer that runs now may have."""
        self._done = True
        return self._call.grids(tokens, channels) or self._calls.grids(tokens, channels)

    def convolved(self, tokens: int) -> bool:
        """Whether a convolution of this pass gave so many tokens, but for some in front."""
        return any(_fits(tokens, grid, _REGISTERS) for grid in self._call.convolved)

    def has_map(self, grid: Grid) -> bool:
        """Whether a feature map of this pass may have this grid."""
        return self._call.has_map(grid)

    def grid(self, tokens: int, channels: int) -> Grid:
        """The one grid of so many tokens."""
        grids = self.grids(tokens, channels)
        if len(grids) == 1:
            return grids.pop()
        sizes = set().union(*(self._call.images or self._calls.images).values())
        raise ValueError(
            f"The grid of {tokens} tokens "
            + (f"may be {_any_of(grids)}" if grids else "does not follow from the input")
            + (f" of {_any_of(sizes)}" if sizes else "")
            + "; expected the grid, as in spatial_view(layer, grid=(8, 10)) for an image, grid=(4, 8, 10) for a volume "
            f"or a video and grid=({tokens},) for a sequence, or to_map and from_map"
        )

    def _enter(self, _: Module, args: tuple[Any, ...]) -> None:
        if self._depth == 0:
            self._call, self._raw = _Shapes(), True
            if self._done:
                self._calls, self._done = _Shapes(), False
        for value in args if self._raw else ():
            if isinstance(value, Tensor) and 4 <= value.dim() <= 5:
                channels, size = value.shape[1], tuple(value.shape[2:])
                # Further in, an image that was resized has as many channels as it had.
                if self._depth == 0 or channels in self._call.images:
                    for shapes in (self._call, self._calls):
                        shapes.images.setdefault(channels, set()).add(size)
        self._depth += 1

    def _leave(self, module: Module, _: tuple[Any, ...], output: Any) -> None:
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


def _fits(tokens: int, grid: Grid, in_front: int = 0) -> bool:
    """Whether so many tokens hold a grid and fewer others in front than its longest side has, or than allowed."""
    return min(grid) > 0 and 0 <= tokens - prod(grid) < max(in_front, *grid)


@contextmanager
def spatial_view(
    layer: Module,
    grid: Grid | None = None,
    *,
    to_map: ToMap | None = None,
    from_map: FromMap | None = None,
) -> Iterator[Module]:
    r"""Gives a module to explain in place of a layer that outputs tokens or channels-last maps.

    Inside the ``with``, the layer's output passes through an identity on its view of shape (N, C, \*s), so that the
    activations and gradients of the yielded module are the layer's own. Every layer attribution takes it, Captum's
    included. The network computes what it did before, bit for bit, and nothing remains after the ``with``.

    Without ``to_map`` and ``from_map``, an output of three dimensions is tokens (N, T, C), those of the grid in row
    order after any class or register tokens, which the view leaves out (ViT, DeiT); an output of four or five is a
    channels-last map (N, \*s, C) (Swin, the inside of ConvNeXt blocks). Of a tuple, the first entry is viewed.

    Args:
        layer (torch.nn.Module): The layer to view. Where only a part of the tokens reaches the model's output, as after
            the last attention of a ViT, all others have no gradient: choose an earlier layer, such as the
            normalization before the last attention.
        grid (tuple[int, ...], optional): The spatial shape s of the tokens, one to three axes. Default: None, which
            means the one grid that follows from the convolution that cuts the input into patches, or from the shape of
            the input
        to_map (Callable, optional): Takes the layer's output and gives its view, (N, C, \*s). Default: None
        from_map (Callable, optional): Takes such a view and the layer's output, and gives an output that holds the
            view's values. Given together with ``to_map``. Default: None

    Yields:
        *torch.nn.Module* to pass as ``layer``.

    Raises:
        ValueError: If only one of ``to_map`` and ``from_map`` is given, if the layer is viewed already, or, when the
            layer runs, if its output has no such view, if it does not hold as many tokens as the grid, or if no grid
            was given and none or several follow from the input.
        RuntimeError: On leaving, if the layer never ran.

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
            f"The viewed {type(layer).__name__} never ran; expected a forward pass of the model that holds it inside "
            "the with"
        )


@contextmanager
def attach_view(
    layer: Module, grid: Grid | None = None, to_map: ToMap | None = None, from_map: FromMap | None = None
) -> Iterator[ViewHook]:
    """As ``spatial_view``, for a layer that need not run."""
    if (to_map is None) != (from_map is None):
        raise ValueError("One of to_map and from_map was given; expected both or neither")
    if grid is not None and (to_map is not None or not 1 <= len(grid) <= 3 or min(grid) < 1):
        raise ValueError(
            f"grid is {grid}; expected one to three positive numbers for a layer of tokens, and none beside to_map"
        )
    if any(isinstance(hook, ViewHook) for hook in layer._forward_hooks.values()):
        raise ValueError(f"There is a view of this {type(layer).__name__} already; expected one at a time")
    shapes = TokenGridTracker()
    view = ViewHook(
        to_map or (lambda output: _to_map(output, grid, shapes)),
        from_map or _from_map,
    )
    handle = layer.register_forward_hook(view)
    try:
        with shapes.collected() if grid is None and to_map is None else nullcontext():
            yield view
    finally:
        handle.remove()


def unwrap(output: Any) -> Any:
    """The first entry of a tuple, or anything else as it is."""
    return output[0] if type(output) in (tuple, list) and output else output


def _to_map(output: Any, grid: Grid | None, shapes: TokenGridTracker) -> Tensor:
    output = unwrap(output)
    if not isinstance(output, Tensor) or not 3 <= output.dim() <= 5:
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"The viewed layer gave {given}; expected tokens (N, T, C) or a channels-last map (N, *s, C) of two or "
            "three spatial axes. Give to_map and from_map for any other output."
        )
    if output.dim() > 3:
        if grid is not None:
            raise ValueError(f"grid is {grid}, but the viewed layer gave a map {tuple(output.shape)}; expected None")
        return output.movedim(-1, 1)
    tokens = output.shape[1]
    shape = shapes.grid(tokens, output.shape[2]) if grid is None else grid
    if not _fits(tokens, shape, _REGISTERS):
        raise ValueError(
            f"{tokens} tokens do not fit the grid {shape}; expected those of the grid and fewer than "
            f"{max(_REGISTERS, *shape)} in front. Give the grid, or to_map and from_map."
        )
    maps = output[:, tokens - prod(shape) :].movedim(-1, 1)
    return maps.reshape(*maps.shape[:2], *shape)


def _from_map(attach_view: Tensor, output: Any) -> Any:
    if type(output) in (tuple, list):
        return type(output)([_from_map(attach_view, output[0]), *output[1:]])
    if output.dim() > 3:
        return attach_view.movedim(1, -1)
    tokens = attach_view.flatten(2).movedim(1, -1)
    return torch.cat([output[:, : output.shape[1] - tokens.shape[1]], tokens], dim=1)
