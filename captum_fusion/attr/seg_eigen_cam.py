"""Seg-Eigen-CAM."""

from torch import Tensor

from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion.attr.gradient_cam import GradientCam
from captum_fusion.functional import seg_eigen_maps


@fill_docstring
class LayerSegEigenCam(GradientCam):
    r"""Computes Seg-Eigen-CAM for the chosen layer: the first principal component of activations weighted by gradients.

    It is Eigen-CAM where the score is sensitive, for semantic segmentation first of all. In symbols, for channels A_k,
    gradients g of the target's score, and the direction v in which the pixels of B vary most:

    .. math::

        B_k &= |g_k| A_k \\
        L &= \sum_k v_k(B_k - \mathrm{mean}(B_k))

    The sign is such that the largest absolute value is positive, as in the paper. Eigen-Grad-CAM keeps the signs of the
    gradients, and takes the sign of the map from its correlation with the channels.

    More details can be found in the paper: https://doi.org/10.3390/app15137562

    Args:
        {layer_constructor}

    {layer_example}
    """

    def channel_maps(self, gradients: Tensor, activations: Tensor) -> Tensor:
        """See ``captum_fusion.functional.seg_eigen_maps``."""
        return seg_eigen_maps(gradients, activations)
