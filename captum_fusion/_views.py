"""Feature-map views of layers whose output is not (N, C, *s)."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Conv2d, Conv3d, Identity, Module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

Grid = tuple[int, ...]
ToMap = Callable[[Any], Tensor]
FromMap = Callable[[Tensor, Any], Any]


class _View:
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
    """The spatial shapes from which the grid of tokens follows: of the images taken in, and of what is convolved."""

    def __init__(self) -> None:
        self.images: list[tuple[int, Grid]] = []
        self.convolved: set[Grid] = set()

    def grids(self, tokens: int) -> set[Grid]:
        """Each grid that so many tokens may have, with others in front.

        That of a convolution, which is how most networks cut patches, is exact whatever its stride and padding.
        Otherwise a whole number divides the image, if need be rounded down or up.
        """
        patches = [(size, patch) for size in {size for _, size in self.images} for patch in range(1, max(size) + 1)]
        ways: list[Iterable[Grid]] = [
            self.convolved,
            (tuple(side // patch for side in size) for size, patch in patches if not any(s % patch for s in size)),
            (tuple((side + up) // patch for side in size) for size, patch in patches for up in (0, patch - 1)),
        ]
        for grids in ways:
            fitting = {grid for grid in grids if min(grid) and _fits(tokens, grid)}
            if fitting:
                return fitting
        return set()


class PassShapes(threading.local):
    """Collects the shapes of each forward pass, for each thread its own.

    A pass is one call from outside all modules. Where a function calls the parts of a network one by one, and that one
    took no image in, all calls since the layer last ran count.
    """

    def __init__(self) -> None:
        self._depth = 0
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

    def grid(self, tokens: int) -> Grid:
        """The grid of a layer that runs now and gives so many tokens."""
        self._done = True
        grids = self._call.grids(tokens) or self._calls.grids(tokens)
        if len(grids) == 1:
            return grids.pop()
        sizes = {size for _, size in self._call.images or self._calls.images}
        raise ValueError(
            f"The grid of {tokens} tokens "
            + (f"may be {_any_of(grids)}" if grids else "does not follow from the input")
            + (f" of {_any_of(sizes)}" if sizes else "")
            + "; expected the grid, as in spatial_view(layer, grid=(8, 10)) for an image, grid=(4, 8, 10) for a volume "
            f"or a video and grid=({tokens},) for a sequence, or to_map and from_map"
        )

    def _enter(self, _: Module, args: tuple[Any, ...]) -> None:
        if self._depth == 0:
            self._call = _Shapes()
            if self._done:
                self._calls, self._done = _Shapes(), False
        for value in args:
            if isinstance(value, Tensor) and 4 <= value.dim() <= 5:
                channels, size = value.shape[1], tuple(value.shape[2:])
                # Further in, attention has four dimensions too; an image that is resized keeps its channels.
                if self._depth == 0 or any(channels == known for known, _ in self._call.images):
                    self._call.images.append((channels, size))
                    self._calls.images.append((channels, size))
        self._depth += 1

    def _leave(self, module: Module, _: tuple[Any, ...], output: Any) -> None:
        self._depth -= 1
        if isinstance(module, (Conv2d, Conv3d)) and isinstance(output, Tensor):
            self._call.convolved.add(tuple(output.shape[2:]))
            self._calls.convolved.add(tuple(output.shape[2:]))


def _any_of(shapes: Iterable[Grid]) -> str:
    return " or ".join(map(str, sorted(shapes)))


def _fits(tokens: int, grid: Grid) -> bool:
    return 0 <= tokens - prod(grid) < max(grid)


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
    channels-last map (N, \*s, C) (Swin, the inside of ConvNeXt blocks).

    Args:
        layer (torch.nn.Module): The layer to view. Where only a part of the tokens reaches the model's output, as after
            the last attention of a ViT, all others have no gradient: choose an earlier layer, such as the
            normalization before the last attention.
        grid (tuple[int, ...], optional): The spatial shape s of the tokens, one to three axes. Default: None, which
            means the one grid that follows from the shape of the input or of the convolution that cuts it into patches,
            with fewer tokens in front of it than its longest side has
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
    if (to_map is None) != (from_map is None):
        raise ValueError("One of to_map and from_map was given; expected both or neither")
    if grid is not None and (to_map is not None or not 1 <= len(grid) <= 3 or min(grid) < 1):
        raise ValueError(
            f"grid is {grid}; expected one to three positive numbers for a layer of tokens, and none beside to_map"
        )
    if any(isinstance(hook, _View) for hook in layer._forward_hooks.values()):
        raise ValueError(f"There is a view of this {type(layer).__name__} already; expected one at a time")
    shapes = PassShapes()
    view = _View(
        to_map or (lambda output: _to_map(output, grid, shapes)),
        from_map or (lambda viewed, output: _from_map(viewed, output)),
    )
    handle = layer.register_forward_hook(view)
    try:
        with shapes.collected() if grid is None and to_map is None else nullcontext():
            yield view.module
    finally:
        handle.remove()
    if not view.ran:
        raise RuntimeError(
            f"The viewed {type(layer).__name__} never ran; expected a forward pass of the model that holds it inside "
            "the with"
        )


def _to_map(output: Any, grid: Grid | None, shapes: PassShapes) -> Tensor:
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
    shape = shapes.grid(tokens) if grid is None else grid
    if not _fits(tokens, shape):
        raise ValueError(
            f"{tokens} tokens do not fit the grid {shape}; expected those of the grid and fewer than {max(shape)} in "
            "front. Give the grid, or to_map and from_map."
        )
    maps = output[:, tokens - prod(shape) :].movedim(-1, 1)
    return maps.reshape(*maps.shape[:2], *shape)


def _from_map(viewed: Tensor, output: Tensor) -> Tensor:
    if output.dim() > 3:
        return viewed.movedim(1, -1)
    tokens = viewed.flatten(2).movedim(1, -1)
    return torch.cat([output[:, : output.shape[1] - tokens.shape[1]], tokens], dim=1)
