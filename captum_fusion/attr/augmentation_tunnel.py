"""Attributions averaged over flips and scales of the input."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from inspect import signature
from itertools import product
from typing import Any, cast

from captum.attr import Attribution
from torch import Tensor
from torchvision.transforms.v2.functional import horizontal_flip
from torchvision.tv_tensors import BoundingBoxes

from captum_fusion._engine.call import checked_inputs
from captum_fusion._engine.captum import TensorOrTupleOfTensorsGeneric, logged
from captum_fusion._engine.component import check_component
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.guards import check_channel_dim, check_channels_first
from captum_fusion._engine.state import preserved
from captum_fusion._engine.token_grid import channels_back, channels_first
from captum_fusion.targets import mirrored


@fill_docstring
class AugmentationTunnel(Attribution):
    r"""Averages the attributions of any method over mirror images and scaled values of the input.

    The average depends less on the side on which an object lies and on the exposure of the image. This is
    pytorch-grad-cam's "aug smooth" for any attribution of Captum or of this package, in the form of
    ``captum.attr.NoiseTunnel``. In symbols, for the method E, the mirror image F x along the last axis and factors c:

    .. math::

        \frac{\mathrm{mean}_c(E(c x) + F E(c F x))}{2}

    Args:
        attribution_method (Attribution): Any attribution of Captum or of this package.

    Raises:
        TypeError: If the method is not an attribution.
    """

    def __init__(self, attribution_method: Attribution) -> None:
        check_component("attribution_method", attribution_method, None)
        super().__init__(attribution_method.forward_func)
        self.attribution_method = attribution_method

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether the wrapped method multiplies by the inputs."""
        return bool(self.attribution_method.multiplies_by_inputs)

    @logged
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        *,
        flip: bool = True,
        factors: Sequence[float] = (0.9, 1.0, 1.1),
        channel_dim: int = 1,
        **kwargs: Any,
    ) -> TensorOrTupleOfTensorsGeneric:
        r"""Computes the mean of the attributions.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs of the method. Floating-point inputs with one to three spatial
                axes, (N, C, \*S), are mirrored and scaled together. Other inputs with the same spatial axes, such as
                masks, are only mirrored. All others are passed unchanged.
            flip (bool, optional): Whether to also average over the mirror image along the last axis. Default: True
            factors (list[float], optional): The factors that multiply the values of the inputs, at least one.
                Default: (0.9, 1.0, 1.1)
            {channel_dim}
            kwargs (Any): The arguments of the method's own ``attribute``, such as ``target``. These are mirrored with
                the inputs: baselines, feature masks and additional tensors with the inputs' spatial axes; a target that
                is a pixel, (class, \*S), of an output with the input's orientation; and the region and the box of
                ``captum_fusion.targets``. If your own forward function depends on a position in the image, pass
                ``flip=False``.

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions** in the form that the method returns.

        Raises:
            ValueError: If there are no factors, if the method's attributions cannot be mirrored back because their axes
                differ from the inputs' axes, such as attributions of tokens, if the target has several indices but is
                not a pixel, or if an argument may be a map of another resolution.

        Examples::

            >>> import torch
            >>> from captum.attr import LayerGradCam
            >>> from torchvision.models import resnet18
            >>> model = resnet18(weights=None).eval()
            >>> smooth = AugmentationTunnel(LayerGradCam(model, model.layer4))
            >>> smooth.attribute(torch.rand(1, 3, 64, 64), target=281).shape
            torch.Size([1, 1, 2, 2])
        """
        if not len(factors):
            raise ValueError("factors is empty; expected at least one number")
        tensors = checked_inputs(inputs)
        is_tuple = isinstance(inputs, tuple)
        check_channel_dim(channel_dim, tensors)
        moved = [channels_first(tensor, channel_dim) for tensor in tensors if _is_spatial(tensor)]
        sizes = {tuple(tensor.shape[2:]) for tensor in moved}
        axes = {len(size) + 2 for size in sizes}
        for tensor in moved:
            check_channels_first(tuple(tensor.shape))
        kwargs |= channel_option(self.attribution_method, channel_dim)

        def mirror(tensor: Tensor, of_layer: bool = False) -> Tensor:
            """The mirror image, where the tensor has the spatial axes of an input, or is a layer's map."""
            first = channels_first(tensor, channel_dim)
            if tuple(first.shape[2:]) in sizes:
                return channels_back(first.flip(-1), channel_dim)
            if isinstance(tensor, BoundingBoxes):
                return cast(Tensor, horizontal_flip(tensor))
            # A mask may have no channels, and one that all examples share may have no other axis.
            shared = tensor.dim() > 1 and tuple(tensor.shape) in sizes
            if of_layer or shared or tuple(tensor.shape[1:]) in sizes:
                return tensor.flip(-1)
            if 4 <= tensor.dim() in axes and len(tensor) in (1, len(tensors[0])):
                raise ValueError(
                    f"An argument has shape {tuple(tensor.shape)}, which may or may not be a map of inputs of size "
                    f"{sorted(sizes)} at another resolution; expected one of their size. Bind any other tensor inside "
                    "forward_func, or pass flip=False."
                )
            return tensor

        total: tuple[Tensor, ...] | None = None
        with preserved(tensors) as state, state.tracking(self.forward_func):
            for factor, flipped in product(factors, (False, True)[: 1 + flip]):
                # Tensors of their own for each run, since a model may write into them.
                scaled = tuple(tensor * factor if _is_spatial(tensor) else tensor.clone() for tensor in tensors)
                runs = {name: _mirror_all(value, mirror, flipped) for name, value in kwargs.items() if name != "target"}
                if "target" in kwargs:
                    runs["target"] = _mirror_target(kwargs["target"], axes) if flipped else kwargs["target"]
                now = tuple(mirror(tensor) if flipped else tensor for tensor in scaled)
                with mirrored() if flipped else nullcontext():
                    attributions = self.attribution_method.attribute(now if is_tuple else now[0], **runs)
                parts = attributions if isinstance(attributions, tuple) else (attributions,)
                self._check(parts, is_tuple or not isinstance(attributions, tuple), axes)
                if flipped:
                    parts = tuple(mirror(part, of_layer=part.dim() > 2) for part in parts)
                total = parts if total is None else tuple(a + b for a, b in zip(total, parts, strict=True))
        count = len(factors) * (1 + flip)
        mean = tuple(part / count for part in cast(tuple[Tensor, ...], total))
        return cast(TensorOrTupleOfTensorsGeneric, mean if isinstance(attributions, tuple) else mean[0])

    def _check(self, parts: tuple[Any, ...], as_given: bool, axes: set[int]) -> None:
        """Refuses what cannot be mirrored back, and a tuple that holds more than attributions."""
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        if not as_given or not all(isinstance(p, Tensor) and (p.dim() in axes or p.dim() < 3) for p in parts):
            raise ValueError(
                f"{self.attribution_method.get_name()} returned {shapes}; expected attributions with as many axes as "
                f"the spatial inputs, {sorted(axes)}"
            )


