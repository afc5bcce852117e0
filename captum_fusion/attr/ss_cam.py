"""SS-CAM."""

import torch
from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.captum import ForwardFunc
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.guards import check_samples
from captum_fusion.attr.score_cam import LayerScoreCam


@fill_docstring
class LayerSSCam(LayerScoreCam):
    r"""Computes SS-CAM for the chosen layer, a Score-CAM averaged over noisy copies of each mask.

    Like Score-CAM, but the score of each channel is the mean over n noisy copies of its mask. In symbols, for channels
    A_k, baseline b and n normal noises d_i of the input's size with a standard deviation of ``stdev``:

    .. math::

        m_i &= N(U(A_k)) + d_i \\
        s_k &= \mathrm{mean}_i f(m_i x + (1 - m_i) b) \\
        w &= \mathrm{softmax}(s) \\
        L &= \sum_k w_k A_k

    SS-CAM takes n times as many forward passes as Score-CAM, in the same memory. All channels and examples have the
    same n noises, which depend only on the seed: channels differ by their masks and not by chance, and an example has
    the same map in any batch.

    More details can be found in the paper: https://arxiv.org/abs/2006.14255

    Args:
        {layer_constructor}
        samples (int, optional): n, the number of noises, at least 1. Default: 35
        stdev (float, optional): The standard deviation of the noise, not negative. Default: 2.0, as in the paper
        seed (int, optional): The seed of the noise; torch's global random state is neither used nor changed. Default: 0
        {tolerance}

    Raises:
        ValueError: If samples is below 1, if stdev is negative, or if the tolerance is not a number in [0, 1).

    Examples::

        >>> import torch
        >>> from torchvision.models import resnet18
        >>> model = resnet18(weights=None).eval()
        >>> ss_cam = LayerSSCam(model, model.layer1, samples=2)
        >>> ss_cam.attribute(torch.rand(1, 3, 32, 32), target=281).shape
        torch.Size([1, 1, 8, 8])
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: Module,
        device_ids: list[int] | None = None,
        *,
        samples: int = 35,
        stdev: float = 2.0,
        seed: int = 0,
        tolerance: float = 0.0,
    ) -> None:
        super().__init__(forward_func, layer, device_ids, tolerance=tolerance)
        check_samples(samples)
        self.samples = samples
        if not 0 <= stdev < float("inf"):
            raise ValueError(f"stdev is {stdev}; expected a number that is not negative")
        self.stdev, self.seed = stdev, seed

    def sampled_masks(self, masks: Tensor, samples: Tensor) -> Tensor:
        """The masks with the noise of each sample."""
        seeds = torch.randint(2**63 - 1, (self.samples,), generator=torch.Generator().manual_seed(self.seed)).tolist()
        drawn, row_of = torch.unique(samples, return_inverse=True)
        # Drawn on the CPU, so that it is the same on every device, and again for each pass, so that memory is bounded.
        noise = torch.empty(len(drawn), *masks.shape[1:])
        for place, sample in zip(noise, drawn.tolist(), strict=True):
            place.normal_(generator=torch.Generator().manual_seed(seeds[sample]))
        return masks + self.stdev * noise.to(masks)[row_of]
