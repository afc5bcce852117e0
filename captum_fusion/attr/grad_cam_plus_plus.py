"""Grad-CAM++."""

from torch import Tensor

from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion.attr.gradient_cam import GradientCam
from captum_fusion.functional import grad_cam_plus_plus_weights


@fill_docstring
class LayerGradCamPlusPlus(GradientCam):
    r"""Computes Grad-CAM++ for the chosen layer, a Grad-CAM that does not fade for small objects.

    Grad-CAM weights each channel by its mean gradient, which is small if a class covers few pixels. Grad-CAM++ weights
    the positive gradients of each pixel, so that small objects count as much as large ones. In symbols, for channels
    A_k, gradients g of the target's score and sums over pixels:

    .. math::

        \alpha_k &= \frac{g_k^2}{2 g_k^2 + \sum(A_k) g_k^3} \\
        w_k &= \sum(\alpha_k \mathrm{ReLU}(g_k)) \\
        L &= \sum_k w_k A_k

    This is the form of the paper's section 3.3, for the exponential of the score. The square of the gradient is
    cancelled, so small gradients do not vanish. If the gradient or the divisor is 0, alpha is 0.

    More details can be found in the paper: https://arxiv.org/abs/1710.11063

    Args:
        {layer_constructor}

    {layer_example}
    """

    def channel_weights(self, gradients: Tensor, activations: Tensor) -> Tensor:
        """See ``captum_fusion.functional.grad_cam_plus_plus_weights``."""
        return grad_cam_plus_plus_weights(gradients, activations)
