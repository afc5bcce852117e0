"""What the methods that mask the input share."""

from contextlib import AbstractContextManager
from typing import Any

from captum.attr import LayerAttribution
from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.captum import BaselineType, ForwardFunc, TargetType
from captum_fusion._engine.guards import check_activation, check_gradients_allowed, check_layer
from captum_fusion._engine.masking import MaskedScorer, masked_scorer
from captum_fusion.arguments import Activation
from captum_fusion.functional import InterpolateMode


class MaskedCam(LayerAttribution):
    """A class activation map for which masked inputs are scored, by default by the raw output."""

    activation: Activation | None = None

    def _scoring(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType,
        additional_forward_args: object,
        attribute_to_layer_input: bool,
        baselines: BaselineType,
        perturbations_per_eval: int | None,
        *,
        interpolate_mode: InterpolateMode = "bilinear",
        with_gradients: bool = False,
        blur: tuple[int, float] | None = None,
    ) -> AbstractContextManager[MaskedScorer]:
        """The scorer of one call of ``attribute``, for the time of a ``with``; see ``masked_scorer``."""
        check_layer(self.layer)
        return masked_scorer(
            self.forward_func,
            inputs,
            target,
            additional_forward_args,
            baselines=baselines,
            activation=self.activation,
            layer=self.layer,
            device_ids=self.device_ids,
            attribute_to_layer_input=attribute_to_layer_input,
            with_gradients=with_gradients,
            blur=blur,
            interpolate_mode=interpolate_mode,
            perturbations_per_eval=perturbations_per_eval,
        )


class ProbabilityCam(MaskedCam):
    """A class activation map of the input's shape, for which masked inputs are compared by their probabilities."""

    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: Module,
        device_ids: list[int] | None = None,
        *,
        activation: Activation | None = "softmax",
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        check_activation(activation)
        self.activation = activation

    def _scoring(self, *arguments: Any, **options: Any) -> AbstractContextManager[MaskedScorer]:
        """The scorer of one call of ``attribute``; every such method needs gradients."""
        check_gradients_allowed(type(self).__name__)
        return super()._scoring(*arguments, **options)
