"""The attribution classes that tests run for: all that are registered, or one for each path through the engine."""

from inspect import signature
from typing import Any

from captum.attr import Attribution, GradientAttribution, LayerAttribution
from torch import Tensor, nn

from captum_fusion import attr


class LayerSSCam(attr.LayerSSCam):
    """SS-CAM with few samples, since the small networks of the tests need no more."""

    def __init__(self, forward_func: Any, layer: Any, device_ids: list[int] | None = None) -> None:
        super().__init__(forward_func, layer, device_ids, samples=2)


class LayerISCam(attr.LayerISCam):
    """IS-CAM with few samples."""

    def __init__(self, forward_func: Any, layer: Any, device_ids: list[int] | None = None) -> None:
        super().__init__(forward_func, layer, device_ids, samples=2)


class LayerScoreCamWithinTolerance(attr.LayerScoreCam):
    """Score-CAM that infers some of its scores."""

    def __init__(self, forward_func: Any, layer: Any, device_ids: list[int] | None = None) -> None:
        super().__init__(forward_func, layer, device_ids, tolerance=0.1)


class Rise(attr.Rise):
    """RISE with few masks, which has no layer."""

    def __init__(self, forward_func: Any, layer: Any, device_ids: list[int] | None = None) -> None:  # noqa: ARG002
        super().__init__(forward_func, samples=5)


class FusedAttributions(attr.FusedAttributions):
    """The mean of a gradient method's map and a masked one's."""

    def __init__(self, forward_func: Any, layer: Any, device_ids: list[int] | None = None) -> None:
        super().__init__([m(forward_func, layer, device_ids) for m in (attr.LayerXGradCam, attr.LayerScoreCam)])


class AugmentationTunnel(attr.AugmentationTunnel):
    """The mean of a gradient method over an image, its mirror image, and both at other contrasts."""

    def __init__(self, forward_func: Any, layer: Any, device_ids: list[int] | None = None) -> None:
        super().__init__(attr.LayerXGradCam(forward_func, layer, device_ids))


METHODS: list[type[LayerAttribution]] = [
    method
    for method in (globals().get(method.__name__, method) for method in attr.METHODS)
    if issubclass(method, LayerAttribution)
]

# What cuts across methods is tested on one method for each path: gradients that weight channels, and pixels; no
# gradients; another function than the target's score; masks of channels, some of them inferred, or sampled; channels
# left out; masks of groups; a choice between two maps; and two maps fused.
LAYER_PATHS: list[type[LayerAttribution]] = [
    attr.LayerGradCamPlusPlus,
    attr.LayerHiResCam,
    attr.LayerEigenCam,
    attr.LayerFinerCam,
    attr.LayerScoreCam,
    LayerScoreCamWithinTolerance,
    LayerSSCam,
    attr.LayerAblationCam,
    attr.LayerGroupCam,
    attr.LayerUnionCam,
    attr.LayerFusionCam,
]
# The engine is tested on one method for each kind of pass: gradients, masks of channels, and masks of fused maps; what
# concerns the layer's runs, on one that leaves channels out as well.
KINDS: list[type[LayerAttribution]] = [attr.LayerGradCamPlusPlus, attr.LayerScoreCam, attr.LayerFusionCam]
LAYER_KINDS: list[type[LayerAttribution]] = [*KINDS, attr.LayerAblationCam]
# These have no layer of their own.
PATHS: list[Any] = [*LAYER_PATHS, Rise, FusedAttributions, AugmentationTunnel]
# One method for each kind of pass, and for each class that holds other attributions or no layer.
FEW: list[Any] = [*KINDS, Rise, FusedAttributions, AugmentationTunnel]
# They interpolate, each on its own, and have the input's shape.
AT_INPUT_SIZE: list[type[LayerAttribution]] = [attr.LayerGroupCam, attr.LayerUnionCam, attr.LayerFusionCam]


def run(subject: Any, forward_func: Any, layer: nn.Module, images: Tensor, **options: Any) -> Any:
    """The attributions of a method, or a metric of the images as attributions of their own.

    An activation is a setting of some methods; the others compare raw scores.
    """
    if not isinstance(subject, type):
        return subject(forward_func, images, images, **options)
    setting = {name: options.pop(name) for name in ("activation",) if name in options}
    settings = setting if "activation" in signature(subject).parameters else {}
    return subject(forward_func, layer, **settings).attribute(images, **options)


def takes(algorithm: type[Attribution], argument: str) -> bool:
    return argument in signature(algorithm.attribute).parameters


def accepted(attribution: Attribution, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the attribution, or the one inside a tunnel, takes: no baselines where nothing is masked."""
    method = getattr(attribution, "attribution_method", attribution)
    return {name: value for name, value in arguments.items() if takes(type(method), name)}


def keeps_the_graph(algorithm: type[Attribution]) -> bool:
    """Whether it is differentiable as ``LayerGradCam`` is: a gradient method at the layer's resolution."""
    uses_gradients = getattr(algorithm, "uses_gradients", issubclass(algorithm, GradientAttribution))
    return uses_gradients and not has_input_shape(algorithm)


def has_input_shape(algorithm: type[Attribution]) -> bool:
    """Whether the attribution has the input's shape, and not the layer's."""
    return algorithm in (*AT_INPUT_SIZE, Rise, FusedAttributions)


def at_input_size(attributions: Tensor, inputs: Tensor) -> Tensor:
    """Attributions in the input's shape, as Captum's metrics and its visualization take them."""
    return LayerAttribution.interpolate(attributions, inputs.shape[2:], "bilinear").expand_as(inputs)
