"""What masking with an attribution does to the target's probability: Average Drop and Average Increase."""

import torch
from torch import Tensor
from torch.nn.functional import relu

from captum_fusion._engine.captum import BaselineType, ForwardFunc, TargetType
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.masking import masked_scorer
from captum_fusion._engine.saliency import Sign, saliency_maps
from captum_fusion.arguments import Activation
from captum_fusion.functional import contribution


@fill_docstring
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

    In symbols, m being the saliency map, b the baseline and P the target's probability::

        Y = P(x)
        O = P(m x + (1 - m) b)
        drop = max(0, Y - O) / Y

    Its mean over a dataset, in percent, is the Average Drop of Grad-CAM++ (https://arxiv.org/abs/1710.11063); lower is
    better.

    Args:
        {forward_func}
        {inputs}
        {attributions}
        {baselines}
        {additional_forward_args}
        {target}
        {activation}
        {sign}
        {perturbations_per_eval}

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
    return drop(
        *probabilities(
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
    )


@fill_docstring
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

    In symbols, m being the saliency map, b the baseline and P the target's probability::

        Y = P(x)
        O = P(m x + (1 - m) b)
        increase = 1 if O > Y else 0

    A difference within rounding is none. Its mean over a dataset, in percent, is the Average Increase of Grad-CAM++
    (https://arxiv.org/abs/1710.11063); higher is better.

    Args:
        {forward_func}
        {inputs}
        {attributions}
        {baselines}
        {additional_forward_args}
        {target}
        {activation}
        {sign}
        {perturbations_per_eval}

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
    return increase(
        *probabilities(
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
    )


def drop(whole: Tensor, masked: Tensor) -> Tensor:
    """max(0, Y - O) / Y, 0/0 := 0."""
    return relu(-contribution(masked, whole)) / torch.where(whole > 0, whole, 1)


def increase(whole: Tensor, masked: Tensor) -> Tensor:
    """1 where O > Y beyond rounding, else 0."""
    return (contribution(masked, whole) > 0).to(whole.dtype)


def probabilities(
    forward_func: ForwardFunc,
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor | tuple[Tensor | None, ...],
    baselines: BaselineType = None,
    additional_forward_args: object = None,
    target: TargetType = None,
    activation: Activation | None = "softmax",
    sign: Sign = "positive",
    perturbations_per_eval: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Y and O: the probability of the input as it is and masked, from which both metrics follow."""
    maps = saliency_maps(inputs, attributions, sign)
    with masked_scorer(
        forward_func,
        inputs,
        target,
        additional_forward_args,
        baselines=baselines,
        activation=activation,
        masked=tuple(maps),
        perturbations_per_eval=perturbations_per_eval,
    ) as scorer:
        examples = torch.arange(scorer.call.examples, device=scorer.call.device)
        masked = scorer.scores(examples, lambda rows, position: maps[position][rows.to(maps[position].device)])
    # What keeps everything is no other input, whatever the rounding of another batch makes of it.
    same = [
        ((maps[i] == 1) | (scorer.inputs[i] == scorer.call.baselines[i])).flatten(1).all(dim=1) for i in scorer.masked
    ]
    whole = scorer.forward_pass.unmasked_scores
    return whole, torch.where(torch.stack(same).all(dim=0), whole, masked)
