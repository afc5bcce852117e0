"""The attribution classes, one file each.

``METHODS`` lists the methods; the command, the benchmark and the tests take them from there. ``GradientCam`` and
``MaskedCam`` are bases for further methods. ``FusedAttributions``, ``AugmentationTunnel`` and ``SESS`` wrap other
attributions. ``LayerLeGrad`` needs the classifier of a transformer. ``LayerFeatureFactorization`` finds concepts rather
than the map of a target.
"""

from captum.attr import Attribution

from captum_fusion.attr.ablation_cam import LayerAblationCam
from captum_fusion.attr.augmentation_tunnel import AugmentationTunnel
from captum_fusion.attr.eigen_cam import LayerEigenCam
from captum_fusion.attr.eigen_grad_cam import LayerEigenGradCam
from captum_fusion.attr.feature_factorization import Concepts, LayerFeatureFactorization
from captum_fusion.attr.fem import LayerFEM
from captum_fusion.attr.finer_cam import LayerFinerCam
from captum_fusion.attr.full_grad import FullGrad
from captum_fusion.attr.fused_attributions import FusedAttributions
from captum_fusion.attr.fusion_cam import FusionCamStages, LayerFusionCam
from captum_fusion.attr.grad_cam_element_wise import LayerGradCamElementWise
from captum_fusion.attr.grad_cam_plus_plus import LayerGradCamPlusPlus
from captum_fusion.attr.gradient_cam import GradientCam
from captum_fusion.attr.group_cam import LayerGroupCam
from captum_fusion.attr.hi_res_cam import LayerHiResCam
from captum_fusion.attr.is_cam import LayerISCam
from captum_fusion.attr.kpca_cam import LayerKPCACam
from captum_fusion.attr.layer_cam import LayerLayerCam
from captum_fusion.attr.le_grad import LayerLeGrad
from captum_fusion.attr.masked_cam import MaskedCam
from captum_fusion.attr.rise import Rise
from captum_fusion.attr.score_cam import LayerScoreCam
from captum_fusion.attr.seg_eigen_cam import LayerSegEigenCam
from captum_fusion.attr.sess import SESS
from captum_fusion.attr.shapley_cam import LayerShapleyCam
from captum_fusion.attr.ss_cam import LayerSSCam
from captum_fusion.attr.union_cam import LayerUnionCam
from captum_fusion.attr.winsor_cam import WinsorCam
from captum_fusion.attr.x_grad_cam import LayerXGradCam

METHODS: tuple[type[Attribution], ...] = (
    FullGrad,
    LayerAblationCam,
    LayerEigenCam,
    LayerEigenGradCam,
    LayerFEM,
    LayerFinerCam,
    LayerFusionCam,
    LayerGradCamElementWise,
    LayerGradCamPlusPlus,
    LayerGroupCam,
    LayerHiResCam,
    LayerISCam,
    LayerKPCACam,
    LayerLayerCam,
    LayerSSCam,
    LayerScoreCam,
    LayerSegEigenCam,
    LayerShapleyCam,
    LayerUnionCam,
    LayerXGradCam,
    Rise,
    WinsorCam,
)

__all__ = [
    "SESS",
    "AugmentationTunnel",
    "Concepts",
    "FullGrad",
    "FusedAttributions",
    "FusionCamStages",
    "GradientCam",
    "LayerAblationCam",
    "LayerEigenCam",
    "LayerEigenGradCam",
    "LayerFEM",
    "LayerFeatureFactorization",
    "LayerFinerCam",
    "LayerFusionCam",
    "LayerGradCamElementWise",
    "LayerGradCamPlusPlus",
    "LayerGroupCam",
    "LayerHiResCam",
    "LayerISCam",
    "LayerKPCACam",
    "LayerLayerCam",
    "LayerLeGrad",
    "LayerSSCam",
    "LayerScoreCam",
    "LayerSegEigenCam",
    "LayerShapleyCam",
    "LayerUnionCam",
    "LayerXGradCam",
    "MaskedCam",
    "Rise",
    "WinsorCam",
]
