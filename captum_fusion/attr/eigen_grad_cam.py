"""Eigen-Grad-CAM."""

from torch import Tensor

from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion.attr.gradient_cam import GradientCam
from captum_fusion.functional import principal_component


@fill_docstring
class LayerEigenGradCam(GradientCam):
    r"""Computes Eigen-Grad-CAM for the chosen layer, which is Eigen-CAM of the activations times their gradients.

    The map is the first principal component of the products of activations and gradients. In symbols, for channels A_k,
    gradients g of the target's score and the direction v in which the pixels of B vary most:

    .. math::

        B_k &= g_k A_k \\
        L &= \sum_k v_k(B_k - \mathrm{mean}(B_k))

    The sign of a principal component is arbitrary. Here the component correlates positively with the sum of B_k, which
    is HiResCAM. No paper defines the method; it comes from pytorch-grad-cam, which leaves the sign arbitrary.

    Args:
        {layer_constructor}

    {layer_example}
    """

    def channel_maps(self, gradients: Tensor, activations: Tensor) -> Tensor:
        """See ``captum_fusion.functional.principal_component``."""
        return principal_component(gradients * activations)
