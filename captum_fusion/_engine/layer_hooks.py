"""Hooks on the layer while its value is recorded: they refuse what is no feature map, and other threads."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.guards import batch_hint, warn_of_channels_last
from captum_fusion._engine.spatial_view import PackedError
from captum_fusion._engine.token_grid import tensors_in

_EXPECTED = r"expected a single tensor (N, C, *s) with one to three spatial axes"
VIEW_HINT = (
    "For a layer of tokens or channels-last maps, pass its captum_fusion.spatial_view, with a grid for the tokens of "
    "sequences and volumes."
)


def _side(attribute_to_layer_input: bool) -> str:
    return "input" if attribute_to_layer_input else "output"


@contextmanager
def checked_values(layer: Module, attribute_to_layer_input: bool, runs: list[None]) -> Iterator[None]:
    """Refuses a layer's value that holds anything but tensors of real numbers, before Captum's hooks see it."""
    side = _side(attribute_to_layer_input)

    def check(_: Module, *values: Any) -> None:
        # A backward pass runs checkpointed segments again.
        if torch._C._current_graph_task_id() == -1:
            runs.append(None)
        value: Any = values[0] if attribute_to_layer_input else values[-1]
        # Captum's hooks see a tensor as it is, or as the only entry of a tuple.
        only = value[0] if type(value) is tuple and len(value) == 1 else value
        everything = values if attribute_to_layer_input else value
        if not isinstance(only, Tensor) and len(tensors_in(everything)) == 1:
            raise PackedError
        if attribute_to_layer_input and not value:
            raise ValueError(
                f"The layer takes {len(tensors_in(everything))} tensors by keyword; {_EXPECTED}, as its input. Name a "
                "layer that takes one, or the output of the one before it."
            )
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if not isinstance(part, Tensor):
                raise ValueError(f"The layer's {side} holds a {type(part).__name__}; {_EXPECTED}")
            if part.is_quantized or part.is_complex():
                raise ValueError(
                    f"The layer's {side} holds {part.dtype} values; {_EXPECTED} that holds real numbers. Choose "
                    "another layer, or, for a quantized model, explain the model before quantization."
                )
        if isinstance(value, (tuple, list)) and len(value) > 1:
            raise ValueError(f"The layer's {side} has {len(value)} values; {_EXPECTED}")

    hook = (
        layer.register_forward_pre_hook(check, with_kwargs=True)
        if attribute_to_layer_input
        else layer.register_forward_hook(check)
    )
    with hook:
        yield


def check_map(value: Tensor, call: ModelCall) -> None:
    """Refuses a value of the layer that is no feature map of the examples."""
    shape, side = tuple(value.shape), _side(call.attribute_to_layer_input)
    if not 3 <= value.dim() <= 5:
        raise ValueError(f"The layer's {side} has shape {shape}; {_EXPECTED}. {VIEW_HINT}")
    if value.dim() == 3 and all(tensor.dim() > 3 for tensor in call.tensors):
        shapes = [tuple(tensor.shape) for tensor in call.tensors]
        raise ValueError(
            f"The layer's {side} has shape {shape}, and the inputs have shapes {shapes}; expected the same number of "
            f"spatial axes. {VIEW_HINT}"
        )
    if len(value) != call.examples:
        raise ValueError(
            f"The layer's {side} has {len(value)} rows for {call.examples} examples; expected one for each example. "
            "If the model takes several crops or images for each example, explain one of them at a time."
            f"{batch_hint(call.tensors)}"
        )
    if value.dim() > 3:
        warn_of_channels_last(shape, [tuple(tensor.shape[2:]) for tensor in call.tensors], VIEW_HINT)


def not_run(layer: Module, call: ModelCall) -> ValueError:
    """The error for a layer that did not run."""
    is_foreign = isinstance(call.forward_func, Module) and layer not in set(call.forward_func.modules())
    return ValueError(
        f"The layer {type(layer).__name__} "
        + ("is not a module of forward_func" if is_foreign else "did not run in the forward pass")
        + "; expected a module that forward_func calls. A view runs only inside its with block. A traced, exported or "
        "otherwise converted copy of a model does not call the original's modules."
    )


@contextmanager
def sole_user(layer: Module) -> Iterator[None]:
    """Refuses a run of the layer by another thread while its values are recorded."""
    thread = threading.get_ident()
    others: list[int] = []

    def note(module: Module, _: object) -> None:
        # The replicas of DataParallel run in other threads, but are other modules; a backward pass may run checkpointed
        # segments again in a thread of its own.
        if module is layer and threading.get_ident() != thread and torch._C._current_graph_task_id() == -1:
            others.append(threading.get_ident())

    hook = layer.register_forward_pre_hook(note)
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    finally:
        hook.remove()
    if others:
        raise RuntimeError(
            f"Another thread ran the layer {type(layer).__name__} while its values were recorded, and the values of "
            "both threads are mixed. Give each thread its own copy of the model, or let the threads take turns."
        ) from failure
    if failure is not None:
        raise failure
