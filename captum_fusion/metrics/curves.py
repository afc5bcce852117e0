"""The target's probability as pixels are restored or removed: insertion and deletion."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import BaselineType, ForwardFunc, TargetType
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.guards import check_replace
from captum_fusion._engine.masking import Masking, Replace, Replacement, masked_scorer
from captum_fusion._engine.saliency import ranks, saliency_maps
from captum_fusion.arguments import Activation, Sign
from captum_fusion.functional._numerics import broadcast_to

# The kernel size and sigma of the code released with RISE, in pixels.
_BLUR = (11, 5.0)


@fill_docstring
def insertion(
    forward_func: ForwardFunc,
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor | tuple[Tensor | None, ...],
    baselines: BaselineType = None,
    additional_forward_args: object = None,
    target: TargetType = None,
    steps: int = 100,
    activation: Activation | None = "softmax",
    sign: Sign = "positive",
    perturbations_per_eval: int | None = None,
    show_progress: bool = False,
    return_curve: bool = False,
    *,
    replace: Replace | None = None,
    channel_dim: int = 1,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    r"""Computes how fast the target's probability rises as the most important pixels are restored.

    The curve starts from a blurred input. Pixels are restored in the order of the saliency map, the most important
    pixels first; equally important pixels follow in row order. The metric is the area under the curve of the target's
    probability over the fraction of restored pixels; higher is better.

    More details can be found in the paper: https://arxiv.org/abs/1806.07421

    Args:
        {forward_func}
        {inputs}
        {attributions}
        baselines (Tensor, number, or tuple, optional): The start: a number, a tensor of the input's shape or with one
            example, or for a tuple of inputs a tuple of these. Default: None, which means the input blurred by a
            Gaussian of 11 pixels with a standard deviation of 5, RISE's; beyond the borders the input is mirrored
        {additional_forward_args}
        {target}
        steps (int, optional): The number of equal steps in which all pixels are restored, at least 1. Default: 100
        {activation}
        {sign}
        {progress_arguments}
        {return_curve}
        {replace}
            Default: None, which means the baselines
        {channel_dim}

    Returns:
        {curve}

    Raises:
        {metric_errors}

    Examples::

        {attributions_example}
        >>> insertion(model, images, attributions, target=281, steps=8).shape
        torch.Size([2])

        With the mean colour of each image instead of its blur:

        >>> def mean_colour(inputs, removed):
        ...     return inputs.mean(dim=(2, 3), keepdim=True).expand_as(inputs)
        >>> insertion(model, images, attributions, target=281, steps=8, replace=mean_colour).shape
        torch.Size([2])
    """
    check_replace(replace, baselines)
    call = ModelCall(
        forward_func,
        inputs,
        target,
        additional_forward_args,
        activation,
        baselines,
        perturbations_per_eval,
        show_progress,
        channel_dim=channel_dim,
    )
    curve = curve_of(call, saliency_maps(call, attributions, sign), steps, restores=True, replace=replace)
    return curve if return_curve else curve.area


@fill_docstring
def deletion(
    forward_func: ForwardFunc,
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor | tuple[Tensor | None, ...],
    baselines: BaselineType = None,
    additional_forward_args: object = None,
    target: TargetType = None,
    steps: int = 100,
    activation: Activation | None = "softmax",
    sign: Sign = "positive",
    perturbations_per_eval: int | None = None,
    show_progress: bool = False,
    return_curve: bool = False,
    *,
    replace: Replace | None = None,
    channel_dim: int = 1,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    r"""Computes how fast the target's probability falls as the most important pixels are removed.

    Pixels are replaced with the baseline in the order of the saliency map, the most important pixels first; equally
    important pixels follow in row order. The metric is the area under the curve of the target's probability over the
    fraction of removed pixels; lower is better.

    More details can be found in the paper: https://arxiv.org/abs/1806.07421

    Args:
        {forward_func}
        {inputs}
        {attributions}
        baselines (Tensor, number, or tuple, optional): The end, with which removed pixels are replaced: a number, a
            tensor of the input's shape or with one example, or for a tuple of inputs a tuple of these, where None means
            0. Default: None, which means 0
        {additional_forward_args}
        {target}
        steps (int, optional): The number of equal steps in which all pixels are removed, at least 1. Default: 100
        {activation}
        {sign}
        {progress_arguments}
        {return_curve}
        {replace}
            Default: None, which means the baselines
        {channel_dim}

    Returns:
        {curve}

    Raises:
        {metric_errors}

    Examples::

        {attributions_example}
        >>> deletion(model, images, attributions, target=281, steps=8).shape
        torch.Size([2])

        With a blur by torchvision instead of 0:

        >>> from torchvision.transforms.v2.functional import gaussian_blur
        >>> def blur(inputs, removed):
        ...     return gaussian_blur(inputs, kernel_size=11, sigma=5.0)
        >>> deletion(model, images, attributions, target=281, steps=8, replace=blur).shape
        torch.Size([2])
    """
    check_replace(replace, baselines)
    call = ModelCall(
        forward_func,
        inputs,
        target,
        additional_forward_args,
        activation,
        baselines,
        perturbations_per_eval,
        show_progress,
        channel_dim=channel_dim,
    )
    curve = curve_of(call, saliency_maps(call, attributions, sign), steps, restores=False, replace=replace)
    return curve if return_curve else curve.area


class Curve(NamedTuple):
    """The target's probability over the changed share of the pixels, and the area below it."""

    area: Tensor
    fractions: Tensor
    probabilities: Tensor


def curve_of(
    call: ModelCall, maps: dict[int, Tensor], steps: int, *, restores: bool, replace: Replace | None = None
) -> Curve:
    """The curve as pixels are restored, or removed, the most important ones first."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    if restores:
        call = dataclasses.replace(call, blur=_BLUR)
    positions = tuple(maps)
    ranked_maps = {position: ranks(saliency) for position, saliency in maps.items()}
    left = {position: saliency.isnan() for position, saliency in maps.items()}
    examples = torch.arange(call.examples, device=call.device).repeat_interleave(steps + 1)
    step = torch.arange(steps + 1, device=call.device).repeat(call.examples)

    def masks(rows: Tensor, position: int) -> Tensor:
        ranked = ranked_maps[position][examples[rows]]
        changed = ranked < broadcast_to(_pixels(step[rows], steps, ranked[0].numel()), ranked)
        return (changed if restores else ~changed) | left[position][examples[rows]]

    removal = Replacement(call, positions, masks, replace) if replace else Masking(call, positions, masks)
    with masked_scorer(call, positions=positions) as scorer:
        scores = scorer.scores(examples, removal, "Insertion" if restores else "Deletion")
    probabilities = scores.reshape(-1, steps + 1)
    pixels = maps[positions[0]][0].numel()
    fractions = _pixels(step[: steps + 1], steps, pixels).to(probabilities.dtype) / pixels
    return Curve(torch.trapezoid(probabilities, fractions, dim=1), fractions, probabilities)


def _pixels(step: Tensor, steps: int, pixels: int) -> Tensor:
    """The number of pixels that are changed after some of the steps."""
    return step * pixels // steps
