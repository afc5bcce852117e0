"""HiResCAM."""

from torch import Tensor

from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion.attr.gradient_cam import GradientCam


@fill_docstring
class LayerHiResCam(GradientCam):
    r"""Computes HiResCAM for the chosen layer, which weights each pixel by its own gradient.

    The map shows where the activations raise the score. Grad-CAM averages the gradient over the pixels, so its map can
    be high elsewhere. In symbols, for channels A_k and gradients g of the target's score:

    .. math::

        L = \sum_k g_k A_k

    This is ``captum.attr.LayerGradientXActivation`` summed over the channels, in the form of ``LayerGradCam``.

    More details can be found in the paper: https://arxiv.org/abs/2011.08891

    Args:
        {layer_constructor}

    {layer_example}
    """

    def channel_weights(self, gradients: Tensor, _: Tensor) -> Tensor:
        """The gradients themselves."""
        return gradients
