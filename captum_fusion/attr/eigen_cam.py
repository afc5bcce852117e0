"""Eigen-CAM."""

from torch import Tensor

from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion.attr.gradient_cam import GradientCam
from captum_fusion.functional import principal_component


@fill_docstring
class LayerEigenCam(GradientCam):
    r"""Computes Eigen-CAM for the chosen layer, the first principal component of its activations, for any target.

    Pixels are points in the space of the channels, and each pixel is projected on the direction in which the points
    vary most. In symbols, for that direction v and channels A_k:

    .. math::

        L = \sum_k v_k(A_k - \mathrm{mean}(A_k))

    The map shows the salient regions of the layer. The target selects a score, as in the other methods, but does not
    affect the map. No gradients are needed, so the method also works in ``torch.inference_mode()``.

    The sign of a principal component is arbitrary. Here the component correlates positively with the sum of the
    channels. The activations are centred, as in the definition of principal components and in pytorch-grad-cam; the
    formula in the paper omits this.

    More details can be found in the paper: https://arxiv.org/abs/2008.00299

    Args:
        {layer_constructor}

    {layer_example}
    """

    uses_gradients = False

    def channel_maps(self, _: Tensor, activations: Tensor) -> Tensor:
        """See ``captum_fusion.functional.principal_component``."""
        return principal_component(activations)
