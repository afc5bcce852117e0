"""Score-CAM for which each channel is scored by several masks."""

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import Module

from captum_fusion._captum import ForwardFunc
from captum_fusion._checks import check_samples
from captum_fusion._scorer import Masks, Scorer
from captum_fusion.attr.score_cam import LayerScoreCam


class SampledScoreCam(LayerScoreCam):
    """Score-CAM whose channels are scored by the mean over several versions of their masks."""

    def __init__(self, forward_func: ForwardFunc, layer: Module, device_ids: list[int] | None, samples: int) -> None:
        super().__init__(forward_func, layer, device_ids)
        check_samples(samples)
        self.samples = samples

    @abstractmethod
    def sampled_masks(self, masks: Tensor, samples: Tensor) -> Tensor:
        r"""Computes one version of each mask.

        Args:
            masks (Tensor): Shape (rows, 1, \*S), in [0, 1].
            samples (Tensor): Which version, from 0 to samples - 1, shape (rows,).

        Returns:
            *Tensor* of shape (rows, 1, \*S).
        """

    def _row_scores(self, scorer: Scorer, examples: Tensor, masks: Masks, description: str | None) -> Tensor:
        count = len(examples)

        def sampled(rows: Tensor, position: int) -> Tensor:
            return self.sampled_masks(masks(rows % count, position), torch.div(rows, count, rounding_mode="floor"))

        scores = scorer.scores(examples.repeat(self.samples), sampled, description)
        return scores.reshape(self.samples, count).mean(dim=0)
