"""Any attribution as a map in [0, 1] at the input's size, to be fused with another one."""

from collections.abc import Mapping
from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
from captum.attr import Attribution, NoiseTunnel, PerturbationAttribution
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import relu

from captum_fusion._captum import ForwardFunc, eager
from captum_fusion._masking import MaskedForward
from captum_fusion.functional import normalize, upsample


def check_component(name: str, method: Attribution, forward_func: ForwardFunc) -> None:
    """Refuses what is no attribution, and attributions of a model that shares no module with ``forward_func``."""
    if not isinstance(method, Attribution):
        raise TypeError(f"{name} is {method!r}; expected an instance of captum.attr.Attribution")
    explained = (method.attribution_method if isinstance(method, NoiseTunnel) else method).forward_func
    if (
        isinstance(explained, Module)
        and isinstance(forward_func, Module)
        and set(explained.modules()).isdisjoint(forward_func.modules())
    ):
        raise ValueError(
            f"{name} explains another {type(explained).__name__} than forward_func, a {type(forward_func).__name__}; "
            "expected attributions of the same model"
        )


def component_map(
    method: Attribution,
    forward: MaskedForward,
    options: Mapping[str, object],
    further: Mapping[str, object] | None = None,
) -> Tensor:
    r"""G or R: N(U(ReLU(.))) of a component's attributions, summed over the channels.

    Args:
        method (Attribution): The component.
        forward (MaskedForward): What is explained.
        options (Mapping): Arguments for the component's ``attribute``, as far as it takes them.
        further (Mapping or None): Arguments that it has to take. Default: None

    Returns:
        *Tensor* of shape (N, 1, \*S), S being the spatial shape of the first masked input.
    """
    accepted = _accepted_options(method)
    given = {name: value for name, value in options.items() if name in accepted and value is not None}
    # One pass with gradients needs hooks; many masked passes may run compiled.
    with nullcontext() if isinstance(method, PerturbationAttribution) else eager():
        attributions: Any = method.attribute(forward.copies(), **(given | dict(further or {})))
    first = forward.masked[0]
    if isinstance(attributions, tuple):
        attributions = attributions[0 if len(attributions) == 1 else first]
    if len(attributions) != forward.examples or attributions.dim() != forward.inputs[first].dim():
        raise ValueError(
            f"{method.get_name()} gave attributions of shape {tuple(attributions.shape)} for inputs of shape "
            f"{tuple(forward.inputs[first].shape)}; expected as many examples and as many spatial axes"
        )
    evidence = relu(attributions.detach().sum(dim=1, keepdim=True))
    evidence = evidence.to(torch.promote_types(evidence.dtype, torch.float32))
    return normalize(upsample(evidence, forward.size(first)))


def _accepted_options(method: Attribution) -> set[str]:
    names = set(signature(method.attribute).parameters)
    return names | _accepted_options(method.attribution_method) if isinstance(method, NoiseTunnel) else names
