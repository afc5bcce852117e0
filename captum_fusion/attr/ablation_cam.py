"""Ablation-CAM."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from captum.attr import LayerAttribution, PerturbationAttribution
from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import TargetType, eager, logged
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.forward_pass import ForwardPass
from captum_fusion._engine.guards import check_layer
from captum_fusion._engine.masking import Perturbation, masked_scorer
from captum_fusion._engine.saliency import layer_attributions
from captum_fusion.functional import ablation_weights, weighted
from captum_fusion.functional._numerics import broadcast_to


@fill_docstring
class LayerAblationCam(LayerAttribution, PerturbationAttribution):
    r"""Computes Ablation-CAM for the chosen layer, which weights each channel by the loss of score without it.

    Each channel of the layer is set to 0 in turn. The weight of the channel is the fraction of the target's score that
    is lost. No gradients are needed, and the inputs are not masked. In symbols, for channels A_k, the score y of the
    target and its score y_k without channel k:

    .. math::

        w_k &= \frac{y - y_k}{|y|} \\
        L &= \sum_k w_k A_k

    The score is the raw output of ``forward_func``. A channel that is 0 everywhere has the weight 0 and needs no
    forward pass. The paper divides by y, which would invert the map if the score is negative.

    More details can be found in the paper: https://doi.org/10.1109/WACV45572.2020.9093360

    Args:
        {layer_constructor}

    Examples::

        >>> import torch
        >>> from torchvision.models import resnet18
        >>> model = resnet18(weights=None).eval()
        >>> ablation_cam = LayerAblationCam(model, model.layer1)
        >>> ablation_cam.attribute(torch.rand(1, 3, 32, 32), target=281).shape
        torch.Size([1, 1, 8, 8])
    """

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
            {layer_arguments}
            perturbations_per_eval (int, optional): The number of channels per example in one call of ``forward_func``,
                at least 1. Default: None, which chooses a number that fits the device
            show_progress (bool, optional): Whether to show a progress bar over the channels. Default: False

        Returns:
            {layer_attributions}

        Raises:
            {layer_errors}
            RuntimeError: If scores are not finite, if ``forward_func`` fails for several inputs in one call, or if
                another thread runs the layer while its values are recorded.
        """
        call = ModelCall.of_layer(self, inputs, target, additional_forward_args, attribute_to_layer_input)
        call = call.masked(None, perturbations_per_eval, show_progress)
        with masked_scorer(call, positions=()) as scorer:
            activations, scores = scorer.forward_pass.layer_value, scorer.forward_pass.unmasked_scores
            examples, channels = activations.flatten(2).any(dim=2).nonzero(as_tuple=True)
            ablated = scores.unsqueeze(1).repeat(1, activations.shape[1])
            if len(examples):
                ablated[examples, channels] = scorer.scores(
                    examples, _ChannelAblation(scorer.forward_pass, channels), f"{self.get_name()} attribution"
                )
        channel_maps = weighted(activations, ablation_weights(scores, ablated))
        return layer_attributions(channel_maps, attr_dim_summation, relu_attributions)


class _ChannelAblation(Perturbation):
    """Sets one channel of the layer to 0 in each row.

    Args:
        unmasked (ForwardPass): The model that has run once.
        channels (Tensor): The channel of each row, shape (rows,).
    """

    def __init__(self, unmasked: ForwardPass, channels: Tensor) -> None:
        self._unmasked, self._channels = unmasked, channels

    @contextmanager
    def running(self, rows: Tensor, size: int) -> Iterator[None]:
        """Hooks the layer for the time of one forward pass."""
        call, thread = self._unmasked.call, get_ident()
        layer = check_layer(call.layer)
        ablated = torch.arange(self._unmasked.layer_value.shape[1], device=rows.device) == self._channels[rows, None]
        runs = 0

        def without_channels(value: Tensor) -> Tensor:
            if len(value) != size:
                raise ValueError(f"The layer has {len(value)} rows for {size} examples; expected one for each example")
            mask = broadcast_to(ablated.to(value.device), value)
            return torch.cat([value[: len(mask)].masked_fill(mask, 0), value[len(mask) :]])

        def ablate(module: Module, *values: Any) -> Any:
            nonlocal runs
            # Other threads' passes are left alone; a layer that runs several times is explained by its last run.
            if module is not layer or get_ident() != thread:
                return None
            runs += 1
            if runs != self._unmasked.layer_runs:
                return None
            value = values[0 if call.attribute_to_layer_input else -1]
            return (without_channels(value[0]), *value[1:]) if isinstance(value, tuple) else without_channels(value)

        register = layer.register_forward_pre_hook if call.attribute_to_layer_input else layer.register_forward_hook
        # Compiled code skips hooks.
        with register(ablate), eager():
            yield
        if runs < self._unmasked.layer_runs:
            raise ValueError(
                f"The layer ran {runs} times in this thread, but {self._unmasked.layer_runs} times for the unmodified "
                "inputs, so its channels cannot be set to 0. Pass the model itself instead of a DataParallel over "
                "several devices."
            )
