"""Fusion-CAM."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from captum.attr import Attribution, LayerGradCam
from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import BaselineType, ForwardFunc, TargetType, TensorOrTupleOfTensorsGeneric, logged
from captum_fusion._engine.component import check_component, check_region_tolerance, component_maps
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.guards import check_gradients_allowed, warn_of_empty_components
from captum_fusion._engine.masking import masked_scorer
from captum_fusion._engine.saliency import region_map
from captum_fusion.arguments import Activation, InterpolateMode, Weighting, check_percentile, check_weighting
from captum_fusion.attr.masked_cam import MaskedCam
from captum_fusion.attr.score_cam import LayerScoreCam
from captum_fusion.functional import combine, contribution, contribution_weights, denoise, fuse


class FusionCamStages(NamedTuple):
    r"""The stages of Fusion-CAM: maps of shape (N, 1, \*S) in [0, 1] and contributions of shape (N,).

    A contribution is negative if the map lowers the probability of the class, and 0 if the difference is within
    rounding. In symbols, for a map m:

    .. math::

        c(m) = P(m x + (1 - m) b) - P(b)
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


@fill_docstring
class LayerFusionCam(MaskedCam):
    r"""Computes Fusion-CAM, which fuses a gradient map and a region map of the chosen layer.

    Grad-CAM is sharp but noisy; Score-CAM covers the object but is diffuse. Fusion-CAM takes three steps. It denoises
    the gradient map. It adds both maps, each weighted by its contribution: the gain in the target's probability P when
    it masks the input. It fuses this union with the region map pixel by pixel, depending on how similar the two are. In
    symbols, for the component maps G and R at the input's size and the contribution c(m) of a map m:

    .. math::

        G &= N(U(\mathrm{ReLU}(\text{Grad-CAM}))) \\
        R &= N(\mathrm{ReLU}(U(\text{Score-CAM}))) \\
        c(m) &= P(m x + (1 - m) b) - P(b)

    1. Denoise, with the percentile tau of the values of G:

       .. math::

           G' &= G \text{ if } G \ge \tau \text{ else } 0 \\
           D &= N(G')

    2. Contribution-weighted union, with weights from c(D) and c(R):

       .. math::

           C = N(w_D D + w_R R)

    3. Similarity fusion, with weights from c(C) and c(R). The attribution is N(F):

       .. math::

           A &= w_C C \\
           B &= w_R R \\
           \mathrm{sim} &= \mathrm{clip}(1 - |A - B|, 0, 1) \\
           F &= \mathrm{sim} \max(A, B) + \frac{(1 - \mathrm{sim}) (A + B)}{2}

    The attribution has the input's shape, as that of ``captum.attr.GuidedGradCam`` does.

    More details can be found in the paper: https://arxiv.org/abs/2603.05386

    Args:
        {layer_constructor}
        gradient_method (Attribution, optional): The method of the gradient map: any attribution of Captum or of this
            package for the same model, or a ``NoiseTunnel`` around one. Its attributions are summed over the channels,
            their negative values are set to 0, and the result is interpolated to the input's size and normalized.
            Default: None, which means ``captum.attr.LayerGradCam(forward_func, layer, device_ids)``
        region_method (Attribution, optional): The method of the region map. Negative values of its attributions are set
            to 0 after the interpolation. Default: None, which means
            ``LayerScoreCam(forward_func, layer, device_ids, tolerance=tolerance)``
        {activation}
        {region_tolerance}

    Raises:
        ValueError: If the activation is unknown, if a component explains another model, if the tolerance is not a
            number in [0, 1), or if both a tolerance and a region method are passed.
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
        tolerance: float = 0.0,
    ) -> None:
        super().__init__(forward_func, layer, device_ids, activation=activation)
        check_region_tolerance(tolerance, region_method)
        self._gradient_method, self._region_method, self.tolerance = gradient_method, region_method, tolerance
        check_component("gradient_method", self.gradient_method, forward_func)
        check_component("region_method", self.region_method, forward_func)

    @property
    def gradient_method(self) -> Attribution:
        """The method of the gradient map; by default Grad-CAM of the current layer."""
        return self._gradient_method or LayerGradCam(self.forward_func, self.layer, self.device_ids)

    @property
    def region_method(self) -> Attribution:
        """The method of the region map; by default Score-CAM of the current layer."""
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
        weighting: Weighting = "raw",
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        return_stages: bool = False,
        gradient_kwargs: Mapping[str, Any] | None = None,
        region_kwargs: Mapping[str, Any] | None = None,
        gradient_attributions: Tensor | tuple[Tensor, ...] | None = None,
        region_attributions: Tensor | tuple[Tensor, ...] | None = None,
        channel_dim: int = 1,
    ) -> TensorOrTupleOfTensorsGeneric | tuple[TensorOrTupleOfTensorsGeneric, FusionCamStages]:
        r"""Computes the attribution of the inputs.

        Args:
            {masked_arguments}
            {baselines}
            percentile (float, optional): theta of the denoising step, in [0, 100): the percentage of the gradient map's
                values that are set to 0. The paper finds 10 to 20 best. Default: 10.0
            weighting (str, optional): The function from two contributions to the weights of their maps:

                - "raw": the contributions themselves; negative contributions count as 0, and both weights are 1 if both
                  contributions are 0. The authors' latest implementations, XaiCAM and Xplain-CAM, use the same weights,
                  except that they keep negative contributions, which can invert the map
                - "released": the weights of the script released with the paper. Each contribution, with its sign, is
                  divided by their sum plus 1e-8. Step 3 takes the w_R of step 2 in place of c(R). The script differs in
                  two points: it does not treat differences within rounding as 0, and it returns zeros if both
                  contributions are 0, where this class gives both maps the same weight
                - "normalized": each contribution divided by their sum; negative contributions count as 0, and both
                  weights are 0.5 if both contributions are 0. No implementation of the authors has these weights. They
                  do not depend on the probability of the class. For an improbable class, the weights of "raw" are so
                  small that sim is 1 everywhere and F is a maximum

                Default: "raw"
            {progress_arguments}
            return_stages (bool, optional): Whether to also return the stages. Default: False
            gradient_kwargs (dict, optional): Further arguments of ``gradient_method.attribute``, such as the
                ``n_steps`` of ``IntegratedGradients`` or the ``nt_samples`` of a ``NoiseTunnel``. The arguments above
                reach every component that takes them. Default: None
            region_kwargs (dict, optional): Further arguments of ``region_method.attribute``, such as the
                ``sliding_window_shapes`` of ``Occlusion``. Default: None
            gradient_attributions (Tensor or tuple[Tensor, ...], optional): Existing attributions of ``gradient_method``
                for the same inputs and target, (N, C, \*s) at the input's or the layer's resolution, one for all inputs
                or one for each. They are fused and not recomputed. Default: None
            region_attributions (Tensor or tuple[Tensor, ...], optional): Existing attributions of ``region_method`` in
                the same form. If you enlarge them yourself, keep their negative values. Default: None
            {channel_dim}

        Returns:
            **attributions** or 2-element tuple of **attributions**, **stages**:

            - **attributions** (*Tensor* or *tuple[Tensor, ...]*): Attributions of the input's shape, float32 or wider,
              in [0, 1], with the same map in each channel. For a tuple of inputs a tuple, with zeros for each unmasked
              input.
            - **stages** (*FusionCamStages*, returned if return_stages=True): The maps of all stages, of shape
              (N, 1, \*S), and their contributions. If a component has one map per input, the stages are those of the
              first masked input.

        Raises:
            {layer_errors}
            {masking_errors}
            RuntimeError: Inside ``torch.inference_mode()``.

        Examples::

            >>> from torchvision.models import resnet18
            >>> model = resnet18(weights=None).eval()
            >>> fusion_cam = LayerFusionCam(model, model.layer4)
            >>> image = torch.rand(1, 3, 64, 64)
            >>> attributions, stages = fusion_cam.attribute(image, target=281, return_stages=True)
            >>> attributions.shape, stages.combined.shape, stages.region_contribution.shape
            (torch.Size([1, 3, 64, 64]), torch.Size([1, 1, 64, 64]), torch.Size([1]))
        """
        check_percentile(percentile)
        check_weighting(weighting)
        check_gradients_allowed(type(self).__name__)
        call = ModelCall.of_layer(
            self, inputs, target, additional_forward_args, attribute_to_layer_input, self.activation, interpolate_mode
        ).masked(baselines, perturbations_per_eval, show_progress, channel_dim)
        with masked_scorer(call) as scorer:
            # Maps by the position of their input; inputs without a map of their own share that of the first one.
            gradient, region = scorer.on_same_inputs(
                component_maps(scorer, "gradient_method", self.gradient_method, gradient_kwargs, gradient_attributions),
                component_maps(
                    scorer, "region_method", self.region_method, region_kwargs, region_attributions, to_map=region_map
                ),
            )
            denoised = {i: denoise(own, percentile) for i, own in gradient.items()}

            # P of the baseline alone, and of the input masked by each map.
            blank, with_denoised, with_region = scorer.scores_of_maps(
                {i: torch.cat([torch.zeros_like(own), denoised[i], own], dim=1) for i, own in region.items()}
            ).unbind(dim=1)
            scale = scorer.forward_pass.scale
            gradient_contribution = contribution(with_denoised, blank, scale)
            region_contribution = contribution(with_region, blank, scale)
            gradient_weight, region_weight = contribution_weights(gradient_contribution, region_contribution, weighting)
            combined = {i: combine(denoised[i], own, gradient_weight, region_weight) for i, own in region.items()}

            combined_contribution = contribution(scorer.scores_of_maps(combined)[:, 0], blank, scale)
            combined_weight, region_weight = contribution_weights(
                combined_contribution, region_weight if weighting == "released" else region_contribution, weighting
            )
            fused = {i: fuse(combined[i], own, combined_weight, region_weight) for i, own in region.items()}

        warn_of_empty_components(gradient.values(), region.values())
        result = cast(TensorOrTupleOfTensorsGeneric, scorer.as_attributions(fused))
        if not return_stages:
            return result
        first = scorer.positions[0]
        maps = (gradient[first], denoised[first], region[first], combined[first], fused[first])
        return result, FusionCamStages(*maps, gradient_contribution, region_contribution, combined_contribution)
