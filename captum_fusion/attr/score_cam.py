"""Score-CAM."""

from contextlib import closing, nullcontext

import torch
from captum.attr import LayerAttribution, PerturbationAttribution
from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import BaselineType, ForwardFunc, ProgressBar, TargetType, logged, progress_bar
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.masking import MaskedScorer, Masks, masked_scorer
from captum_fusion._engine.saliency import layer_attributions
from captum_fusion._engine.surrogate import Surrogate
from captum_fusion.arguments import check_tolerance
from captum_fusion.functional import normalize, weighted


@fill_docstring
class LayerScoreCam(LayerAttribution, PerturbationAttribution):
    r"""Computes Score-CAM for the chosen layer, which weights each channel by the score of the input masked by it.

    Each channel of the layer, upsampled to the input's size and then normalized to [0, 1], masks the input. The
    attribution is the sum of the channels, weighted by the softmax of the target's scores for these masked inputs. No
    gradients are needed.

    In symbols, for channels A_k and baseline b:

    .. math::

        M_k &= N(U(A_k)) \\
        s_k &= f(M_k x + (1 - M_k) b) \\
        w &= \mathrm{softmax}(s) \\
        L &= \sum_k w_k A_k

    The score is the raw output of ``forward_func``, a logit if the model returns logits, as in the paper. Two kinds of
    passes are shared, which changes no value. All channels that are constant for an example mask everything and share
    one forward pass. Consecutive examples that differ only in their targets share their masked passes: five classes of
    one image, passed as ``image.expand(5, -1, -1, -1)`` with five targets, take the masked passes of one class.

    More details can be found in the paper: https://arxiv.org/abs/1910.01279

    Args:
        {layer_constructor}
        {tolerance}

    Raises:
        ValueError: If the tolerance is not a number in [0, 1).
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: Module,
        device_ids: list[int] | None = None,
        *,
        tolerance: float = 0.0,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        check_tolerance(tolerance)
        self.tolerance = tolerance

    samples = 0
    """The number of versions of each mask over which scores are averaged, see ``sampled_masks``; 0 for no versions."""

    def sampled_masks(self, masks: Tensor, samples: Tensor) -> Tensor:
        r"""Computes one version of each mask.

        Args:
            masks (Tensor): Shape (rows, 1, \*S), in [0, 1].
            samples (Tensor): The index of the version, from 0 to samples - 1, shape (rows,).

        Returns:
            *Tensor* of shape (rows, 1, \*S).
        """
        raise NotImplementedError

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
        return_error_estimate: bool = False,
        channel_dim: int = 1,
    ) -> Tensor | tuple[Tensor, Tensor]:
        r"""Computes the attribution of the layer.

        Args:
            {masked_layer_arguments}
            {baselines}
            {progress_arguments}
            return_error_estimate (bool, optional): Whether to also return the error estimates. Default: False
            {channel_dim}

        Returns:
            **attributions** or 2-element tuple of **attributions**, **error estimates**:

            - **attributions** (*Tensor*): Attributions of shape (N, 1, \*s), or (N, C, \*s) without the sum over the
              channels, float32 or wider. Use ``LayerAttribution.interpolate`` to enlarge them to the input's size.
            - **error estimates** (*Tensor*, returned if return_error_estimate=True): The estimated largest error of
              each example's final map (after ReLU and min-max normalization), (N,); 0 if every channel was scored.

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
        call = ModelCall.of_layer(self, inputs, target, additional_forward_args, attribute_to_layer_input)
        with masked_scorer(call.masked(baselines, perturbations_per_eval, show_progress, channel_dim)) as scorer:
            activations = scorer.forward_pass.layer_value
            rows = _ChannelRows(self, scorer)
            if self.tolerance:
                weights, errors = _inferred_weights(rows, self.tolerance)
            else:
                weights = _channel_scores(rows).softmax(dim=1)
                errors = weights.new_zeros(len(weights))
        attributions = layer_attributions(weighted(activations, weights), attr_dim_summation, relu_attributions)
        return (attributions, errors) if return_error_estimate else attributions


