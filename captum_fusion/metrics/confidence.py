"""Average Drop and Average Increase: the change of the target's probability under the attribution as a mask."""

import torch
from torch import Tensor

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import BaselineType, ForwardFunc, TargetType
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.guards import check_not_negative
from captum_fusion._engine.masking import masked_scorer
from captum_fusion._engine.saliency import saliency_maps
from captum_fusion.arguments import Activation, Sign
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
    *,
    channel_dim: int = 1,
) -> Tensor:
    r"""Computes the fraction of the target's probability that is lost when the attribution masks the input.

    In symbols, for the saliency map m, the baseline b and the target's probability P:

    .. math::

        Y &= P(x) \\
        O &= P(m x + (1 - m) b) \\
        \mathrm{drop} &= \frac{\max(0, Y - O)}{Y}

    Its mean over a dataset, in percent, is the Average Drop of Grad-CAM++ (https://arxiv.org/abs/1710.11063); lower is
    better.

    Args:
        {metric_arguments}
        {activation}
        {sign}
        {perturbations_per_eval}
        {channel_dim}

    Returns:
        *Tensor* of shape (N,) with values in [0, 1]. If Y is 0, the drop is 0.

    Raises:
        ValueError: If a score is negative, as logits are with ``activation=None``.
        {metric_errors}

    Examples::

        {attributions_example}
        >>> confidence_drop(model, images, attributions, target=281).shape
        torch.Size([2])
    """
    call = ModelCall(
        forward_func,
        inputs,
        target,
        additional_forward_args,
        activation,
        baselines,
        perturbations_per_eval,
        channel_dim=channel_dim,
    )
    return drop(*probabilities(call, saliency_maps(call, attributions, sign)))


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
    *,
    channel_dim: int = 1,
) -> Tensor:
    r"""Computes whether the target's probability rises when the attribution masks the input.

    In symbols, for the saliency map m, the baseline b and the target's probability P:

    .. math::

        Y &= P(x) \\
        O &= P(m x + (1 - m) b) \\
        \mathrm{increase} &= 1 \text{ if } O > Y \text{ else } 0

    Differences within rounding count as 0. The metric's mean over a dataset, in percent, is the Average Increase of
    Grad-CAM++ (https://arxiv.org/abs/1710.11063); higher is better.

    Args:
        {metric_arguments}
        {activation}
        {sign}
        {perturbations_per_eval}
        {channel_dim}

    Returns:
        *Tensor* of shape (N,) with the values 0 and 1.

    Raises:
        {metric_errors}

    Examples::

        {attributions_example}
        >>> confidence_increase(model, images, attributions, target=281).shape
        torch.Size([2])
    """
    call = ModelCall(
        forward_func,
        inputs,
        target,
        additional_forward_args,
        activation,
        baselines,
        perturbations_per_eval,
        channel_dim=channel_dim,
    )
    return increase(*probabilities(call, saliency_maps(call, attributions, sign)))


def drop(whole: Tensor, difference: Tensor) -> Tensor:
    """max(0, Y - O) / Y, 0/0 := 0."""
    check_not_negative(whole, whole + difference)
    return torch.where(difference < 0, -difference, 0) / torch.where(whole > 0, whole, 1)


def increase(whole: Tensor, difference: Tensor) -> Tensor:
    """1 where O > Y, else 0."""
    return (difference > 0).to(whole.dtype)


def probabilities(call: ModelCall, maps: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Y and O - Y: the probability of the input as it is, and what it gains by the mask, 0 within rounding."""
    maps = {position: saliency.nan_to_num(1) for position, saliency in maps.items()}
    with masked_scorer(call, positions=tuple(maps)) as scorer:
        examples = torch.arange(call.examples, device=call.device)
        masked = scorer.masked_scores(examples, lambda rows, position: maps[position][rows.to(maps[position].device)])
        whole, scale = scorer.forward_pass.unmasked_scores, scorer.forward_pass.scale
    # A mask that keeps everything leaves the input itself, though another batch may round its score differently.
    same = [
        ((saliency == 1) | (scorer.inputs[position] == call.baseline_tensors[position])).flatten(1).all(dim=1)
        for position, saliency in maps.items()
    ]
    return whole, contribution(masked, whole, scale).masked_fill(torch.stack(same).all(dim=0), 0)
