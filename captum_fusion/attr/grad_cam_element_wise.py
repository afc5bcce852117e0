"""Element-wise Grad-CAM."""

from torch import Tensor

from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion.attr.gradient_cam import GradientCam
from captum_fusion.functional import element_wise_weights


@fill_docstring
class LayerGradCamElementWise(GradientCam):
    r"""Computes element-wise Grad-CAM for the chosen layer, which is HiResCAM without negative values.

    Like HiResCAM, but negative products of activation and gradient are set to 0 in each channel, before the sum over
    the channels. In symbols, for channels A_k and gradients g of the target's score:

    .. math::

        L = \sum_k \mathrm{ReLU}(g_k A_k)

    It is the ``GradCAMElementWise`` of pytorch-grad-cam, and the positive part of Captum's ``LayerGradientXActivation``
    summed over the channels.

    Args:
        {layer_constructor}

    {layer_example}
    """

    def channel_weights(self, gradients: Tensor, activations: Tensor) -> Tensor:
        """See ``captum_fusion.functional.element_wise_weights``."""
        return element_wise_weights(gradients, activations)
