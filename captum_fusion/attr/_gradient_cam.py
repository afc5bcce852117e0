"""What the gradient methods at the layer's resolution share."""

from abc import abstractmethod

from captum.attr import GradientAttribution, LayerAttribution
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import relu

from captum_fusion._captum import ForwardFunc, TargetType, logged
from captum_fusion._checks import check_gradients_allowed
from captum_fusion._forward import CheckedForward
from captum_fusion._state import undisturbed
from captum_fusion.functional import weighted_sum


class GradientCam(LayerAttribution, GradientAttribution):
    """A class activation map whose channel weights follow from the layer's gradients and activations."""

    def __init__(self, forward_func: ForwardFunc, layer: Module, device_ids: list[int] | None = None) -> None:
        super().__init__(forward_func, layer, device_ids)

    @abstractmethod
    def channel_weights(self, gradients: Tensor, activations: Tensor) -> Tensor:
        r"""Computes the weight of each channel.

        Args:
            gradients (Tensor): Gradients of the target's score with respect to the layer, shape (N, C, \*s).
            activations (Tensor): The layer's activations, shape (N, C, \*s).

        Returns:
            *Tensor* of shape (N, C).
        """

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
    ) -> Tensor:
        r"""Computes the attribution of the layer: sum_k w_k A_k, for channels A_k and their weights w_k.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs of ``forward_func``, examples in dimension 0.
            target (int, tuple, Tensor, or list, optional): Output indices for which gradients are computed, in any form
                that ``captum.attr.LayerGradCam`` takes. None only if ``forward_func`` returns one score per example.
                Default: None
            additional_forward_args (Any, optional): Further arguments of ``forward_func``, given after the inputs.
                Tensors (other than scalars) have one row per example; anything else is passed as it is. Default: None
            attribute_to_layer_input (bool, optional): Whether to attribute to the layer's input rather than its
                output. Default: False
            relu_attributions (bool, optional): Whether to set negative attributions to 0, as the paper does.
                Default: False

        Returns:
            *Tensor* of **attributions** of shape (N, 1, \*s), float32 or wider. Use ``LayerAttribution.interpolate``
            to bring them to the input's size.

        Raises:
            ValueError: If the layer is not part of the model or has no such output, if batch sizes differ, or if the
                target does not select one score per example.
            RuntimeError: If scores are not finite, or inside ``torch.inference_mode()``.
        """
        check_gradients_allowed(type(self).__name__)
        with undisturbed(inputs) as watch:
            forward = CheckedForward(
                self.forward_func,
                inputs,
                target,
                additional_forward_args,
                self.layer,
                attribute_to_layer_input,
                watch=watch,
            )
            gradients, activations = forward.layer_gradients(self.device_ids)
        attributions = weighted_sum(activations, self.channel_weights(gradients, activations))
        return relu(attributions) if relu_attributions else attributions
