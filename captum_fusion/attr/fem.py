"""FEM, the feature explanation method."""

from torch import Tensor

from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion.attr.gradient_cam import GradientCam
from captum_fusion.functional import fem_maps


@fill_docstring
class LayerFEM(GradientCam):
    r"""Computes the feature explanation method (FEM) for the chosen layer: its unusually strong activations.

    A channel marks the pixels where it exceeds its mean by two standard deviations, and its mean is what a mark counts.
    In symbols, for channels A_k, and the mean and the standard deviation over pixels:

    .. math::

        B_k &= 1 \text{ if } A_k > \mathrm{mean}(A_k) + 2 \, \mathrm{std}(A_k) \text{ else } 0 \\
        L &= \sum_k \mathrm{mean}(A_k) B_k

    As with Eigen-CAM, the map does not depend on the target, and no gradients are taken. The equation is that of
    Xplique; pytorch-grad-cam sums the activations, each channel weighted by the share of its marked pixels.

    More details can be found in the paper: https://hal.science/hal-02963298

    Args:
        {layer_constructor}

    {layer_example}
    """

    uses_gradients = False

    def channel_maps(self, _: Tensor, activations: Tensor) -> Tensor:
        """See ``captum_fusion.functional.fem_maps``."""
        return fem_maps(activations)
