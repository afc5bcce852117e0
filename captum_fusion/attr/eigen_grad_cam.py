"""Eigen-Grad-CAM."""

from torch import Tensor

from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion.attr.gradient_cam import GradientCam
from captum_fusion.functional import principal_component


@fill_docstring
class LayerEigenGradCam(GradientCam):
    r"""Computes Eigen-Grad-CAM for the chosen layer: Eigen-CAM of the activations by their gradients.

    The map is the first principal component of the activations by their gradients: Eigen-CAM of what raises the
    target's score. In symbols, for channels A_k, gradients g of that score and the direction v in which the pixels of B
    vary most:

    .. math::

        B_k &= g_k A_k \\
        L &= \sum_k v_k(B_k - \mathrm{mean}(B_k))

    A principal component has no sign of its own. This one's is such that it correlates with the sum of B_k, which is
    HiResCAM. No paper defines the method; it comes from pytorch-grad-cam, which leaves the sign to chance.

    Args:
        {layer_constructor}

    {layer_example}
    """

    def channel_maps(self, gradients: Tensor, activations: Tensor) -> Tensor:
        """See ``captum_fusion.functional.principal_component``."""
        return principal_component(gradients * activations)
