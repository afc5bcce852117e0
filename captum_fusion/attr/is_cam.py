"""IS-CAM."""

from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.captum import ForwardFunc
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.guards import check_samples
from captum_fusion.attr.score_cam import LayerScoreCam
from captum_fusion.functional import integration_masks


@fill_docstring
class LayerISCam(LayerScoreCam):
    r"""Computes IS-CAM for the chosen layer, a Score-CAM averaged over fractions of each mask.

    Like Score-CAM, but the score of each channel is the mean over n fractions of its mask, from 1/n to the whole mask.
    In symbols, for channels A_k, baseline b and the steps i from 1 to n:

    .. math::

        m_i &= \frac{i N(U(A_k))}{n} \\
        s_k &= \mathrm{mean}_i f(m_i x + (1 - m_i) b) \\
        w &= \mathrm{softmax}(s) \\
        L &= \sum_k w_k A_k

    IS-CAM takes n times as many forward passes as Score-CAM, in the same memory. The steps follow the integral in the
    paper. torchcam adds up the steps instead, and its masks grow to (n + 1) / 2 times the input.

    More details can be found in the paper: https://arxiv.org/abs/2010.03023

    Args:
        {layer_constructor}
        samples (int, optional): n, the number of steps, at least 1. Default: 10
        {tolerance}

    Raises:
        ValueError: If samples is below 1, or if the tolerance is not a number in [0, 1).

    Examples::

        >>> import torch
        >>> from torchvision.models import resnet18
        >>> model = resnet18(weights=None).eval()
        >>> is_cam = LayerISCam(model, model.layer1, samples=2)
        >>> is_cam.attribute(torch.rand(1, 3, 32, 32), target=281).shape
        torch.Size([1, 1, 8, 8])
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: Module,
        device_ids: list[int] | None = None,
        *,
        samples: int = 10,
        tolerance: float = 0.0,
    ) -> None:
        super().__init__(forward_func, layer, device_ids, tolerance=tolerance)
        check_samples(samples)
        self.samples = samples

    def sampled_masks(self, masks: Tensor, samples: Tensor) -> Tensor:
        """See ``captum_fusion.functional.integration_masks``."""
        return integration_masks(masks, samples, self.samples)
