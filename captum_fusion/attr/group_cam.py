"""Group-CAM."""

from typing import cast

import torch
from captum.attr import LayerAttribution
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import relu

from captum_fusion._captum import BaselineType, ForwardFunc, TargetType, TensorOrTupleOfTensorsGeneric, logged
from captum_fusion._checks import (
    Activation,
    check_activation,
    check_gradients_allowed,
    check_perturbations_per_eval,
)
from captum_fusion._masking import MaskedForward, blurred_where_none
from captum_fusion._state import undisturbed
from captum_fusion.functional import contribution, group_maps, normalize, upsample, weighted_sum

# The blur of the code released with the paper, in pixels.
_KERNEL_SIZE, _SIGMA = 51, 50.0


class LayerGroupCam(LayerAttribution):
    r"""Computes Group-CAM, which scores groups of the chosen layer's channels as masks.

    The channels, weighted by their mean gradients as in Grad-CAM, are summed within groups of consecutive channels.
    Each group's map masks the input, whose other parts are blurred; the probability that it adds to that of the
    blurred input tells what the group is worth. In symbols, for channels A_k, gradients g, the blurred input b and the
    probability P of the target:
    M_j = N(U(ReLU(sum over group j of mean(g) A_k))), score_j = ReLU(P(M_j x + (1 - M_j) b) - P(b)),
    L = sum_j score_j M_j.

    Like ``captum.attr.GuidedGradCam``, it carries a layer's map to the input: the attribution has the input's shape.
    The paper also denoises the groups' maps; this follows the comparison in the Fusion-CAM paper, which does not.

    More details can be found in the paper: https://arxiv.org/abs/2103.13859

    Args:
        forward_func (Callable): The forward function of the model or any modification of it.
        layer (torch.nn.Module): The layer for which attributions are computed. Its output (or its input, if
            ``attribute_to_layer_input``) is a single tensor of shape (N, C, \*s) with one to three spatial axes s.
        device_ids (list[int]): Device ID list, necessary only if ``forward_func`` applies a DataParallel model and is
            not that model itself. Default: None
        groups (int, optional): The number of groups, from 1 to the layer's number of channels. Where the channels
            cannot be divided evenly, the first groups have one more. Default: 32
        activation (str, optional): What turns the output of ``forward_func`` into probabilities before the target is
            selected: "softmax" over dimension 1, "sigmoid", or None if it returns probabilities.
            Default: "softmax"

    Raises:
        ValueError: If the number of groups is below 1 or the activation is unknown.
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: Module,
        device_ids: list[int] | None = None,
        *,
        groups: int = 32,
        activation: Activation | None = "softmax",
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        if groups < 1:
            raise ValueError(f"groups is {groups}; expected at least 1")
        check_activation(activation)
        self.groups = groups
        self.activation = activation

    @logged
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = None,
        additional_forward_args: object = None,
        baselines: BaselineType = None,
        attribute_to_layer_input: bool = False,
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
                tensor of the input's shape or with one example, or for a tuple of inputs a tuple of these.
                Default: None, which means the input blurred by a Gaussian of 51 pixels with a standard deviation of 50
            attribute_to_layer_input (bool, optional): Whether the maps are those of the layer's input rather than its
                output. Default: False
            perturbations_per_eval (int, optional): Number of masks per example in one call of ``forward_func``, at
                least 1. Default: None, which chooses for the device
            show_progress (bool, optional): Whether to show a progress bar over the masked inputs. Default: False

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions** of the input's shape, float32 or wider, not negative,
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
            >>> group_cam = LayerGroupCam(model, model.layer4)
            >>> group_cam.attribute(torch.rand(1, 3, 64, 64), target=281).shape
            torch.Size([1, 3, 64, 64])
        """
        check_perturbations_per_eval(perturbations_per_eval)
        check_gradients_allowed("LayerGroupCam")
        with undisturbed(inputs) as watch:
            forward = MaskedForward(
                self.forward_func,
                inputs,
                target,
                additional_forward_args,
                blurred_where_none(inputs, baselines, _KERNEL_SIZE, _SIGMA),
                self.layer,
                attribute_to_layer_input,
                self.activation,
                watch,
            )
            channels = forward.layer_value.shape[1]
            if self.groups > channels:
                raise ValueError(
                    f"groups is {self.groups}; expected at most {channels}, the number of the layer's channels"
                )
            gradients, activations = forward.layer_gradients(self.device_ids)
            maps = group_maps(gradients, activations, self.groups)
            scores = self._group_scores(forward, maps, perturbations_per_eval, show_progress)
        size = forward.size(forward.masked[0])
        masks = torch.cat([normalize(upsample(part, size)) for part in maps.tensor_split(self.groups, dim=1)], dim=1)
        attributions = forward.as_attributions(weighted_sum(masks, scores))
        return cast(TensorOrTupleOfTensorsGeneric, attributions)

    def _group_scores(
        self, forward: MaskedForward, maps: Tensor, perturbations_per_eval: int | None, show_progress: bool
    ) -> Tensor:
        """What each group adds to the probability of the baseline, (N, groups), not negative."""
        # A constant map is normalized to zeros, which leave the baseline: one more row scores it.
        lowest, highest = torch.aminmax(maps.flatten(2), dim=2)
        live = lowest < highest
        masked = torch.cat([maps, torch.zeros_like(maps[:, :1])], dim=1)
        examples, group = torch.cat([live, torch.ones_like(live[:, :1])], dim=1).nonzero(as_tuple=True)

        def masks(rows: Tensor, position: int) -> Tensor:
            return normalize(upsample(masked[examples[rows], group[rows]].unsqueeze(1), forward.size(position)))

        description = f"{self.get_name()} attribution" if show_progress else None
        row_scores = forward.scores(examples, masks, perturbations_per_eval, description)
        scores = row_scores.new_zeros(masked.shape[:2])
        scores[examples, group] = row_scores
        return relu(contribution(scores[:, :-1], scores[:, -1:])) * live
