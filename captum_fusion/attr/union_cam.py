"""Union-CAM."""

from typing import cast

import torch
from captum.attr import Attribution
from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import BaselineType, ForwardFunc, TargetType, TensorOrTupleOfTensorsGeneric, logged
from captum_fusion._engine.component import check_component, check_region_tolerance, component_maps
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.guards import check_gradients_allowed
from captum_fusion._engine.masking import masked_scorer
from captum_fusion._engine.saliency import region_map
from captum_fusion._engine.state import warn
from captum_fusion.arguments import Activation, InterpolateMode, check_percentile
from captum_fusion.attr.masked_cam import MaskedCam
from captum_fusion.attr.score_cam import LayerScoreCam
from captum_fusion.functional import combine, contribution, contribution_weights, denoised_gradient_map, normalize
from captum_fusion.functional._numerics import broadcast_to


@fill_docstring
class LayerUnionCam(MaskedCam):
    r"""Computes Union-CAM, which chooses between Score-CAM and its union with a denoised gradient map.

    In symbols, for channels A_k, gradients g, the probability P of the target, the contribution c(m) of a map m, and
    sums over pixels:

    .. math::

        R &= N(\mathrm{ReLU}(U(\text{Score-CAM}))) \\
        c(m) &= P(m x + (1 - m) b) - P(b)

    1. Denoise, with the percentile tau_k of each channel's gradients:

       .. math::

           W_k &= \mathrm{ReLU}(g_k) \text{ if } g_k \ge \tau_k \text{ else } 0 \\
           D &= N\left(U\left(\sum_k\left(\frac{W_k}{\sum(W_k)}\right) A_k\right)\right)

    2. Union, with negative contributions set to 0, and both set to 1 if none is positive:

       .. math::

           C = N(c(D) D + c(R) R)

    3. Choose:

       .. math::

           L = C \text{ if } c(C) > c(R) \text{ else } R

    If Score-CAM is negative everywhere, R and c(R) are zero. The attribution is then D if D raises the probability of
    the baseline; otherwise it is zero, with a warning.

    The attribution has the input's shape, as that of ``captum.attr.GuidedGradCam`` does. The equations are those of the
    comparison in the Fusion-CAM paper (https://arxiv.org/abs/2603.05386). The code released with that paper keeps
    negative contributions and adds 1e-8 to the divisors of N.

    More details can be found in the paper: https://doi.org/10.3389/fnbot.2024.1490198

    Args:
        {layer_constructor}
        region_method (Attribution, optional): The method of the region map R, as in ``LayerFusionCam``. Default: None,
            which means ``LayerScoreCam(forward_func, layer, device_ids, tolerance=tolerance)``
        {activation}
        {region_tolerance}

    Raises:
        ValueError: If the activation is unknown, if the region method explains another model, if the tolerance is not a
            number in [0, 1), or if both a tolerance and a region method are passed.
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
        tolerance: float = 0.0,
    ) -> None:
        super().__init__(forward_func, layer, device_ids, activation=activation)
        check_region_tolerance(tolerance, region_method)
        self._region_method, self.tolerance = region_method, tolerance
        check_component("region_method", self.region_method, forward_func)

    @property
    def region_method(self) -> Attribution:
        """The method of the region map R; by default Score-CAM of the current layer."""
        return self._region_method or LayerScoreCam(
            self.forward_func, self.layer, self.device_ids, tolerance=self.tolerance
        )

    @logged
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = None,
        additional_forward_args: object = None,
        interpolate_mode: InterpolateMode = "bilinear",
        attribute_to_layer_input: bool = False,
        *,
        baselines: BaselineType = None,
        percentile: float = 10.0,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        region_attributions: Tensor | tuple[Tensor, ...] | None = None,
        channel_dim: int = 1,
    ) -> TensorOrTupleOfTensorsGeneric:
        r"""Computes the attribution of the inputs.

        Args:
            {masked_arguments}
            {baselines}
            percentile (float, optional): theta of the denoising step, in [0, 100): the percentage of each channel's
                gradients that are set to 0. Default: 10.0
            {progress_arguments}
            region_attributions (Tensor or tuple[Tensor, ...], optional): Existing attributions of ``region_method`` for
                the same inputs and target, (N, C, \*s) at the input's or the layer's resolution, one for all inputs or
                one for each. They are used and not recomputed. Default: None
            {channel_dim}

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions** of the input's shape, float32 or wider, in [0, 1],
            {input_attributions}

        Raises:
            {layer_errors}
            {masking_errors}
            RuntimeError: Inside ``torch.inference_mode()``.

        {input_example}
        """
        check_percentile(percentile)
        check_gradients_allowed(type(self).__name__)
        call = ModelCall.of_layer(
            self, inputs, target, additional_forward_args, attribute_to_layer_input, self.activation, interpolate_mode
        ).masked(baselines, perturbations_per_eval, show_progress, channel_dim)
        with masked_scorer(call, with_gradients=True) as scorer:
            gradients, activations = scorer.forward_pass.layer_gradients, scorer.forward_pass.layer_value
            region = component_maps(
                scorer, "region_method", self.region_method, attributions=region_attributions, to_map=region_map
            )
            map_of_layer = denoised_gradient_map(gradients, activations.detach(), percentile)
            denoised = {i: normalize(scorer.upsample(map_of_layer, i)) for i in region}

            blank, with_denoised, with_region = scorer.scores_of_maps(
                {i: torch.cat([torch.zeros_like(own), denoised[i], own], dim=1) for i, own in region.items()}
            ).unbind(dim=1)
            scale = scorer.forward_pass.scale
            contributions = contribution(with_denoised, blank, scale), contribution(with_region, blank, scale)
            weights = contribution_weights(*contributions, "raw")
            combined = {i: combine(denoised[i], own, *weights) for i, own in region.items()}
            # c(C) > c(R) beyond rounding: the blank's probability cancels out.
            better = contribution(scorer.scores_of_maps(combined)[:, 0], with_region, scale) > 0

        better = broadcast_to(better, activations)
        union = {i: torch.where(better, combined[i], own) for i, own in region.items()}
        empty = sum(not any(own[example].any() for own in union.values()) for example in range(call.examples))
        if empty:
            warn(
                f"Union-CAM is zero for {empty} of {call.examples} examples: Score-CAM has no positive value there, "
                "and the denoised gradient map does not raise the class probability. Try another layer, such as one "
                "after a ReLU."
            )
        return cast(TensorOrTupleOfTensorsGeneric, scorer.as_attributions(union))
