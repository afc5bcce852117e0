"""Score-CAM."""

import torch
from captum.attr import LayerActivation, LayerAttribution, PerturbationAttribution
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import relu

from captum_fusion._captum import BaselineType, ForwardFunc, TargetType, eager, logged
from captum_fusion._checks import check_perturbations_per_eval
from captum_fusion._masking import MaskedForward
from captum_fusion._state import undisturbed
from captum_fusion.functional import normalize, upsample, weighted_sum


class LayerScoreCam(LayerAttribution, PerturbationAttribution):
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
        forward_func (Callable): The forward function of the model or any modification of it.
        layer (torch.nn.Module): The layer for which attributions are computed. Its output (or its input, if
            ``attribute_to_layer_input``) is a single tensor of shape (N, C, \*s) with one to three spatial axes s.
        device_ids (list[int]): Device ID list, necessary only if ``forward_func`` applies a DataParallel model and is
            not that model itself. Default: None
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
        baselines: BaselineType = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Tensor:
        r"""Computes the attribution of the layer.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs of ``forward_func``, examples in dimension 0. Those with as
                many spatial axes as the layer are masked and must hold floating-point values; the others (tabular
                values, tokens) pass through.
            target (int, tuple, Tensor, or list, optional): Output indices for which scores are taken, in any form that
                ``captum.attr.LayerGradCam`` takes. None only if ``forward_func`` returns one score per example.
                Default: None
            additional_forward_args (Any, optional): Further arguments of ``forward_func``, given after the inputs.
                Tensors (other than scalars) have one row per example; anything else is passed as it is. Default: None
            baselines (Tensor, number, or tuple, optional): What a masked-out value is replaced with: a number, a
                tensor of the input's shape or with one example, or for a tuple of inputs a tuple of these, where None
                means 0. Default: None, which means 0
            attribute_to_layer_input (bool, optional): Whether to attribute to the layer's input rather than its
                output. Default: False
            relu_attributions (bool, optional): Whether to set negative attributions to 0, as the paper does.
                Default: False
            perturbations_per_eval (int, optional): Number of masks per example in one call of ``forward_func``, at
                least 1. Default: None, which chooses for the device
            show_progress (bool, optional): Whether to show a progress bar over the masked inputs. Default: False

        Returns:
            *Tensor* of **attributions** of shape (N, 1, \*s), float32 or wider. Use ``LayerAttribution.interpolate``
            to bring them to the input's size.

        Raises:
            ValueError: If the layer is not part of the model or has no such output, if batch sizes differ, if the
                target does not select one score per example, or if another argument is outside its range.
            TypeError: If an input that would be masked holds no floating-point values.
            RuntimeError: If scores are not finite.

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
        check_perturbations_per_eval(perturbations_per_eval)
        with undisturbed(inputs) as watch:
            forward = MaskedForward(
                self.forward_func,
                inputs,
                target,
                additional_forward_args,
                baselines,
                self.layer,
                attribute_to_layer_input,
                watch=watch,
            )
            with eager():
                activations = LayerActivation(self.forward_func, self.layer, self.device_ids).attribute(
                    forward.copies(), forward.additional_forward_args, attribute_to_layer_input
                )
            scores = self._channel_scores(forward, activations, perturbations_per_eval, show_progress)
        attributions = weighted_sum(activations, scores.softmax(dim=1))
        return relu(attributions) if relu_attributions else attributions

    def _channel_scores(
        self, forward: MaskedForward, activations: Tensor, perturbations_per_eval: int | None, show_progress: bool
    ) -> Tensor:
        """s: the score of each channel of each example, (N, C), minus infinity where a channel is not scored."""
        scored = _covering_channels(activations, self.coverage)
        lowest, highest = torch.aminmax(activations.flatten(2), dim=2)
        constant = lowest == highest
        # One more channel, all zeros, is scored for all constant ones: normalized, they are all zeros as well.
        channels = torch.cat([activations, torch.zeros_like(activations[:, :1])], dim=1)
        needs_zeros = (scored & constant).any(dim=1, keepdim=True)
        examples, live = torch.cat([scored & ~constant, needs_zeros], dim=1).nonzero(as_tuple=True)

        def masks(rows: Tensor, position: int) -> Tensor:
            maps = channels[examples[rows], live[rows]].unsqueeze(1)
            return normalize(upsample(maps.to(torch.promote_types(maps.dtype, torch.float32)), forward.size(position)))

        description = f"{self.get_name()} attribution" if show_progress else None
        row_scores = forward.scores(examples, masks, perturbations_per_eval, description)
        scores = row_scores.new_zeros(channels.shape[:2])
        scores[examples, live] = row_scores
        return torch.where(constant, scores[:, -1:], scores[:, :-1]).masked_fill(~scored, -torch.inf)


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
