"""Every attribution class that is registered, so that a new one is tested without a change here."""

from functools import cache
from inspect import signature
from typing import Any

import torch
from captum.attr import Attribution, GradientAttribution, LayerAttribution
from torch import Tensor, nn

from captum_fusion import attr


class LayerSSCam(attr.LayerSSCam):
    """With few samples, as the small networks of the tests need no more."""

    def __init__(self, forward_func: Any, layer: Any, device_ids: list[int] | None = None) -> None:
        super().__init__(forward_func, layer, device_ids, samples=2)


class LayerISCam(attr.LayerISCam):
    """Likewise."""

    def __init__(self, forward_func: Any, layer: Any, device_ids: list[int] | None = None) -> None:
        super().__init__(forward_func, layer, device_ids, samples=2)


METHODS: list[type[LayerAttribution]] = [
    method
    for method in (globals().get(method.__name__, method) for method in attr.METHODS)
    if issubclass(method, LayerAttribution)
]


def accepted(attribution: Attribution, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the attribution takes: no baselines where nothing is masked."""
    return {name: value for name, value in arguments.items() if name in signature(attribution.attribute).parameters}


def takes(algorithm: type[Attribution], argument: str) -> bool:
    return argument in signature(algorithm.attribute).parameters


def keeps_the_graph(algorithm: type[Attribution]) -> bool:
    """Whether it is differentiable as ``LayerGradCam`` is: a gradient method at the layer's resolution."""
    return issubclass(algorithm, GradientAttribution) and not has_input_shape(algorithm)


@cache
def has_input_shape(algorithm: type[Attribution]) -> bool:
    """Whether the attribution has the input's shape, found by running it once on three channels."""
    layer = nn.Identity()

    def forward(x: Tensor) -> Tensor:
        return layer(x).mean(2)

    with torch.random.fork_rng():
        attributions = algorithm(forward, layer).attribute(torch.rand(1, 3, 4), target=1)
    assert attributions.shape in ((1, 1, 4), (1, 3, 4))
    return attributions.shape == (1, 3, 4)


def at_input_size(attributions: Tensor, inputs: Tensor) -> Tensor:
    """Attributions in the input's shape, as Captum's metrics and its visualization take them."""
    return LayerAttribution.interpolate(attributions, inputs.shape[2:], "bilinear").expand_as(inputs)


class _InputShaped:
    """The methods whose attributions have the input's shape, found when asked for and not when tests are collected."""

    def __contains__(self, algorithm: object) -> bool:
        return algorithm in METHODS and has_input_shape(algorithm)


INPUT_SHAPED = _InputShaped()
