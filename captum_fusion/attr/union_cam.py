"""Union-CAM."""

from typing import cast

import torch
from captum.attr import Attribution, LayerAttribution
from torch import Tensor
from torch.nn import Module

from captum_fusion._captum import BaselineType, ForwardFunc, TargetType, TensorOrTupleOfTensorsGeneric, logged
from captum_fusion._checks import (
    Activation,
    check_activation,
    check_gradients_allowed,
    check_percentile,
    check_perturbations_per_eval,
)
from captum_fusion._masking import MaskedForward
from captum_fusion._state import undisturbed
from captum_fusion.attr._component import check_component, component_map
from captum_fusion.attr.score_cam import LayerScoreCam
from captum_fusion.functional import (
    combine,
    contribution,
    contribution_weights,
    denoised_gradient_map,
    normalize,
    upsample,
)


class LayerUnionCam(LayerAttribution):
    r"""Computes Union-CAM, which chooses between Score-CAM and its union with a denoised gradient map.

    In symbols, for channels A_k, gradients g, R = N(U(ReLU(Score-CAM))), the probability P of the target, the
    contribution c(m) = P(m x + (1 - m) b) - P(b) of a map, and sums over pixels:

    1. Denoise: W_k is ReLU(g) where g is at least its channel's percentile, else 0; D = N(U(sum_k W_k A_k / sum(W_k))).
    2. Union: C = N(c(D) D + c(R) R), where negative contributions count as 0, and two of them as 1 each.
    3. Choose: the attribution is C if c(C) > c(R), else R.

    Like ``captum.attr.GuidedGradCam``, it carries a layer's map to the input: the attribution has the input's shape.
    The equations are those of the comparison in the Fusion-CAM paper (https://arxiv.org/abs/2603.05386) and of the
    code released with it.

    More details can be found in the paper: https://doi.org/10.3389/fnbot.2024.1490198

    Args:
        forward_func (Callable): The forward function of the model or any modification of it.
        layer (torch.nn.Module): The layer for which attributions are computed. Its output (or its input, if
            ``attribute_to_layer_input``) is a single tensor of shape (N, C, \*s) with one to three spatial axes s.
        device_ids (list[int]): Device ID list, necessary only if ``forward_func`` applies a DataParallel model and is
            not that model itself. Default: None
        region_method (Attribution, optional): The attribution R to unite, as in ``LayerFusionCam``; a ``LayerScoreCam``
            with a coverage below 1, for instance. Default: None, which means
            ``LayerScoreCam(forward_func, layer, device_ids)``
        activation (str, optional): What turns the output of ``forward_func`` into probabilities before the target is
            selected: "softmax" over dimension 1, "sigmoid", or None if it returns probabilities.
            Default: "softmax"

    Raises:
        ValueError: If the activation is unknown, or if the region method explains another model.
        TypeError: If the region method is not an attribution.
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: Module,
        device_ids: list[int] | None = None,
        *,
        region_method: Attribution | None = None,
        activation: Activation | None = "softmax",
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        check_activation(activation)
        self.region_method = LayerScoreCam(forward_func, layer, device_ids) if region_method is None else region_method
        check_component("region_method", self.region_method, forward_func)
        self.activation = activation

    @logged
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = None,
        additional_forward_args: object = None,
        baselines: BaselineType = None,
        attribute_to_layer_input: bool = False,
        percentile: float = 10.0,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> TensorOrTupleOfTensorsGeneric:
        r"""Computes the attribution of the inputs.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs of ``forward_func``, examples in dimension 0. Those with as
                many spatial axes as the layer are masked and must hold floating-point values; the others (tabular
                values, tokens) pass through.
            target (int, tuple, Tensor, or list, optional): Output indices for which attributions are computed, in any
                form that ``captum.attr.LayerGradCam`` takes. None only if ``forward_func`` returns one score per
                example. Default: None
            additional_forward_args (Any, optional): Further arguments of ``forward_func``, given after the inputs.
                Tensors (other than scalars) have one row per example; anything else is passed as it is. Default: None
            baselines (Tensor, number, or tuple, optional): What a masked-out value is replaced with: a number, a
                tensor of the input's shape or with one example, or for a tuple of inputs a tuple of these, where None
                means 0. Default: None, which means 0
            attribute_to_layer_input (bool, optional): Whether the maps are those of the layer's input rather than its
                output. Default: False
            percentile (float, optional): theta of the denoising step, in percent, in [0, 100): the share of each
                channel's gradients that is dropped. Default: 10.0
            perturbations_per_eval (int, optional): Number of masks per example in one call of ``forward_func``, at
                least 1. Default: None, which chooses for the device
            show_progress (bool, optional): Whether to show a progress bar over the masked inputs. Default: False

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions** of the input's shape, float32 or wider, in [0, 1],
            each channel holding the same map. For a tuple of inputs a tuple, with None for an input that is not masked.

        Raises:
            ValueError: If the layer is not part of the model or has no such output, if batch sizes differ, if the
                target does not select one score per example, if the softmax has a single class, or if another
                argument is outside its range.
            TypeError: If an input that would be masked holds no floating-point values.
            RuntimeError: If scores are not finite, or inside ``torch.inference_mode()``.

        Examples::

            >>> from torchvision.models import resnet18
            >>> model = resnet18(weights=None).eval()
            >>> union_cam = LayerUnionCam(model, model.layer4)
            >>> union_cam.attribute(torch.rand(1, 3, 64, 64), target=281).shape
            torch.Size([1, 3, 64, 64])
        """
        check_perturbations_per_eval(perturbations_per_eval)
        check_percentile(percentile)
        check_gradients_allowed("LayerUnionCam")
        with undisturbed(inputs) as watch:
            forward = MaskedForward(
                self.forward_func,
                inputs,
                target,
                additional_forward_args,
                baselines,
                self.layer,
                attribute_to_layer_input,
                self.activation,
                watch,
            )
            gradients, activations = forward.layer_gradients(self.device_ids)
            options = {
                "target": target,
                "additional_forward_args": additional_forward_args,
                "baselines": baselines,
                "attribute_to_layer_input": attribute_to_layer_input,
                "perturbations_per_eval": perturbations_per_eval,
                "show_progress": show_progress,
            }
            region = component_map(self.region_method, forward, options)

            denoised = denoised_gradient_map(gradients, activations, percentile)
            denoised = normalize(upsample(denoised, forward.size(forward.masked[0])))

            def probability(maps: Tensor) -> Tensor:
                """P: the probability of the target that each map keeps when it masks the input."""
                return forward.scores_of_maps(maps, perturbations_per_eval)

            without = probability(torch.zeros_like(region))

            denoised_contribution = contribution(probability(denoised), without)
            region_contribution = contribution(probability(region), without)
            weights = contribution_weights(denoised_contribution, region_contribution, "raw")
            combined = combine(denoised, region, *weights)

            combined_contribution = contribution(probability(combined), without)
            better = combined_contribution > region_contribution
            union = torch.where(better.reshape(-1, *(1,) * (region.dim() - 1)), combined, region)
        return cast(TensorOrTupleOfTensorsGeneric, forward.as_attributions(union))
