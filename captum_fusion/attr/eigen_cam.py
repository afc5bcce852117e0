"""Eigen-CAM."""

from torch import Tensor

from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion.attr.gradient_cam import GradientCam
from captum_fusion.functional import principal_component


@fill_docstring
class LayerEigenCam(GradientCam):
    r"""Computes Eigen-CAM for the chosen layer: the first principal component of its activations, for any target.

    The map is the first principal component of the activations: pixels are points in the space of the channels, and
    each is projected on the direction in which they vary most. In symbols, for that direction v and channels A_k:

    .. math::

        L = \sum_k v_k(A_k - \mathrm{mean}(A_k))

    It shows what stands out in the layer, whatever the class: the target selects a score, as in all classes here, but
    the map does not depend on it, and no gradients are taken: it works in ``torch.inference_mode()`` too.

    A principal component has no sign of its own. This one's is such that it correlates with the sum of the channels.
    The activations are centred, as principal components are defined and as pytorch-grad-cam does it; the formula in the
    paper leaves that out.

    More details can be found in the paper: https://arxiv.org/abs/2008.00299

    Args:
        {layer_constructor}

    {layer_example}
    """

    uses_gradients = False

    def channel_maps(self, _: Tensor, activations: Tensor) -> Tensor:
        """See ``captum_fusion.functional.principal_component``."""
        return principal_component(activations)
