"""XGrad-CAM."""

from torch import Tensor

from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion.attr.gradient_cam import GradientCam
from captum_fusion.functional import x_grad_cam_weights


@fill_docstring
class LayerXGradCam(GradientCam):
    r"""Computes XGrad-CAM for the chosen layer, which averages gradients weighted by the activations.

    The weight of a channel is the mean of its gradient over the pixels, weighted by the channel's activations. In
    symbols, for channels A_k, gradients g of the target's score and sums over pixels:

    .. math::

        w_k &= \frac{\sum(g_k A_k)}{\sum(A_k)} \\
        L &= \sum_k w_k A_k

    A channel whose activations sum to 0 has the weight 0.

    More details can be found in the paper: https://arxiv.org/abs/2008.02312

    Args:
        {layer_constructor}

    {layer_example}
    """

    def channel_weights(self, gradients: Tensor, activations: Tensor) -> Tensor:
        """See ``captum_fusion.functional.x_grad_cam_weights``."""
        return x_grad_cam_weights(gradients, activations)