class _ChannelRows:
    """Inputs masked by channels; examples that differ at most in their targets form a group and share masked rows."""

    def __init__(self, method: LayerScoreCam, scorer: MaskedScorer) -> None:
        self._method, self.scorer = method, scorer
        self.groups = scorer.call.target_groups()
        activations = scorer.forward_pass.layer_value.detach()[self.groups[:, 0]]
        lowest, highest = torch.aminmax(activations.flatten(2), dim=2)
        self.constant = lowest == highest
        """Which channels are constant, (groups, C)."""
        self.channels = torch.cat([activations, torch.zeros_like(activations[:, :1])], dim=1)
        """A, (groups, C + 1, *s). The last one, all zeros, masks everything, as constant ones do."""
        self.description = f"{method.get_name()} attribution"

    def scores(self, row_groups: Tensor, row_channels: Tensor, progress: str | ProgressBar | None = None) -> Tensor:
        """Scores groups masked by some of their channels, (rows, targets)."""

        def masks(rows: Tensor, position: int) -> Tensor:
            maps = self.channels[row_groups[rows], row_channels[rows]].unsqueeze(1)
            return normalize(self.scorer.upsample(maps, position))

        return self._mean_scores(self.groups[row_groups], masks, progress)

    def whole_scores(self) -> Tensor:
        """The scores of the mask of ones, (groups, targets)."""
        if not self._method.samples:
            return self.scorer.forward_pass.unmasked_scores[self.groups]

        def ones(rows: Tensor, position: int) -> Tensor:
            return rows.new_ones(len(rows), 1, *self.scorer.size_of(position), dtype=self.channels.dtype)

        return self._mean_scores(self.groups, ones, None)

    def _mean_scores(self, examples: Tensor, masks: Masks, progress: str | ProgressBar | None) -> Tensor:
        """The score of each row's mask, or the mean over its versions."""
        count, samples = len(examples), self._method.samples
        if not samples:
            return self.scorer.masked_scores(examples, masks, progress)

        def sampled(rows: Tensor, position: int) -> Tensor:
            versions = torch.div(rows, count, rounding_mode="floor")
            return self._method.sampled_masks(masks(rows % count, position), versions)

        scores = self.scorer.masked_scores(examples.repeat(samples, 1), sampled, progress)
        return scores.reshape(samples, *examples.shape).mean(dim=0)


def _channel_scores(rows: _ChannelRows) -> Tensor:
    """s: the score of each channel of each example, (N, C)."""
    row_groups, row_channels = torch.cat([~rows.constant, rows.constant.any(dim=1, keepdim=True)], dim=1).nonzero(
        as_tuple=True
    )
    row_scores = rows.scores(row_groups, row_channels, rows.description)
    scores = row_scores.new_zeros(*rows.channels.shape[:2], row_scores.shape[1])
    scores[row_groups, row_channels] = row_scores
    scores = torch.where(rows.constant.unsqueeze(2), scores[:, -1:], scores[:, :-1])
    of_examples = scores.new_empty(rows.scorer.call.examples, scores.shape[1])
    of_examples[rows.groups] = scores.transpose(1, 2)
    return of_examples


def _inferred_weights(rows: _ChannelRows, tolerance: float) -> tuple[Tensor, Tensor]:
    """w, (N, C), and the error estimates, (N,), from the scores of as few channels as needed."""
    everyone = torch.arange(len(rows.groups), device=rows.groups.device)
    whole = rows.whole_scores()
    blank = rows.scores(everyone, torch.full_like(everyone, rows.channels.shape[1] - 1))
    members = [group.unique() for group in rows.groups]
    surrogates = [
        Surrogate(activations[:-1], of_blank[: len(own)], of_whole[: len(own)], tolerance)
        for activations, of_blank, of_whole, own in zip(rows.channels, blank, whole, members, strict=True)
    ]
    bar = progress_bar(rows.description, int((~rows.constant).sum())) if rows.scorer.call.show_progress else None
    with closing(bar) if bar else nullcontext():
        while unfinished := [group for group in everyone.tolist() if not surrogates[group].done]:
            chosen = [surrogates[group].propose() for group in unfinished]
            row_groups = everyone[unfinished].repeat_interleave(
                torch.tensor([len(each) for each in chosen]).to(everyone)
            )
            scores = rows.scores(row_groups, torch.cat(chosen), bar)
            for group, each in zip(unfinished, chosen, strict=True):
                surrogates[group].observe(each, scores[row_groups == group, : len(members[group])])
            if bar:
                bar.set_postfix_str(f"error {max(float(each.errors.max()) for each in surrogates):.2g}")
    weights = torch.cat([each.weights for each in surrogates])
    return weights, torch.cat([each.errors for each in surrogates])
