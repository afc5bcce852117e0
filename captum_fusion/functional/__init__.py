r"""The equations of the papers as pure tensor functions.

A map is a tensor of shape (N, 1, \*S): N examples, one channel, 1 to 3 spatial axes S. A layer's activations A and
gradients g have the shape (N, C, \*s). Every function except ``non_negative_factors`` treats each example on its own.
All compute and return float32 or wider, whatever the precision of their arguments. Symbols are those of Fusion-CAM
(https://arxiv.org/abs/2603.05386).
"""

from captum_fusion.functional._numerics import as_float, full_precision, rounding
from captum_fusion.functional.components import (
    fem_maps,
    kernel_principal_component,
    non_negative_factors,
    principal_component,
    seg_eigen_maps,
)
from captum_fusion.functional.fusion import (
    MAP_FUSIONS,
    MapFusion,
    combine,
    contribution,
    contribution_weights,
    denoised_gradient_map,
    fuse,
    fuse_maps,
    sess_map,
)
from captum_fusion.functional.gradients import (
    element_wise_weights,
    finer_scores,
    full_grad_map,
    grad_cam_plus_plus_weights,
    grad_cam_weights,
    group_maps,
    implicit_bias,
    layer_cam_weights,
    le_grad_map,
    rest_scores,
    shapley_gradients,
    winsorized_weights,
    x_grad_cam_weights,
)
from captum_fusion.functional.maps import (
    denoise,
    gaussian_blur,
    normalize,
    percentile_threshold,
    upsample,
    weighted,
    weighted_sum,
)
from captum_fusion.functional.masks import ablation_weights, impute, integration_masks, random_masks
from captum_fusion.functional.measures import adcc, arcc, correlation, rank_correlation

__all__ = [
    "MAP_FUSIONS",
    "MapFusion",
    "ablation_weights",
    "adcc",
    "arcc",
    "as_float",
    "combine",
    "contribution",
    "contribution_weights",
    "correlation",
    "denoise",
    "denoised_gradient_map",
    "element_wise_weights",
    "fem_maps",
    "finer_scores",
    "full_grad_map",
    "full_precision",
    "fuse",
    "fuse_maps",
    "gaussian_blur",
    "grad_cam_plus_plus_weights",
    "grad_cam_weights",
    "group_maps",
    "implicit_bias",
    "impute",
    "integration_masks",
    "kernel_principal_component",
    "layer_cam_weights",
    "le_grad_map",
    "non_negative_factors",
    "normalize",
    "percentile_threshold",
    "principal_component",
    "random_masks",
    "rank_correlation",
    "rest_scores",
    "rounding",
    "seg_eigen_maps",
    "sess_map",
    "shapley_gradients",
    "upsample",
    "weighted",
    "weighted_sum",
    "winsorized_weights",
    "x_grad_cam_weights",
]
