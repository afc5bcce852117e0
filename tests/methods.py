"""Every attribution class, in a form that the small networks of the tests can take."""

from inspect import signature
from typing import Any

from captum.attr import Attribution, LayerAttribution
from torch.nn import Module

from captum_fusion import (
    LayerFusionCam,
    LayerGradCamPlusPlus,
    LayerGroupCam,
    LayerScoreCam,
    LayerUnionCam,
    LayerXGradCam,
)


class LayerGroupCamOfTwo(LayerGroupCam):
    """Group-CAM for layers with few channels."""

    def __init__(self, forward_func: Any, layer: Module, device_ids: list[int] | None = None) -> None:
        super().__init__(forward_func, layer, device_ids, groups=2)


LAYER_SHAPED: list[type[LayerAttribution]] = [LayerScoreCam, LayerGradCamPlusPlus, LayerXGradCam]
INPUT_SHAPED: list[type[LayerAttribution]] = [LayerFusionCam, LayerGroupCamOfTwo, LayerUnionCam]
METHODS = LAYER_SHAPED + INPUT_SHAPED


def accepted(attribution: Attribution, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the attribution takes: no baselines where nothing is masked."""
    return {name: value for name, value in arguments.items() if name in signature(attribution.attribute).parameters}
