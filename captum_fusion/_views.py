"""Feature-map views of layers whose output is not (N, C, *s)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Identity, Module

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


@contextmanager
def spatial_view(
    layer: Module,
    grid: tuple[int, ...] | None = None,
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
            means the largest square, with fewer tokens in front of it than it has in a row
        to_map (Callable, optional): Takes the layer's output and gives its view, (N, C, \*s). Default: None
        from_map (Callable, optional): Takes such a view and the layer's output, and gives an output that holds the
            view's values. Given together with ``to_map``. Default: None

    Yields:
        *torch.nn.Module* to pass as ``layer``.

    Raises:
        ValueError: If only one of ``to_map`` and ``from_map`` is given, if the layer is viewed already, or, when the
            layer runs, if its output has no such view or does not hold as many tokens as the grid.
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
    view = _View(
        to_map or (lambda output: _to_map(output, grid)),
        from_map or (lambda viewed, output: _from_map(viewed, output)),
    )
    handle = layer.register_forward_hook(view)
    try:
        yield view.module
    finally:
        handle.remove()
    if not view.ran:
        raise RuntimeError(
            f"The viewed {type(layer).__name__} never ran; expected a forward pass of the model that holds it inside "
            "the with"
        )


def _to_map(output: Any, grid: tuple[int, ...] | None) -> Tensor:
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
    shape = (isqrt(tokens),) * 2 if grid is None else grid
    in_front = tokens - prod(shape)
    if not 0 <= in_front < max(shape):
        raise ValueError(
            f"{tokens} tokens do not fit "
            + ("a square grid" if grid is None else f"the grid {grid}")
            + f"; expected those of the grid and fewer than {max(shape)} in front. Give the grid, or to_map and "
            "from_map."
        )
    maps = output[:, in_front:].movedim(-1, 1)
    return maps.reshape(*maps.shape[:2], *shape)


def _from_map(viewed: Tensor, output: Tensor) -> Tensor:
    if output.dim() > 3:
        return viewed.movedim(1, -1)
    tokens = viewed.flatten(2).movedim(1, -1)
    return torch.cat([output[:, : output.shape[1] - tokens.shape[1]], tokens], dim=1)
