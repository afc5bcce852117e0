"""Layer-CAM."""

from torch import Tensor

from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion.attr.gradient_cam import GradientCam
from captum_fusion.functional import layer_cam_weights


@fill_docstring
class LayerLayerCam(GradientCam):
    r"""Computes Layer-CAM for the chosen layer, which weights each pixel by its own positive gradient.

    The map stays sharp in early layers, where the mean gradient over all pixels says little. In symbols, for channels
    A_k and gradients g of the target's score:

    .. math::

        L = \sum_k \mathrm{ReLU}(g_k) A_k

    The paper takes ReLU(L), which ``relu_attributions`` does.

    More details can be found in the paper: https://doi.org/10.1109/TIP.2021.3089943

    Args:
        {layer_constructor}

    {layer_example}
    """

    def channel_weights(self, gradients: Tensor, _: Tensor) -> Tensor:
        """See ``captum_fusion.functional.layer_cam_weights``."""
        return layer_cam_weights(gradients)
