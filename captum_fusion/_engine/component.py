"""Attributions as components of a fusion."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import copy
from inspect import Parameter, signature
from typing import Any

import torch
from captum.attr import Attribution, LayerAttribution, PerturbationAttribution
from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.captum import ForwardFunc, eager
from captum_fusion._engine.forward_pass import isolated
from captum_fusion._engine.guards import explain_missing_graph
from captum_fusion._engine.layer_hooks import sole_user
from captum_fusion._engine.masking import MaskedScorer
from captum_fusion._engine.saliency import saliency_map
from captum_fusion.arguments import check_tolerance
from captum_fusion.functional._numerics import broadcast_to


def check_component(name: str, method: object, forward_func: ForwardFunc | None) -> None:
    """Refuses anything but an attribution, and attributions of a model that shares no module with ``forward_func``."""
    if not isinstance(method, Attribution):
        raise TypeError(f"{name} is {method!r}; expected an instance of captum.attr.Attribution")
    explained = getattr(method, "attribution_method", method).forward_func
    if (
        isinstance(explained, Module)
        and isinstance(forward_func, Module)
        and set(explained.modules()).isdisjoint(forward_func.modules())
    ):
        raise ValueError(
            f"{name} explains another {type(explained).__name__} than forward_func, a {type(forward_func).__name__}; "
            "expected attributions of the same model"
        )


def check_region_tolerance(tolerance: float, region_method: Attribution | None) -> None:
    """Refuses a tolerance that would have no effect, since the region method has its own."""
    check_tolerance(tolerance)
    if tolerance and region_method is not None:
        raise ValueError(
            f"tolerance is {tolerance!r}, but it applies to the default region method only; set it in your region "
            f"method, here {type(region_method).__name__}, as in LayerScoreCam(model, layer, tolerance={tolerance!r})"
        )


def component_maps(
    scorer: MaskedScorer,
    name: str,
    method: Attribution,
    further: Mapping[str, object] | None = None,
    attributions: Tensor | tuple[Tensor, ...] | None = None,
    *,
    to_map: Callable[..., Tensor] = saliency_map,
) -> dict[int, Tensor]:
    r"""Computes G or R: the maps of a component's attributions, by the position of the masked input.

    The first masked input always has a map; other inputs without an entry share it. The component receives those of the
    call's arguments that it accepts, and all of ``further``. ``attributions`` are used instead if they exist already.
    Error messages call the component ``name``. ``to_map`` is ``region_map`` for R.
    """
    if attributions is None:
        source, attributions = method.get_name(), _attributions(scorer, name, method, further)
    elif further:
        raise ValueError(f"The arguments {dict(further)} of {name} have no effect, because you pass its attributions")
    else:
        source = f"The caller of {name}"
    call, first = scorer.call, scorer.positions[0]
    if isinstance(attributions, tuple) and (
        len(attributions) not in (1, len(scorer.inputs)) or not all(isinstance(a, Tensor) for a in attributions)
    ):
        raise ValueError(
            f"{source} gave {[type(part).__name__ for part in attributions]}; expected only attributions, one for each "
            "input or one for all. Remove arguments such as return_convergence_delta."
        )
    parts = attributions if isinstance(attributions, tuple) else (attributions,)
    maps: dict[int, Tensor] = {}
    for position in scorer.positions if len(parts) > 1 else (first,):
        value = call.of_input(parts[position if len(parts) > 1 else 0], position)
        shape = tuple(scorer.inputs[position].shape)
        if len(value) != call.examples or value.dim() != len(shape):
            raise ValueError(
                f"{source} gave attributions of shape {tuple(value.shape)} for inputs of shape {shape}; "
                "expected the same number of examples and of spatial axes"
            )
        size = scorer.size_of(position)
        maps[position] = to_map(value.to(call.device), size, interpolate_mode=call.interpolate_mode)
        if position != first:
            # An example with zeros only has no map of its own, as of a method whose layer sees another input.
            none = broadcast_to(~value.to(call.device).flatten(1).any(dim=1), value)
            maps[position] = torch.where(none, scorer.upsample(maps[first], position), maps[position])
    return maps


def _attributions(
    scorer: MaskedScorer, name: str, method: Attribution, further: Mapping[str, object] | None
) -> Tensor | tuple[Tensor, ...]:
    """The attributions that the component computes."""
    call, unmasked = scorer.call, scorer.forward_pass
    # Checked again, because forward_func can be assigned after the constructor.
    check_component(name, method, call.forward_func)
    options = {
        "target": call.targets,
        "additional_forward_args": call.arguments or None,
        "baselines": call.baselines,
        "channel_dim": None if call.channel_dim == 1 else call.channel_dim,
        "attribute_to_layer_input": call.attribute_to_layer_input or None,
        # As the component has it unless another one is asked for.
        "interpolate_mode": None if call.interpolate_mode == "bilinear" else call.interpolate_mode,
        "perturbations_per_eval": call.perturbations_per_eval,
        "show_progress": call.show_progress or None,
    }
    options = _accepted(name, method, {option: value for option, value in options.items() if value is not None})
    packed = unmasked.packed_layer
    if packed is not None and isinstance(method, LayerAttribution) and method.layer is packed:
        # Captum's methods see no tensor at such a layer, but at the module that takes it out.
        method = copy(method)
        method.layer = call.layer
    with ExitStack() as stack:
        if not type(method).__module__.startswith("captum_fusion.") or hasattr(method, "attribution_method"):
            # This package's methods track their own state, and leave the shared forward pass valid.
            stack.enter_context(unmasked.state.tracking(call.forward_func))
            stack.enter_context(isolated())
        if not isinstance(method, PerturbationAttribution):
            # One pass with gradients needs hooks; many masked passes may run compiled.
            stack.enter_context(eager())
            if isinstance(layer := getattr(method, "layer", None), Module):
                stack.enter_context(sole_user(layer))
        try:
            attributions: Tensor | tuple[Tensor, ...] = method.attribute(
                unmasked.cloned_inputs(), **(options | dict(further or {}))
            )
        except RuntimeError as error:
            explain_missing_graph(error)
            raise
    return attributions


def _accepted(name: str, method: Attribution, options: dict[str, Any]) -> dict[str, Any]:
    """The options that the component takes."""
    parameters = dict(signature(method.attribute).parameters)
    inner = getattr(method, "attribution_method", None)
    if isinstance(inner, Attribution):
        # A tunnel passes on what its method takes.
        return {option: options[option] for option in options.keys() & parameters} | _accepted(name, inner, options)
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
        # A wrapper with **kwargs does not show what it accepts: it gets everything, and refuses what it cannot pass on.
        return options
    if any(parameter.kind is Parameter.VAR_POSITIONAL for parameter in parameters.values()):
        lost = [option for option in ("target", "additional_forward_args") if option in options.keys() - parameters]
        if lost:
            raise TypeError(
                f"{name}, {type(method).__name__}, does not take {' and '.join(lost)} by name: its attribute takes "
                "*args only; expected one that takes Captum's arguments by their names"
            )
    return {option: value for option, value in options.items() if option in parameters}
