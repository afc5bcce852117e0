"""Several metrics of the same attributions from shared forward passes."""

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import BaselineType, ForwardFunc, TargetType
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.forward_pass import forward_pass
from captum_fusion._engine.guards import check_replace
from captum_fusion._engine.masking import Replace
from captum_fusion._engine.saliency import saliency_maps
from captum_fusion.arguments import Activation, Sign
from captum_fusion.metrics.confidence import drop, increase, probabilities
from captum_fusion.metrics.curves import curve_of
from captum_fusion.metrics.road import road_of

MaskingMetric = Literal["confidence_drop", "confidence_increase", "insertion", "deletion", "road"]
MASKING_METRICS: tuple[MaskingMetric, ...] = get_args(MaskingMetric)


@fill_docstring
def evaluate(
    forward_func: ForwardFunc,
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor | tuple[Tensor | None, ...],
    metrics: Sequence[MaskingMetric] = MASKING_METRICS,
    baselines: BaselineType = None,
    additional_forward_args: object = None,
    target: TargetType = None,
    *,
    activation: Activation | None = "softmax",
    sign: Sign = "positive",
    steps: int = 100,
    perturbations_per_eval: int | None = None,
    show_progress: bool = False,
    replace: Replace | None = None,
    channel_dim: int = 1,
) -> dict[str, Tensor]:
    r"""Computes several metrics of the same attributions from shared forward passes.

    All metrics share one pass of the unmasked input. ``confidence_drop`` and ``confidence_increase`` also share the
    pass of the masked input. Every value equals that of the metric's own function.

    Args:
        {forward_func}
        {inputs}
        {attributions}
        metrics (list[str], optional): Some of "confidence_drop", "confidence_increase", "insertion", "deletion" and
            "road". Default: all of them
        baselines (Tensor, number, or tuple, optional): What a masked-out value is replaced with: a number, a tensor of
            the input's shape or with one example, or for a tuple of inputs a tuple of these. With ``replace``, only
            ``confidence_drop`` and ``confidence_increase`` take them. Default: None, which means 0, and for insertion
            the input blurred as in ``insertion``
        {additional_forward_args}
        {target}
        {activation}
        {sign}
        steps (int, optional): The number of steps of insertion and deletion, at least 1. Default: 100
        {progress_arguments}
        {replace}
            Default: None, which means the baselines for "insertion" and "deletion", and imputation for "road"
        {channel_dim}

    Returns:
        *dict* from the name of each metric to a *Tensor* of shape (N,). "insertion" and "deletion" add their curves,
        "insertion_curve" and "deletion_curve", of shape (N, steps + 1): the probability after each step, from no pixel
        to all pixels. "road" adds the values of its two orders, "road_most" and "road_least"; "road" is half of their
        difference.

    Raises:
        ValueError: If a metric is unknown.
        {metric_errors}

    Examples::

        {attributions_example}
        >>> values = evaluate(model, images, attributions, ["confidence_drop", "deletion"], target=281, steps=8)
        >>> list(values), values["deletion_curve"].shape
        (['confidence_drop', 'deletion', 'deletion_curve'], torch.Size([2, 9]))
    """
    unknown = [name for name in metrics if name not in MASKING_METRICS]
    if isinstance(metrics, str) or unknown:
        raise ValueError(f"metrics is {metrics!r}; expected some of {MASKING_METRICS}")
    check_replace(replace, None)
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
    maps = saliency_maps(call, attributions, sign)
    values: dict[str, Tensor] = {}
    with forward_pass(call, measure_memory=True):
        if {"confidence_drop", "confidence_increase"} & set(metrics):
            both = probabilities(call, maps)
        for name in metrics:
            if name == "confidence_drop":
                values[name] = drop(*both)
            elif name == "confidence_increase":
                values[name] = increase(*both)
            elif name == "road":
                most, least = road_of(call, maps, replace=replace).values()
                values |= {"road": (least - most) / 2, "road_most": most, "road_least": least}
            else:
                curve = curve_of(call, maps, steps, restores=name == "insertion", replace=replace)
                values |= {name: curve.area, f"{name}_curve": curve.probabilities}
    return values
