"""Score-CAM."""

import torch
from captum.attr import PerturbationAttribution
from torch import Tensor
from torch.nn import Module

from captum_fusion._captum import BaselineType, ForwardFunc, TargetType, logged
from captum_fusion._maps import layer_attributions
from captum_fusion._prose import documented
from captum_fusion._scorer import Masks, Scorer
from captum_fusion.attr._masked_cam import MaskedCam
from captum_fusion.functional import normalize, weighted


@documented
class LayerScoreCam(MaskedCam, PerturbationAttribution):
    r"""Computes Score-CAM for the chosen layer.

    Each channel of the layer, upsampled to the input and then normalized to [0, 1], masks the input; the score of the
    target for that masked input tells what the channel is worth. The attribution is the sum of the channels, weighted
    by the softmax of their scores. No gradients are needed.

    In symbols, for channels A_k and baseline b:
    M_k = N(U(A_k)), s_k = f(M_k x + (1 - M_k) b), w = softmax over k of s_k, L = sum_k w_k A_k.

    The score is the raw output of ``forward_func``, a logit if the model returns logits, as in the paper. A channel
    that is constant for an example masks everything; all such channels share one forward pass, which is exact.

    More details can be found in the paper: https://arxiv.org/abs/1910.01279

    Args:
        {forward_func}
        {layer}
        {device_ids}
        coverage (float, optional): The share of the layer's activation, in (0, 1], that the scored channels hold
            together. Below 1 only the channels with the largest total activation (the sum of their absolute values)
            are scored for each example; the others get no weight, and the attribution is an approximation that costs
            fewer forward passes: at 0.85 about a third, with correlations above 0.99, on the networks and pictures of
            ``benchmarks/results/coverage.md``. It serves layers after a ReLU; signed channels cancel each other, so
            that leaving out even small ones changes the sum. Default: 1.0, which is exact

    Raises:
        ValueError: If the coverage is outside (0, 1].
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: Module,
        device_ids: list[int] | None = None,
        *,
        coverage: float = 1.0,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        if not 0 < coverage <= 1:
            raise ValueError(f"coverage is {coverage}; expected a number in (0, 1]")
        self.coverage = coverage

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        *,
        baselines: BaselineType = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Tensor:
        r"""Computes the attribution of the layer.

        Args:
            {masked_inputs}
            {target}
            {additional_forward_args}
            {attribute_to_layer_input}
            {relu_attributions}
            {attr_dim_summation}
            {baselines}
            {perturbations_per_eval}
            {show_progress}

        Returns:
            {layer_attributions}

        Raises:
            {layer_errors}
            {masking_errors}

        Examples::

            >>> from torchvision.models import resnet18
            >>> model = resnet18(weights=None).eval()
            >>> score_cam = LayerScoreCam(model, model.layer4)
            >>> attributions = score_cam.attribute(torch.rand(1, 3, 64, 64), target=281)
            >>> attributions.shape
            torch.Size([1, 1, 2, 2])
            >>> LayerScoreCam.interpolate(attributions, (64, 64), "bilinear").shape
            torch.Size([1, 1, 64, 64])
        """
        where = (attribute_to_layer_input, baselines, perturbations_per_eval)
        with self._scoring(inputs, target, additional_forward_args, *where) as scorer:
            activations = scorer.session.layer_value
            scores = self._channel_scores(scorer, activations, show_progress)
        channels = weighted(activations, scores.softmax(dim=1))
        return layer_attributions(channels, attr_dim_summation, relu_attributions)

    def _channel_scores(self, scorer: Scorer, activations: Tensor, show_progress: bool) -> Tensor:
        """s: the score of each channel of each example, (N, C), minus infinity where a channel is not scored."""
        scored = _covering_channels(activations, self.coverage)
        lowest, highest = torch.aminmax(activations.flatten(2), dim=2)
        constant = lowest == highest
        # One more channel, all zeros, is scored for all constant ones: normalized, they are all zeros as well.
        channels = torch.cat([activations, torch.zeros_like(activations[:, :1])], dim=1)
        needs_zeros = (scored & constant).any(dim=1, keepdim=True)
        examples, live = torch.cat([scored & ~constant, needs_zeros], dim=1).nonzero(as_tuple=True)

        def masks(rows: Tensor, position: int) -> Tensor:
            return normalize(scorer.upsample(channels[examples[rows], live[rows]].unsqueeze(1), position))

        row_scores = self._row_scores(
            scorer, examples, masks, f"{self.get_name()} attribution" if show_progress else None
        )
        scores = row_scores.new_zeros(channels.shape[:2])
        scores[examples, live] = row_scores
        return torch.where(constant, scores[:, -1:], scores[:, :-1]).masked_fill(~scored, -torch.inf)

    def _row_scores(self, scorer: Scorer, examples: Tensor, masks: Masks, description: str | None) -> Tensor:
        """The score of each row's mask; methods that score several masks in its place override this."""
        return scorer.scores(examples, masks, description)


def _covering_channels(activations: Tensor, coverage: float) -> Tensor:
    """The fewest channels that together hold a share of each example's total activation, (N, C)."""
    precision = torch.promote_types(activations.dtype, torch.float32)
    totals = activations.abs().flatten(2).sum(dim=2, dtype=precision)
    if coverage == 1 or not totals.any():
        return torch.ones_like(totals, dtype=torch.bool)
    largest_first, order = totals.sort(dim=1, descending=True, stable=True)
    held_before = largest_first.cumsum(dim=1) - largest_first
    needed = (held_before < coverage * totals.sum(dim=1, keepdim=True)).index_fill(1, order.new_tensor([0]), True)
    return torch.zeros_like(needed).scatter(1, order, needed)
