"""The attribution methods, one file each: a method that is imported and listed here is known everywhere."""

from captum_fusion.attr.fusion_cam import LayerFusionCam
from captum_fusion.attr.grad_cam_plus_plus import LayerGradCamPlusPlus
from captum_fusion.attr.group_cam import LayerGroupCam
from captum_fusion.attr.score_cam import LayerScoreCam
from captum_fusion.attr.union_cam import LayerUnionCam
from captum_fusion.attr.x_grad_cam import LayerXGradCam

__all__ = [
    "LayerFusionCam",
    "LayerGradCamPlusPlus",
    "LayerGroupCam",
    "LayerScoreCam",
    "LayerUnionCam",
    "LayerXGradCam",
]
