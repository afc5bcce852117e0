"""The target's probability as pixels are restored or removed: insertion and deletion."""

import torch
from torch import Tensor

from captum_fusion._engine.captum import BaselineType, ForwardFunc, TargetType
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.masking import masked_scorer
from captum_fusion._engine.saliency import Sign, ranks, saliency_maps
from captum_fusion.arguments import Activation

# The blur of the code released with RISE, in pixels.
_KERNEL_SIZE, _SIGMA = 11, 5.0


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
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    r"""Computes how fast the target's probability rises as the most important pixels are restored.

    The curve starts from a blurred input. Pixels are restored in the order of the saliency map, the most important
    ones first; among equal ones, the first in row order. The metric is the area under the target's probability over
    the restored fraction; higher is better.

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
        steps (int, optional): In how many steps of the same size all pixels are restored, at least 1. Default: 100
        {activation}
        {sign}
        {perturbations_per_eval}
        {show_progress}
        {return_curve}

    Returns:
        **area** or 3-element tuple of **area**, **fractions**, **probabilities**:

        - **area** (*Tensor*): The area under the curve by the trapezoid rule, shape (N,), in [0, 1].
        - **fractions** (*Tensor*, returned if return_curve=True): The share of the pixels that are restored, from
          0 to 1, shape (steps + 1,).
        - **probabilities** (*Tensor*, returned if return_curve=True): P at each of these, shape (N, steps + 1).

    Raises:
        ValueError: If the attributions cannot belong to the inputs or hold NaN, if the target does not select one score
            per example, or if another argument is outside its range, such as steps below 1.
        TypeError: If an input that would be masked holds no floating-point values.
        RuntimeError: If scores are not finite.

    Examples::

        >>> from captum.attr import LayerGradCam
        >>> from torchvision.models import resnet18
        >>> model = resnet18(weights=None).eval()
        >>> images = torch.rand(2, 3, 64, 64)
        >>> attributions = LayerGradCam(model, model.layer4).attribute(images, target=281)
        >>> insertion(model, images, attributions, target=281, steps=8).shape
        torch.Size([2])
    """
    return _area_under_curve(
        True,
        forward_func,
        inputs,
        attributions,
        baselines,
        additional_forward_args,
        target,
        steps,
        activation,
        sign,
        perturbations_per_eval,
        "Insertion" if show_progress else None,
        return_curve,
    )


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
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    r"""Computes how fast the target's probability falls as the most important pixels are removed.

    Pixels are replaced with the baseline in the order of the saliency map, the most important ones first; among equal
    ones, the first in row order. The metric is the area under the target's probability over the removed fraction;
    lower is better.

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
        steps (int, optional): In how many steps of the same size all pixels are removed, at least 1. Default: 100
        {activation}
        {sign}
        {perturbations_per_eval}
        {show_progress}
        {return_curve}

    Returns:
        **area** or 3-element tuple of **area**, **fractions**, **probabilities**:

        - **area** (*Tensor*): The area under the curve by the trapezoid rule, shape (N,), in [0, 1].
        - **fractions** (*Tensor*, returned if return_curve=True): The share of the pixels that are removed, from
          0 to 1, shape (steps + 1,).
        - **probabilities** (*Tensor*, returned if return_curve=True): P at each of these, shape (N, steps + 1).

    Raises:
        ValueError: If the attributions cannot belong to the inputs or hold NaN, if the target does not select one score
            per example, or if another argument is outside its range, such as steps below 1.
        TypeError: If an input that would be masked holds no floating-point values.
        RuntimeError: If scores are not finite.

    Examples::

        >>> from captum.attr import LayerGradCam
        >>> from torchvision.models import resnet18
        >>> model = resnet18(weights=None).eval()
        >>> images = torch.rand(2, 3, 64, 64)
        >>> attributions = LayerGradCam(model, model.layer4).attribute(images, target=281)
        >>> deletion(model, images, attributions, target=281, steps=8).shape
        torch.Size([2])
    """
    return _area_under_curve(
        False,
        forward_func,
        inputs,
        attributions,
        baselines,
        additional_forward_args,
        target,
        steps,
        activation,
        sign,
        perturbations_per_eval,
        "Deletion" if show_progress else None,
        return_curve,
    )


def _area_under_curve(
    restores: bool,
    forward_func: ForwardFunc,
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor | tuple[Tensor | None, ...],
    baselines: BaselineType,
    additional_forward_args: object,
    target: TargetType,
    steps: int,
    activation: Activation | None,
    sign: Sign,
    perturbations_per_eval: int | None,
    description: str | None,
    return_curve: bool,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    ranked_maps = {position: ranks(maps) for position, maps in saliency_maps(inputs, attributions, sign).items()}
    with masked_scorer(
        forward_func,
        inputs,
        target,
        additional_forward_args,
        baselines=baselines,
        activation=activation,
        masked=tuple(ranked_maps),
        blur=(_KERNEL_SIZE, _SIGMA) if restores else None,
        perturbations_per_eval=perturbations_per_eval,
    ) as scorer:
        device = scorer.call.device
        examples = torch.arange(scorer.call.examples, device=device).repeat_interleave(steps + 1)
        step = torch.arange(steps + 1, device=device).repeat(scorer.call.examples)

        def masks(rows: Tensor, position: int) -> Tensor:
            ranked = ranked_maps[position][examples[rows]]
            changed = ranked < _pixels(step[rows], steps, ranked[0].numel()).reshape(-1, *(1,) * (ranked.dim() - 1))
            return changed if restores else ~changed

        probabilities = scorer.scores(examples, masks, description)
    probabilities = probabilities.reshape(-1, steps + 1)
    pixels = ranked_maps[scorer.masked[0]][0].numel()
    fractions = _pixels(torch.arange(steps + 1, device=device), steps, pixels).to(probabilities.dtype) / pixels
    area = torch.trapezoid(probabilities, fractions, dim=1)
    return (area, fractions, probabilities) if return_curve else area


def _pixels(step: Tensor, steps: int, pixels: int) -> Tensor:
    """How many pixels are changed after some of the steps."""
    return step * pixels // steps
