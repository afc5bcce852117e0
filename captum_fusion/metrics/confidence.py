"""What masking with an attribution does to the target's probability: Average Drop and Average Increase."""

import torch
from torch import Tensor
from torch.nn.functional import relu

from captum_fusion._captum import BaselineType, ForwardFunc, TargetType
from captum_fusion._checks import Activation, check_activation, check_perturbations_per_eval
from captum_fusion._masking import MaskedForward
from captum_fusion._state import undisturbed
from captum_fusion.functional import contribution
from captum_fusion.metrics._saliency import Sign, saliency_maps


def confidence_drop(
    forward_func: ForwardFunc,
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor | tuple[Tensor | None, ...],
    baselines: BaselineType = None,
    additional_forward_args: object = None,
    target: TargetType = None,
    activation: Activation | None = "softmax",
    sign: Sign = "positive",
    perturbations_per_eval: int | None = None,
) -> Tensor:
    r"""Computes how much of the target's probability is lost when the attribution masks the input.

    In symbols, for Y = P(x) and O = P(m x + (1 - m) b), m being the saliency map and b the baseline:
    max(0, Y - O) / Y. Its mean over a dataset, in percent, is the Average Drop of Grad-CAM++
    (https://arxiv.org/abs/1710.11063); lower is better.

    Args:
        forward_func (Callable): The forward function of the model or any modification of it.
        inputs (Tensor or tuple[Tensor, ...]): Inputs of ``forward_func``, examples in dimension 0.
        attributions (Tensor or tuple[Tensor, ...]): Attributions of any method, (N, C, \*s) at the input's or at a
            layer's resolution, see ``saliency_map``. One tensor is used for every input with as many spatial axes; a
            tuple has one for each input, and None or attributions without spatial axes for those that pass through.
        baselines (Tensor, number, or tuple, optional): What a masked-out value is replaced with: a number, a tensor of
            the input's shape or with one example, or for a tuple of inputs a tuple of these, where None means 0.
            Default: None, which means 0
        additional_forward_args (Any, optional): Further arguments of ``forward_func``, given after the inputs.
            Tensors (other than scalars) have one row per example; anything else is passed as it is. Default: None
        target (int, tuple, Tensor, or list, optional): Output indices whose probability is measured, in any form that
            ``captum.metrics.infidelity`` takes. None only if ``forward_func`` returns one score per example.
            Default: None
        activation (str, optional): What turns the output of ``forward_func`` into probabilities before the target is
            selected: "softmax" over dimension 1, "sigmoid", or None if it returns probabilities. Default: "softmax"
        sign (str, optional): Which attributions count, see ``saliency_map``. Default: "positive"
        perturbations_per_eval (int, optional): Number of masks per example in one call of ``forward_func``, at least
            1. Default: None, which chooses for the device

    Returns:
        *Tensor* of shape (N,) with values in [0, 1]. Where Y is 0 there is nothing to lose, and the drop is 0.

    Raises:
        ValueError: If the attributions cannot belong to the inputs or hold NaN, if the target does not select one score
            per example, or if another argument is outside its range.
        TypeError: If an input that would be masked holds no floating-point values.
        RuntimeError: If scores are not finite.

    Examples::

        >>> from captum.attr import LayerGradCam
        >>> from torchvision.models import resnet18
        >>> model = resnet18(weights=None).eval()
        >>> images = torch.rand(2, 3, 64, 64)
        >>> attributions = LayerGradCam(model, model.layer4).attribute(images, target=281)
        >>> confidence_drop(model, images, attributions, target=281).shape
        torch.Size([2])
    """
    whole, masked = _probabilities(
        forward_func,
        inputs,
        attributions,
        baselines,
        additional_forward_args,
        target,
        activation,
        sign,
        perturbations_per_eval,
    )
    return relu(-contribution(masked, whole)) / torch.where(whole > 0, whole, 1)