def channel_option(method: Attribution | None, channel_dim: int) -> dict[str, Any]:
    """The option of the channels' axis, where a method or one that it wraps takes it."""
    if method is None or channel_dim == 1:
        return {}
    if "channel_dim" in signature(method.attribute).parameters:
        return {"channel_dim": channel_dim}
    return channel_option(getattr(method, "attribution_method", None), channel_dim)


def _is_spatial(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and 3 <= tensor.dim() <= 5


def _mirror_all(value: Any, mirror: Callable[[Tensor], Tensor], flipped: bool) -> Any:
    """Copies of the tensors in an argument, or their mirror images."""
    if type(value) in (tuple, list):
        return type(value)(_mirror_all(part, mirror, flipped) for part in value)
    if type(value) is dict:
        return {name: _mirror_all(part, mirror, flipped) for name, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    return mirror(value) if flipped else value.clone()


def _mirror_target(target: Any, axes: set[int]) -> Any:
    """The mirror image of a pixel, which counts its last index from the other end."""
    if isinstance(target, list):
        return [_mirror_target(each, axes) for each in target]
    if not isinstance(target, tuple) or len(target) < 2:
        return target
    if len(target) + 1 not in axes:
        raise ValueError(
            f"target is {target}, which may or may not be a pixel to mirror; expected a class, (class, *S) for a "
            "pixel, or flip=False"
        )
    return (*target[:-1], -1 - target[-1])
