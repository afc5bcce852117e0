"""Coherency, complexity and their harmonic means with the Average Drop, ADCC, and with ROAD, ARCC."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import BaselineType, ForwardFunc, TargetType
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.guards import check_maskable
from captum_fusion._engine.saliency import checked_attributions, explained_pixels, saliency_map, saliency_maps
from captum_fusion._engine.state import preserved
from captum_fusion.arguments import Activation, Sign
from captum_fusion.functional import adcc as harmonic_mean
from captum_fusion.functional import arcc as harmonic_mean_with_road
from captum_fusion.functional import correlation
from captum_fusion.metrics.confidence import confidence_drop
from captum_fusion.metrics.road import road

Explain = Callable[..., Any]


@fill_docstring
def complexity(
    attributions: Tensor, size: tuple[int, ...] | None = None, sign: Sign = "positive", *, channel_dim: int = 1
) -> Tensor:
    r"""Computes complexity, the mean of the saliency map over its pixels.

    A complex map covers much of the image. Lower is better if the map is faithful.

    More details can be found in the paper: https://arxiv.org/abs/2104.10252

    Args:
        {map_attributions}
        {map_size}
        {sign}
        {attributions_channel_dim}

    Returns:
        *Tensor* of shape (N,) with values in [0, 1].

    Raises:
        ValueError: If the attributions do not fit the size or hold NaN, or if the sign is unknown.

    Examples::

        >>> complexity(torch.tensor([[[0.0, 1.0, 4.0, 0.0]]]))
        tensor([0.3125])
    """
    attributions = checked_attributions(attributions, channel_dim)
    return saliency_map(attributions, tuple(attributions.shape[2:]) if size is None else size, sign).flatten(1).mean(1)


@fill_docstring
def coherency(
    explanation_func: Explain | Attribution,
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor | tuple[Tensor | None, ...],
    baselines: BaselineType = None,
    additional_forward_args: object = None,
    target: TargetType = None,
    sign: Sign = "positive",
    explanation_kwargs: Mapping[str, Any] | None = None,
    *,
    channel_dim: int = 1,
) -> Tensor:
    r"""Computes coherency, the similarity of the maps of the input and of the input masked by its map.

    In symbols, for the saliency map m of the input x, the method's saliency map m' of m x + (1 - m) b, the baseline b,
    and Pearson's correlation r over the pixels:

    .. math::

        \mathrm{coherency} = \frac{1 + r(m, m')}{2}

    Higher is better.

    More details can be found in the paper: https://arxiv.org/abs/2104.10252

    Args:
        explanation_func (Attribution or Callable): The method, its ``attribute``, or a function of the inputs. The
            function also takes, by name, ``target``, ``additional_forward_args`` if there are any, and the entries of
            ``explanation_kwargs``.
        {inputs}
        {attributions}
        {baselines}
        {additional_forward_args}
        {target}
        {sign}
        explanation_kwargs (dict, optional): Further arguments of ``explanation_func``. Default: None
        {channel_dim}

    Returns:
        *Tensor* of shape (N,) with values in [0, 1]. If a map is constant: 1 if both maps are the same, else 0.5.

    Raises:
        ValueError: If the attributions cannot belong to the inputs or hold NaN, or if another argument is outside its
            range.
        TypeError: If an input to mask holds no floating-point values.

    Examples::

        >>> from captum.attr import LayerGradCam
        >>> from torchvision.models import resnet18
        >>> model = resnet18(weights=None).eval()
        >>> grad_cam = LayerGradCam(model, model.layer4)
        >>> images = torch.rand(2, 3, 64, 64)
        >>> coherency(grad_cam, images, grad_cam.attribute(images, target=281), target=281).shape
        torch.Size([2])
    """
    explain = explanation_func.attribute if isinstance(explanation_func, Attribution) else explanation_func
    call = ModelCall(forward_func=explain, inputs=inputs, baselines=baselines, channel_dim=channel_dim)
    maps = saliency_maps(call, attributions, sign)
    check_maskable(call.tensors, maps)
    masked = tuple(
        torch.lerp(baseline, tensor.detach(), maps[i].nan_to_num(1).to(tensor))
        if i in maps
        else tensor.detach().clone()
        for i, (tensor, baseline) in enumerate(zip(call.tensors, call.baseline_tensors, strict=True))
    )
    further = {} if additional_forward_args is None else {"additional_forward_args": additional_forward_args}
    with preserved(call.tensors) as state, state.tracking():
        again = explain(call.in_form(masked), target=target, **further, **(explanation_kwargs or {}))
    if isinstance(again, tuple) and len(again) == 1:
        again = again[0]
    # The layer's map of a method is for the same inputs as before.
    maps_again = saliency_maps(call, again, sign)
    again_of = {
        position: maps_again[position].nan_to_num(0).to(value).masked_fill(value.isnan(), torch.nan)
        if position in maps_again
        else torch.zeros_like(value).masked_fill(value.isnan(), torch.nan)
        for position, value in maps.items()
    }
    pairs = ((explained_pixels(maps, i), explained_pixels(again_of, i)) for i in range(call.examples))
    return (1 + torch.cat([correlation(first, second) for first, second in pairs])) / 2


@fill_docstring
def adcc(
    forward_func: ForwardFunc,
    explanation_func: Explain | Attribution,
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor | tuple[Tensor | None, ...],
    baselines: BaselineType = None,
    additional_forward_args: object = None,
    target: TargetType = None,
    activation: Activation | None = "softmax",
    sign: Sign = "positive",
    perturbations_per_eval: int | None = None,
    explanation_kwargs: Mapping[str, Any] | None = None,
    *,
    channel_dim: int = 1,
) -> Tensor:
    r"""Computes ADCC, the harmonic mean of 1 - drop, coherency and 1 - complexity.

    It measures in one number whether an attribution is faithful, coherent and concise. In symbols, for the
    ``confidence_drop``, ``coherency`` and ``complexity`` of an example:

    .. math::

        \mathrm{ADCC} = \frac{3}{1 / (1 - \mathrm{drop}) + 1 / \mathrm{coherency} + 1 / (1 - \mathrm{complexity})}

    Higher is better.

    More details can be found in the paper: https://arxiv.org/abs/2104.10252

    Args:
        {forward_func}
        explanation_func (Attribution or Callable): The method, see ``coherency``.
        {inputs}
        {attributions}
        {baselines}
        {additional_forward_args}
        {target}
        {activation}
        {sign}
        {perturbations_per_eval}
        explanation_kwargs (dict, optional): Further arguments of ``explanation_func``. Default: None
        {channel_dim}

    Returns:
        *Tensor* of shape (N,) with values in [0, 1]; 0 if one of the three has its worst value.

    Raises:
        {metric_errors}

    Examples::

        >>> from captum.attr import LayerGradCam
        >>> from torchvision.models import resnet18
        >>> model = resnet18(weights=None).eval()
        >>> grad_cam = LayerGradCam(model, model.layer4)
        >>> images = torch.rand(2, 3, 64, 64)
        >>> adcc(model, grad_cam, images, grad_cam.attribute(images, target=281), target=281).shape
        torch.Size([2])
    """
    what = (inputs, attributions, baselines, additional_forward_args, target)
    drop = confidence_drop(forward_func, *what, activation, sign, perturbations_per_eval, channel_dim=channel_dim)
    coherent = coherency(explanation_func, *what, sign, explanation_kwargs, channel_dim=channel_dim)
    covered = _covered(inputs, attributions, sign, channel_dim)
    return harmonic_mean(drop, coherent.to(drop.device), covered.to(drop.device))


@fill_docstring
def arcc(
    forward_func: ForwardFunc,
    explanation_func: Explain | Attribution,
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor | tuple[Tensor | None, ...],
    baselines: BaselineType = None,
    additional_forward_args: object = None,
    target: TargetType = None,
    activation: Activation | None = "softmax",
    sign: Sign = "positive",
    perturbations_per_eval: int | None = None,
    explanation_kwargs: Mapping[str, Any] | None = None,
    *,
    fractions: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    channel_dim: int = 1,
) -> Tensor:
    r"""Computes ARCC, the harmonic mean of ROAD, coherency and 1 - complexity.

    It measures the same as ``adcc``, with imputed pixels in place of a masked image, whose sharp edges and flat regions
    the model never saw in training. In symbols, for the combined ``road``, ``coherency`` and ``complexity``:

    .. math::

        r &= \mathrm{ReLU}(2\ \mathrm{ROAD}) \\
        \mathrm{ARCC} &= \frac{3}{1 / r + 1 / \mathrm{coherency} + 1 / (1 - \mathrm{complexity})}

    Higher is better.

    More details can be found in the paper: https://arxiv.org/abs/2605.14641

    Args:
        {forward_func}
        explanation_func (Attribution or Callable): The method, see ``coherency``.
        {inputs}
        {attributions}
        {baselines}
        {additional_forward_args}
        {target}
        {activation}
        {sign}
        {perturbations_per_eval}
        explanation_kwargs (dict, optional): Further arguments of ``explanation_func``. Default: None
        fractions (list[float], optional): The shares of the pixels to remove, see ``road``.
            Default: (0.2, 0.4, 0.6, 0.8), as in the authors' code
        {channel_dim}

    Returns:
        *Tensor* of shape (N,) with values in [0, 1]; 0 if one of the three has its worst value.

    Raises:
        {metric_errors}

    Examples::

        >>> from captum.attr import LayerGradCam
        >>> from torchvision.models import resnet18
        >>> model = resnet18(weights=None).eval()
        >>> grad_cam = LayerGradCam(model, model.layer4)
        >>> images = torch.rand(2, 3, 64, 64)
        >>> arcc(model, grad_cam, images, grad_cam.attribute(images, target=281), target=281).shape
        torch.Size([2])
    """
    removed = road(
        forward_func,
        inputs,
        attributions,
        additional_forward_args,
        target,
        fractions,
        activation=activation,
        sign=sign,
        perturbations_per_eval=perturbations_per_eval,
        channel_dim=channel_dim,
    )
    what = (inputs, attributions, baselines, additional_forward_args, target)
    coherent = coherency(explanation_func, *what, sign, explanation_kwargs, channel_dim=channel_dim)
    covered = _covered(inputs, attributions, sign, channel_dim)
    return harmonic_mean_with_road(removed, coherent.to(removed.device), covered.to(removed.device))


def _covered(
    inputs: Tensor | tuple[Tensor, ...], attributions: Tensor | tuple[Tensor | None, ...], sign: Sign, channel_dim: int
) -> Tensor:
    """The complexity of the saliency maps of all inputs together."""
    # No model runs: only the shapes of the inputs count.
    call = ModelCall(lambda *_: None, inputs, channel_dim=channel_dim)
    maps = saliency_maps(call, attributions, sign)
    return torch.stack([explained_pixels(maps, example).mean() for example in range(call.examples)])
