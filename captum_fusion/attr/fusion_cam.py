"""Fusion-CAM."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast, overload

import torch
from captum.attr import Attribution, LayerAttribution, LayerGradCam
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
    WEIGHTINGS,
    Weighting,
    combine,
    contribution,
    contribution_weights,
    denoise,
    fuse,
)


class FusionCamStages(NamedTuple):
    r"""The stages of Fusion-CAM: maps of shape (N, 1, \*S) in [0, 1] and contributions of shape (N,).

    The contribution of a map m is c(m) = P(m x + (1 - m) b) - P(b), as measured: it is negative where the map hurts
    the class, and 0 where the difference is within rounding.
    """

    gradient: Tensor
    """G, the normalized gradient map, Grad-CAM by default."""
    denoised: Tensor
    """D, the gradient map without its lowest values."""
    region: Tensor
    """R, the normalized region map, Score-CAM by default."""
    combined: Tensor
    """C, the contribution-weighted union of D and R."""
    fused: Tensor
    """N(F), the similarity fusion of C and R, the Fusion-CAM map."""
    gradient_contribution: Tensor
    """c_D."""
    region_contribution: Tensor
    """c_R."""
    combined_contribution: Tensor
    """c_C."""


class LayerFusionCam(LayerAttribution):
    r"""Computes Fusion-CAM, which fuses a gradient map and a region map of the chosen layer.

    Grad-CAM is sharp but noisy, Score-CAM covers the object but is diffuse. Fusion-CAM denoises the first, adds both
    up by what each one, used as a mask, contributes to the probability P of the target, and fuses the sum with the
    region map pixel by pixel according to how far they agree. In symbols, for the component maps at the input's size
    G = N(U(ReLU(Grad-CAM))) and R = N(U(ReLU(Score-CAM))), and the contribution c(m) = P(m x + (1 - m) b) - P(b):

    1. Denoise: D = N(G'), where G' is G with all values below their percentile set to 0.
    2. Contribution-weighted union: C = N(w_D D + w_R R), with weights from c(D) and c(R).
    3. Similarity fusion: A = w_C C, B = w_R R with weights from c(C) and c(R), sim = clip(1 - \|A - B\|, 0, 1),
       F = sim max(A, B) + (1 - sim) (A + B) / 2. The attribution is N(F).

    Like ``captum.attr.GuidedGradCam``, it carries a layer's map to the input: the attribution has the input's shape.

    More details can be found in the paper: https://arxiv.org/abs/2603.05386

    Args:
        forward_func (Callable): The forward function of the model or any modification of it.
        layer (torch.nn.Module): The layer whose maps are fused. Its output (or its input, if
            ``attribute_to_layer_input``) is a single tensor of shape (N, C, \*s) with one to three spatial axes s.
        device_ids (list[int]): Device ID list, necessary only if ``forward_func`` applies a DataParallel model and is
            not that model itself. Default: None
        gradient_method (Attribution, optional): The attribution to denoise: any of Captum's or of this package for the
            same model, or a ``NoiseTunnel`` around one. Attributions with several channels are summed over the
            channels and negative evidence is dropped; then they are brought to the input's size and normalized.
            Default: None, which means ``captum.attr.LayerGradCam(forward_func, layer, device_ids)``
        region_method (Attribution, optional): The attribution to fuse it with, likewise. Default: None, which means
            ``LayerScoreCam(forward_func, layer, device_ids)``
        activation (str, optional): What turns the output of ``forward_func`` into probabilities before the target is
            selected: "softmax" over dimension 1, "sigmoid", or None if it returns probabilities.
            Default: "softmax"

    Raises:
        ValueError: If the activation is unknown, or if a component explains another model.
        TypeError: If a component is not an attribution.
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: Module,
        device_ids: list[int] | None = None,
        *,
        gradient_method: Attribution | None = None,
        region_method: Attribution | None = None,
        activation: Activation | None = "softmax",
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        check_activation(activation)
        self.gradient_method = (
            LayerGradCam(forward_func, layer, device_ids) if gradient_method is None else gradient_method
        )
        self.region_method = LayerScoreCam(forward_func, layer, device_ids) if region_method is None else region_method
        check_component("gradient_method", self.gradient_method, forward_func)
        check_component("region_method", self.region_method, forward_func)
        self.activation = activation

    @overload
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = ...,
        additional_forward_args: object = ...,
        baselines: BaselineType = ...,
        attribute_to_layer_input: bool = ...,
        percentile: float = ...,
        weighting: Weighting = ...,
        perturbations_per_eval: int | None = ...,
        show_progress: bool = ...,
        return_stages: Literal[False] = ...,
        gradient_kwargs: Mapping[str, Any] | None = ...,
        region_kwargs: Mapping[str, Any] | None = ...,
    ) -> TensorOrTupleOfTensorsGeneric: ...

    @overload
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = ...,
        additional_forward_args: object = ...,
        baselines: BaselineType = ...,
        attribute_to_layer_input: bool = ...,
        percentile: float = ...,
        weighting: Weighting = ...,
        perturbations_per_eval: int | None = ...,
        show_progress: bool = ...,
        *,
        return_stages: Literal[True],
        gradient_kwargs: Mapping[str, Any] | None = ...,
        region_kwargs: Mapping[str, Any] | None = ...,
    ) -> tuple[TensorOrTupleOfTensorsGeneric, FusionCamStages]: ...

    @logged
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = None,
        additional_forward_args: object = None,
        baselines: BaselineType = None,
        attribute_to_layer_input: bool = False,
        percentile: float = 10.0,
        weighting: Weighting = "normalized",
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        return_stages: bool = False,
        gradient_kwargs: Mapping[str, Any] | None = None,
        region_kwargs: Mapping[str, Any] | None = None,
    ) -> TensorOrTupleOfTensorsGeneric | tuple[TensorOrTupleOfTensorsGeneric, FusionCamStages]:
        r"""Computes the attribution of the inputs.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs of ``forward_func``, examples in dimension 0. Those with as
                many spatial axes as the layer are masked and must hold floating-point values; the others (tabular
                values, tokens) pass through. The stages have the spatial shape S of the first masked input.
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
            percentile (float, optional): theta of the denoising step, in percent, in [0, 100): the share of the
                gradient map's values that is dropped. The paper finds 10 to 20 best. Default: 10.0
            weighting (str, optional): How weights follow from two contributions, of which negative ones count as 0:

                - "normalized": each divided by their sum, or 0.5 each where both are 0
                - "raw": as they are, or 1 each where both are 0
                - "released": as the script released with the paper does it: "normalized", except that step 3 weighs
                  c(C) against the w_R of step 2 rather than against c(R)

                Default: "normalized"
            perturbations_per_eval (int, optional): Number of masks per example in one call of ``forward_func``, at
                least 1. Default: None, which chooses for the device
            show_progress (bool, optional): Whether to show a progress bar over the masked inputs. Default: False
            return_stages (bool, optional): Whether to return the stages as well. Default: False
            gradient_kwargs (dict, optional): Further arguments of ``gradient_method.attribute``, such as the
                ``n_steps`` of ``IntegratedGradients`` or the ``nt_samples`` of a ``NoiseTunnel``. The arguments above
                reach every component that takes them. Default: None
            region_kwargs (dict, optional): Further arguments of ``region_method.attribute``, such as the
                ``sliding_window_shapes`` of ``Occlusion``. Default: None

        Returns:
            **attributions** or 2-element tuple of **attributions**, **stages**:

            - **attributions** (*Tensor* or *tuple[Tensor, ...]*): Attributions of the input's shape, float32 or wider,
              in [0, 1], each channel holding the same map. For a tuple of inputs a tuple, with None for an input that
              is not masked.
            - **stages** (*FusionCamStages*, returned if return_stages=True): Each map of shape (N, 1, \*S), and what
              each contributes.

        Raises:
            ValueError: If the layer is not part of the model or has no such output, if batch sizes differ, if the
                target does not select one score per example, if the softmax has a single class, or if another
                argument is outside its range.
            TypeError: If an input that would be masked holds no floating-point values.
            RuntimeError: If scores are not finite, or inside ``torch.inference_mode()``.

        Examples::

            >>> from torchvision.models import resnet18
            >>> model = resnet18(weights=None).eval()
            >>> fusion_cam = LayerFusionCam(model, model.layer4)
            >>> image = torch.rand(1, 3, 64, 64)
            >>> attributions, stages = fusion_cam.attribute(image, target=281, return_stages=True)
            >>> attributions.shape, stages.combined.shape, stages.region_contribution.shape
            (torch.Size([1, 3, 64, 64]), torch.Size([1, 1, 64, 64]), torch.Size([1]))
        """
        check_perturbations_per_eval(perturbations_per_eval)
        check_percentile(percentile)
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting is {weighting!r}; expected one of {WEIGHTINGS}")
        check_gradients_allowed("LayerFusionCam")
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
            options = {
                "target": target,
                "additional_forward_args": additional_forward_args,
                "baselines": baselines,
                "attribute_to_layer_input": attribute_to_layer_input,
                "perturbations_per_eval": perturbations_per_eval,
                "show_progress": show_progress,
            }
            gradient = component_map(self.gradient_method, forward, options, gradient_kwargs)
            region = component_map(self.region_method, forward, options, region_kwargs)

            def probability(maps: Tensor) -> Tensor:
                """P: the probability of the target that each map keeps when it masks the input."""
                return forward.scores_of_maps(maps, perturbations_per_eval)

            without = probability(torch.zeros_like(region))

            denoised = denoise(gradient, percentile)

            gradient_contribution = contribution(probability(denoised), without)
            region_contribution = contribution(probability(region), without)
            gradient_weight, region_weight = contribution_weights(gradient_contribution, region_contribution, weighting)
            combined = combine(denoised, region, gradient_weight, region_weight)

            combined_contribution = contribution(probability(combined), without)
            combined_weight, region_weight = contribution_weights(
                combined_contribution, region_weight if weighting == "released" else region_contribution, weighting
            )
            fused = fuse(combined, region, combined_weight, region_weight)

        result = cast(TensorOrTupleOfTensorsGeneric, forward.as_attributions(fused))
        if not return_stages:
            return result
        stages = FusionCamStages(
            gradient,
            denoised,
            region,
            combined,
            fused,
            gradient_contribution,
            region_contribution,
            combined_contribution,
        )
        return result, stages
