"""Fusion-CAM and Score-CAM as Captum attributions."""

from captum_fusion.attr.fusion_cam import FusionCamStages, LayerFusionCam
from captum_fusion.attr.score_cam import LayerScoreCam

__all__ = ["FusionCamStages", "LayerFusionCam", "LayerScoreCam"]
