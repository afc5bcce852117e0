"""KPCA-CAM."""

from torch import Tensor

from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion.attr.gradient_cam import GradientCam
from captum_fusion.functional import kernel_principal_component


@fill_docstring
class LayerKPCACam(GradientCam):
    r"""Computes KPCA-CAM for the chosen layer: Eigen-CAM with a kernel, for any target.

    The map is the first principal component of the activations in the space of a sigmoid kernel, in which activations
    far from their mean count less than in Eigen-CAM. In symbols, for pixels p and q as points of C centred channels,
    and the largest eigenvalue and its eigenvector v of the centred K:

    .. math::

        K_{pq} &= \tanh\left(\frac{1}{C} p \cdot q + 1\right) \\
        L &= \sqrt{\lambda} v

    As with Eigen-CAM, the map does not depend on the target, no gradients are needed, and the sign is such that the map
    correlates with the sum of the channels. The kernel is that of the paper's code in pytorch-grad-cam, which fixes the
    sign by a convention. The component is not a sum over channels: with ``attr_dim_summation=False``, each channel
    holds the same share of it. Memory grows with the square of the layer's pixels.

    More details can be found in the paper: https://arxiv.org/abs/2410.00267

    Args:
        {layer_constructor}

    {layer_example}
    """

    uses_gradients = False

    def channel_maps(self, _: Tensor, activations: Tensor) -> Tensor:
        """See ``captum_fusion.functional.kernel_principal_component``."""
        return kernel_principal_component(activations).expand_as(activations) / activations.shape[1]