def confidence_increase(
    forward_func: ForwardFunc,
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor | tuple[Tensor | None, ...],
    baselines: BaselineType = None,
    additional_forward_args: object = None,
    target: TargetType = None,
    activation: Activation | None = "softmax",
    sign: Sign = "positive",
    perturbations_per_eval: int | None = None,
) -> Tensor:
    r"""Computes whether the target's probability rises when the attribution masks the input.

    In symbols, for Y = P(x) and O = P(m x + (1 - m) b), m being the saliency map and b the baseline: 1 if O > Y else
    0; a difference within rounding is none. Its mean over a dataset, in percent, is the Average Increase of Grad-CAM++
    (https://arxiv.org/abs/1710.11063); higher is better.

    Args:
        forward_func (Callable): The forward function of the model or any modification of it.
        inputs (Tensor or tuple[Tensor, ...]): Inputs of ``forward_func``, examples in dimension 0.
        attributions (Tensor or tuple[Tensor, ...]): Attributions of any method, (N, C, \*s) at the input's or at a
            layer's resolution, see ``saliency_map``. One tensor is used for every input with as many spatial axes; a
            tuple has one for each input, and None or attributions without spatial axes for those that pass through.
        baselines (Tensor, number, or tuple, optional): What a masked-out value is replaced with: a number, a tensor of
            the input's shape or with one example, or for a tuple of inputs a tuple of these, where None means 0.
            Default: None, which means 0
        additional_forward_args (Any, optional): Further arguments of ``forward_func``, given after the inputs.
            Tensors (other than scalars) have one row per example; anything else is passed as it is. Default: None
        target (int, tuple, Tensor, or list, optional): Output indices whose probability is measured, in any form that
            ``captum.metrics.infidelity`` takes. None only if ``forward_func`` returns one score per example.
            Default: None
        activation (str, optional): What turns the output of ``forward_func`` into probabilities before the target is
            selected: "softmax" over dimension 1, "sigmoid", or None if it returns probabilities. Default: "softmax"
        sign (str, optional): Which attributions count, see ``saliency_map``. Default: "positive"
        perturbations_per_eval (int, optional): Number of masks per example in one call of ``forward_func``, at least
            1. Default: None, which chooses for the device

    Returns:
        *Tensor* of shape (N,) with the values 0 and 1.

    Raises:
        ValueError: If the attributions cannot belong to the inputs or hold NaN, if the target does not select one score
            per example, or if another argument is outside its range.
        TypeError: If an input that would be masked holds no floating-point values.
        RuntimeError: If scores are not finite.

    Examples::

        >>> from captum.attr import LayerGradCam
        >>> from torchvision.models import resnet18
        >>> model = resnet18(weights=None).eval()
        >>> images = torch.rand(2, 3, 64, 64)
        >>> attributions = LayerGradCam(model, model.layer4).attribute(images, target=281)
        >>> confidence_increase(model, images, attributions, target=281).shape
        torch.Size([2])
    """
    whole, masked = _probabilities(
        forward_func,
        inputs,
        attributions,
        baselines,
        additional_forward_args,
        target,
        activation,
        sign,
        perturbations_per_eval,
    )
    return (contribution(masked, whole) > 0).to(whole.dtype)


def _probabilities(
    forward_func: ForwardFunc,
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor | tuple[Tensor | None, ...],
    baselines: BaselineType,
    additional_forward_args: object,
    target: TargetType,
    activation: Activation | None,
    sign: Sign,
    perturbations_per_eval: int | None,
) -> tuple[Tensor, Tensor]:
    """Y and O: the probability of the input as it is and masked."""
    check_perturbations_per_eval(perturbations_per_eval)
    check_activation(activation)
    maps = saliency_maps(inputs, attributions, sign)
    with undisturbed(inputs) as watch:
        forward = MaskedForward(
            forward_func,
            inputs,
            target,
            additional_forward_args,
            baselines,
            activation=activation,
            watch=watch,
            masked=tuple(maps),
        )
        examples = torch.arange(forward.examples, device=forward.inputs[0].device)
        masked = forward.scores(examples, lambda rows, position: maps[position][rows], perturbations_per_eval)
    return forward.unmasked_scores, masked
