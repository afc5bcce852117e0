"""Attributions that are fused with others."""

from collections.abc import Mapping
from contextlib import ExitStack
from inspect import Parameter, signature
from typing import Any

from captum.attr import Attribution, PerturbationAttribution
from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.captum import ForwardFunc, eager
from captum_fusion._engine.forward_pass import isolated, sole_user
from captum_fusion._engine.masking import MaskedScorer
from captum_fusion._engine.saliency import saliency_map
from captum_fusion._engine.state import in_turn


def check_component(name: str, method: object, forward_func: ForwardFunc | None) -> None:
    """Refuses what is no attribution, and attributions of a model that shares no module with ``forward_func``."""
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


def component_map(
    name: str,
    method: Attribution,
    scorer: MaskedScorer,
    show_progress: bool,
    further: Mapping[str, object] | None = None,
) -> Tensor:
    r"""G or R: the saliency map of a component's attributions, N(U(ReLU(.))).

    Args:
        name (str): What the component is, for messages.
        method (Attribution): The component.
        scorer (Scorer): What is explained. What the user gave for it reaches the component as far as it takes it.
        show_progress (bool): Likewise.
        further (Mapping or None): Arguments that the component has to take. Default: None

    Returns:
        *Tensor* of shape (N, 1, \*S), S being the spatial shape of the first masked input.
    """
    call = scorer.call
    # Again, since forward_func may have been set since.
    check_component(name, method, call.forward_func)
    options = {
        "target": call.target,
        "additional_forward_args": call.additional_forward_args or None,
        "baselines": call.given_baselines,
        "attribute_to_layer_input": scorer.forward_pass.attribute_to_layer_input or None,
        # As the component has it unless another one is asked for.
        "interpolate_mode": None if scorer.interpolate_mode == "bilinear" else scorer.interpolate_mode,
        "perturbations_per_eval": scorer.perturbations_per_eval,
        "show_progress": show_progress or None,
    }
    given = _accepted(name, method, {option: value for option, value in options.items() if value is not None})
    with ExitStack() as stack:
        if not type(method).__module__.startswith("captum_fusion.") or hasattr(method, "attribution_method"):
            # Our methods watch themselves, and change nothing that the forward pass that they share depends on.
            stack.enter_context(scorer.forward_pass.state.tracking())
            stack.enter_context(isolated())
        if not isinstance(method, PerturbationAttribution):
            # One pass with gradients needs hooks; many masked passes may run compiled.
            stack.enter_context(in_turn())
            stack.enter_context(eager())
            if isinstance(layer := getattr(method, "layer", None), Module):
                stack.enter_context(sole_user(layer))
        attributions: Any = method.attribute(scorer.forward_pass.cloned_inputs(), **(given | dict(further or {})))
    first = scorer.masked[0]
    if isinstance(attributions, tuple):
        attributions = attributions[0 if len(attributions) == 1 else first]
    shape = tuple(scorer.inputs[first].shape)
    if len(attributions) != call.examples or attributions.dim() != len(shape):
        raise ValueError(
            f"{method.get_name()} gave attributions of shape {tuple(attributions.shape)} for inputs of shape {shape}; "
            "expected as many examples and as many spatial axes"
        )
    return saliency_map(attributions, scorer.size, interpolate_mode=scorer.interpolate_mode)


def _accepted(name: str, method: Attribution, options: dict[str, Any]) -> dict[str, Any]:
    """The options that the component takes."""
    parameters = dict(signature(method.attribute).parameters)
    inner = getattr(method, "attribution_method", None)
    if isinstance(inner, Attribution):
        # A tunnel passes on what its method takes.
        return {option: options[option] for option in options.keys() & parameters} | _accepted(name, inner, options)
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
        # A wrapper that says nothing gets what the user gave, and refuses what it cannot pass on.
        return options
    if any(parameter.kind is Parameter.VAR_POSITIONAL for parameter in parameters.values()):
        lost = [option for option in ("target", "additional_forward_args") if option in options.keys() - parameters]
        if lost:
            raise TypeError(
                f"{name}, {type(method).__name__}, cannot be given {' and '.join(lost)}: its attribute takes *args "
                "only; expected one that takes Captum's arguments by their names"
            )
    return {option: value for option, value in options.items() if option in parameters}
