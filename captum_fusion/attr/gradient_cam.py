"""Class activation maps from gradients and activations: the base of the gradient methods."""

from collections.abc import Mapping
from typing import Any

from captum.attr import GradientAttribution, LayerAttribution
from torch import Tensor

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import TargetType, logged, select_targets
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.forward_pass import Differentiation, forward_pass
from captum_fusion._engine.guards import check_gradients_allowed
from captum_fusion._engine.saliency import layer_attributions
from captum_fusion.functional import weighted


@fill_docstring
class GradientCam(LayerAttribution, GradientAttribution):
    """Base class of class activation maps from the layer's gradients and activations.

    A method overrides ``channel_weights``, or ``channel_maps`` if it does more than weight channels.

    Args:
        {layer_constructor}
    """

    uses_gradients = True
    """Whether the map depends on gradients; if not, the layer's gradients are an empty tensor."""

    uses_hessian = False
    """Whether ``second_order_gradients`` takes the place of the gradients."""

    def channel_weights(self, gradients: Tensor, activations: Tensor) -> Tensor:
        r"""Computes the weight of each channel.

        Args:
            gradients (Tensor): Gradients of the target's score with respect to the layer, shape (N, C, \*s).
            activations (Tensor): The layer's activations, shape (N, C, \*s).

        Returns:
            *Tensor* of shape (N, C), or (N, C, \*s) if each pixel has its own weight.
        """
        raise NotImplementedError

    def channel_maps(self, gradients: Tensor, activations: Tensor) -> Tensor:
        r"""Computes the share of each channel in the map, by default the channel times its weight.

        Args:
            gradients (Tensor): Gradients of the target's score with respect to the layer, shape (N, C, \*s).
            activations (Tensor): The layer's activations, shape (N, C, \*s).

        Returns:
            *Tensor* of shape (N, C, \*s).
        """
        return weighted(activations, self.channel_weights(gradients, activations))

    def second_order_gradients(self, gradients: Tensor, hessian_products: Tensor) -> Tensor:
        r"""Computes the gradients that ``channel_weights`` takes if ``uses_hessian`` is set.

        Args:
            gradients (Tensor): Gradients of the target's score with respect to the layer, shape (N, C, \*s).
            hessian_products (Tensor): The Hessian of that score times the activations, shape (N, C, \*s).

        Returns:
            *Tensor* of shape (N, C, \*s).
        """
        raise NotImplementedError

    def explained_scores(self, output: Tensor, target: TargetType) -> Tensor:
        """Selects the scores to differentiate, by default those of the target.

        Args:
            output (Tensor): The output of ``forward_func``.
            target (int, tuple, Tensor, list or None): The target of ``attribute``.

        Returns:
            *Tensor* of one score for each example, with its graph.
        """
        return select_targets(output, target)

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        grad_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        r"""Computes the attribution of the layer.

        The attribution keeps its graph, as that of ``captum.attr.LayerGradCam`` does, so it can be differentiated.

        Args:
            {layer_arguments}
            {grad_kwargs}

        Returns:
            {layer_attributions}

        Raises:
            {layer_errors}
            {gradient_errors}
        """
        if self.uses_gradients:
            check_gradients_allowed(type(self).__name__)
        call = ModelCall.of_layer(self, inputs, target, additional_forward_args, attribute_to_layer_input)

        differentiation = None
        if self.uses_gradients:
            differentiation = Differentiation(
                lambda output: self.explained_scores(output, call.targets), grad_kwargs, hessian=self.uses_hessian
            )
        with forward_pass(call, differentiation=differentiation, with_graph=True) as unmasked:
            gradients = unmasked.layer_gradients
            if self.uses_hessian:
                gradients = self.second_order_gradients(gradients, unmasked.hessian_products)
            channels = self.channel_maps(gradients, unmasked.layer_value)
        return layer_attributions(channels, attr_dim_summation, relu_attributions)
