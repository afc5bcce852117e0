"""Fusion-CAM, Score-CAM and the other class activation maps of their comparison as Captum attributions."""

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
