"""Ablation-CAM."""

from captum.attr import LayerAttribution, PerturbationAttribution
from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.ablation import Ablator
from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import ForwardFunc, TargetType, logged
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.forward_pass import forward_pass
from captum_fusion._engine.guards import check_layer, check_perturbations_per_eval
from captum_fusion._engine.saliency import layer_attributions
from captum_fusion.functional import ablation_weights, weighted


@fill_docstring
class LayerAblationCam(LayerAttribution, PerturbationAttribution):
    r"""Computes Ablation-CAM for the chosen layer: a channel is worth what the score loses without it.

    Each channel of the layer is set to 0 in turn; the share of the target's score that is lost tells what the channel
    is worth. No gradients are needed, and the inputs are not masked. In symbols, for channels A_k, the score y of the
    target and its score y_k without channel k::

        w_k = (y - y_k) / |y|
        L = sum_k w_k A_k

    The score is the raw output of ``forward_func``. A channel that is 0 everywhere loses nothing and needs no forward
    pass. The paper divides by y, which would turn the map's signs where the score is negative.

    More details can be found in the paper: https://doi.org/10.1109/WACV45572.2020.9093360

    Args:
        {forward_func}
        {layer}
        {device_ids}

    Examples::

        >>> import torch
        >>> from torchvision.models import resnet18
        >>> model = resnet18(weights=None).eval()
        >>> ablation_cam = LayerAblationCam(model, model.layer1)
        >>> ablation_cam.attribute(torch.rand(1, 3, 32, 32), target=281).shape
        torch.Size([1, 1, 8, 8])
    """

    def __init__(self, forward_func: ForwardFunc, layer: Module, device_ids: list[int] | None = None) -> None:
        super().__init__(forward_func, layer, device_ids)

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
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Tensor:
        r"""Computes the attribution of the layer.

        Args:
            {inputs}
            {target}
            {additional_forward_args}
            {attribute_to_layer_input}
            {relu_attributions}
            {attr_dim_summation}
            perturbations_per_eval (int, optional): Number of channels per example in one call of ``forward_func``, at
                least 1. Default: None, which chooses for the device
            show_progress (bool, optional): Whether to show a progress bar over the channels. Default: False

        Returns:
            {layer_attributions}

        Raises:
            {layer_errors}
            RuntimeError: If scores are not finite, if ``forward_func`` fails for a number of inputs, or if another
                thread runs the layer while it is recorded.
        """
        check_perturbations_per_eval(perturbations_per_eval)
        check_layer(self.layer)
        call = ModelCall(self.forward_func, inputs, target, additional_forward_args)
        call.check_rows()
        with forward_pass(call, self.layer, self.device_ids, attribute_to_layer_input) as unmasked:
            activations, scores = unmasked.layer_value, unmasked.unmasked_scores
            examples, channels = activations.flatten(2).any(dim=2).nonzero(as_tuple=True)
            ablated = scores.unsqueeze(1).repeat(1, activations.shape[1])
            if len(examples):
                ablated[examples, channels] = Ablator(unmasked, perturbations_per_eval).ablated_scores(
                    examples, channels, f"{self.get_name()} attribution" if show_progress else None
                )
        channel_maps = weighted(activations, ablation_weights(scores, ablated))
        return layer_attributions(channel_maps, attr_dim_summation, relu_attributions)
