"""Fusion-CAM, Score-CAM and the other class activation maps of their comparison as Captum attributions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_fusion._views import spatial_view
    from captum_fusion.attr.fusion_cam import FusionCamStages, LayerFusionCam
    from captum_fusion.attr.grad_cam_plus_plus import LayerGradCamPlusPlus
    from captum_fusion.attr.group_cam import LayerGroupCam
    from captum_fusion.attr.score_cam import LayerScoreCam
    from captum_fusion.attr.union_cam import LayerUnionCam
    from captum_fusion.attr.x_grad_cam import LayerXGradCam

__all__ = [
    "FusionCamStages",
    "LayerFusionCam",
    "LayerGradCamPlusPlus",
    "LayerGroupCam",
    "LayerScoreCam",
    "LayerUnionCam",
    "LayerXGradCam",
    "spatial_view",
]
_HOMES = {
    "FusionCamStages": "attr.fusion_cam",
    "LayerFusionCam": "attr.fusion_cam",
    "LayerGradCamPlusPlus": "attr.grad_cam_plus_plus",
    "LayerGroupCam": "attr.group_cam",
    "LayerScoreCam": "attr.score_cam",
    "LayerUnionCam": "attr.union_cam",
    "LayerXGradCam": "attr.x_grad_cam",
    "spatial_view": "_views",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for, so that the command can be interrupted while torch is imported."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
