"""Score-CAM for which each channel is scored by several masks."""

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.captum import ForwardFunc, ProgressBar
from captum_fusion._engine.guards import check_samples
from captum_fusion._engine.masking import MaskedScorer, Masks
from captum_fusion.attr.score_cam import ChannelRows, LayerScoreCam


class SampledScoreCam(LayerScoreCam):
    """Score-CAM whose channels are scored by the mean over several versions of their masks."""

    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: Module,
        device_ids: list[int] | None,
        samples: int,
        tolerance: float,
    ) -> None:
        super().__init__(forward_func, layer, device_ids, tolerance=tolerance)
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

    def _rows(self, scorer: MaskedScorer, description: str) -> ChannelRows:
        return _SampledRows(self, scorer, description)


class _SampledRows(ChannelRows):
    """Channels that are scored by the mean over several versions of their masks."""

    def __init__(self, method: SampledScoreCam, scorer: MaskedScorer, description: str) -> None:
        super().__init__(scorer, description)
        self._method = method

    def whole_scores(self) -> Tensor:
        """The mean score of the versions of the mask of ones."""

        def ones(rows: Tensor, position: int) -> Tensor:
            return rows.new_ones(len(rows), 1, *self.scorer.size_of(position), dtype=self.channels.dtype)

        return self.mean_scores(self.groups, ones, None)

    def mean_scores(self, examples: Tensor, masks: Masks, progress: str | ProgressBar | None) -> Tensor:
        """The mean score of the versions of each row's mask."""
        count, samples = len(examples), self._method.samples

        def sampled(rows: Tensor, position: int) -> Tensor:
            versions = torch.div(rows, count, rounding_mode="floor")
            return self._method.sampled_masks(masks(rows % count, position), versions)

        scores = self.scorer.masked_scores(examples.repeat(samples, 1), sampled, progress)
        return scores.reshape(samples, *examples.shape).mean(dim=0)
