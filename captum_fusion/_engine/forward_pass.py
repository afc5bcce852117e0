"""A model that has run once as it is: what it gave, what its layer gave, and what a row costs."""

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_hook

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import eager, layer_gradients, layer_value, run_forward
from captum_fusion._engine.precision import as_float
from captum_fusion._engine.state import StateGuard, in_turn, preserved


@dataclass(frozen=True)
class ForwardPass:
    """What one unmasked forward pass tells; ``forward_pass`` makes one."""

    call: ModelCall
    layer: Module | None
    attribute_to_layer_input: bool
    output: Tensor
    """What ``forward_func`` returned."""
    unmasked_scores: Tensor
    """The target's score of each example as it is, (N,)."""
    layer_value: Tensor
    r"""A, (N, C, \\*s), float32 or wider, with its graph where gradients were asked for."""
    layer_gradients: Tensor
    r"""The gradients of the targets' scores with respect to A, (N, C, \\*s)."""
    layer_runs: int
    """How often the layer ran; its value is that of the last run."""
    live_bytes: int
    """The most memory that what the modules gave took at once."""
    state: StateGuard

    def cloned_inputs(self) -> Any:
        """The inputs as they were given, for a method that may change them in place."""
        cloned_inputs = tuple(tensor.detach().clone() for tensor in self.call.inputs)
        return cloned_inputs if self.call.is_tuple else cloned_inputs[0]

    def matches(self, call: ModelCall, layer: Module | None, attribute_to_layer_input: bool) -> bool:
        """Whether the forward pass of another call would be the same."""
        return (
            (self.call.forward_func, self.layer, self.attribute_to_layer_input)
            == (call.forward_func, layer, attribute_to_layer_input)
            and _same(self.call.inputs, call.inputs)
            and _same(self.call.additional_forward_args, call.additional_forward_args)
        )


_current: ContextVar[ForwardPass | None] = ContextVar("_current", default=None)


@contextmanager
def isolated() -> Iterator[None]:
    """Lets the methods inside run the model anew, since something else might have changed it in between."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def forward_pass(
    call: ModelCall,
    layer: Module | None = None,
    device_ids: list[int] | None = None,
    attribute_to_layer_input: bool = False,
    *,
    with_gradients: bool = False,
    grad_kwargs: Mapping[str, Any] | None = None,
) -> Iterator[ForwardPass]:
    """Runs the model once as it is; on leaving, everything is as it was.

    A method inside another one's session, such as the components of a fusion, shares that forward pass if its own would
    be the same.
    """
    with preserved(call.inputs) as state:
        outer = _current.get()
        if outer is not None and not with_gradients and outer.matches(call, layer, attribute_to_layer_input):
            unmasked = replace(outer, call=call, unmasked_scores=call.checked_scores(outer.output))
        else:
            unmasked = _run(call, layer, device_ids, attribute_to_layer_input, with_gradients, grad_kwargs, state)
        token = _current.set(unmasked)
        try:
            yield unmasked
        finally:
            _current.reset(token)


def _run(
    call: ModelCall,
    layer: Module | None,
    device_ids: list[int] | None,
    attribute_to_layer_input: bool,
    with_gradients: bool,
    grad_kwargs: Mapping[str, Any] | None,
    state: StateGuard,
) -> ForwardPass:
    output = scores = torch.empty(0)
    passed = False

    def observed(*arguments: Any) -> Any:
        nonlocal output, scores, passed
        given = call.forward_func(*arguments)
        scores, output, passed = call.checked_scores(given), given.detach().clone(), True
        return call.explained(given) if with_gradients else given

    # Free for the model to change in place; with the graph of the inputs, for the attributions that keep it.
    inputs = tuple(tensor.clone() for tensor in call.inputs)
    arguments = tuple(value.clone() if isinstance(value, Tensor) else value for value in call.additional_forward_args)
    given: tuple[Tensor, ...] = ()
    gradients: tuple[Tensor, ...] = ()
    runs: list[None] = []
    with in_turn(), eager(), state.tracking() as draws, _memory(inputs) as memory:
        if layer is None:
            with torch.no_grad():
                run_forward(observed, inputs, arguments)
        else:
            devices = device_ids or getattr(call.forward_func, "device_ids", None)
            where = (arguments, devices, attribute_to_layer_input)
            try:
                with sole_user(layer), _checked(layer, attribute_to_layer_input, runs):
                    if with_gradients:
                        gradients, given = layer_gradients(observed, layer, inputs, None, *where, grad_kwargs)
                    else:
                        given = layer_value(observed, layer, inputs, *where)
            except AssertionError:
                if not passed or runs:
                    raise
                raise _not_run(layer, call) from None
            if len(given) != 1:
                raise ValueError(f"The layer's {_side(attribute_to_layer_input)} has {len(given)} values; {_EXPECTED}")
            _check_map(given[0], call, _side(attribute_to_layer_input))
    if draws.any:
        state.warn_of_chance()
    value, gradient = (as_float(part[0]).to(call.device) if part else torch.empty(0) for part in (given, gradients))
    return ForwardPass(
        call, layer, attribute_to_layer_input, output, scores, value, gradient, len(runs), memory.most, state
    )


_EXPECTED = r"expected a single tensor (N, C, *s) with one to three spatial axes"
VIEW_HINT = (
    "For a layer of tokens or of channels-last maps, pass what captum_fusion.spatial_view gives, with its grid for the "
    "tokens of sequences and volumes."
)


def _side(attribute_to_layer_input: bool) -> str:
    return "input" if attribute_to_layer_input else "output"


@contextmanager
def _checked(layer: Module, attribute_to_layer_input: bool, runs: list[None]) -> Iterator[None]:
    """Refuses a layer that gives something else than tensors of real numbers, before Captum's hooks see it."""
    side = _side(attribute_to_layer_input)

    def check(_: Module, *values: Any) -> None:
        runs.append(None)
        value = values[0 if attribute_to_layer_input else -1]
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if not isinstance(part, Tensor):
                raise ValueError(f"The layer's {side} holds a {type(part).__name__}; {_EXPECTED}")
            if part.is_quantized or part.is_complex():
                raise ValueError(
                    f"The layer's {side} holds {part.dtype} values; {_EXPECTED} that holds real numbers. Give a layer "
                    "that does, or, for a quantized model, the model that it was made from."
                )

    hook = (layer.register_forward_pre_hook if attribute_to_layer_input else layer.register_forward_hook)(check)
    try:
        yield
    finally:
        hook.remove()


def _check_map(value: Tensor, call: ModelCall, side: str) -> None:
    shape = tuple(value.shape)
    if not 3 <= value.dim() <= 5:
        raise ValueError(f"The layer's {side} has shape {shape}; {_EXPECTED}. {VIEW_HINT}")
    if value.dim() == 3 and all(tensor.dim() > 3 for tensor in call.inputs):
        shapes = [tuple(tensor.shape) for tensor in call.inputs]
        raise ValueError(
            f"The layer's {side} has shape {shape}, the inputs {shapes}; expected as many spatial axes. {VIEW_HINT}"
        )
    if len(value) != call.examples:
        raise ValueError(
            f"The layer's {side} has {len(value)} rows for {call.examples} examples; expected one for each example. "
            "Where a model sees several crops or images for each example, explain it for one of them at a time."
        )


def _not_run(layer: Module, call: ModelCall) -> ValueError:
    known = not isinstance(call.forward_func, Module) or layer in set(call.forward_func.modules())
    return ValueError(
        f"The layer {type(layer).__name__} "
        + ("did not run in the forward pass" if known else "is not a module of forward_func")
        + "; expected a module that forward_func calls. A traced, exported or otherwise converted copy of a model does "
        "not call the original's modules."
    )


@contextmanager
def sole_user(layer: Module) -> Iterator[None]:
    """Refuses that another thread runs a layer while hooks record what it gives."""
    thread = threading.get_ident()
    others: list[int] = []

    def note(module: Module, _: object) -> None:
        # The replicas of DataParallel run in other threads, but are other modules; a backward pass may run checkpointed
        # segments again in a thread of its own.
        in_backward = torch._C._current_graph_task_id() != -1
        if module is layer and threading.get_ident() != thread and not in_backward:
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
            f"Another thread ran the layer {type(layer).__name__} while its values were recorded, which mixes up both. "
            "Give each thread a copy of the model, or let the threads take turns."
        ) from failure
    if failure is not None:
        raise failure


class _Memory:
    """How many bytes of what the modules gave are alive, and the most that were at once."""

    def __init__(self, alive: int) -> None:
        self.alive = self.most = alive
        self._tracked: dict[int, weakref.ref[Tensor]] = {}

    def add(self, given: Tensor) -> None:
        key, size = id(given), given.nbytes
        if key in self._tracked:
            return

        def forget(_: object) -> None:
            self.alive -= size
            del self._tracked[key]

        self._tracked[key] = weakref.ref(given, forget)
        self.alive += size
        self.most = max(self.most, self.alive)


@contextmanager
def _memory(inputs: tuple[Tensor, ...]) -> Iterator[_Memory]:
    """Measures what the modules that this thread runs give."""
    memory = _Memory(sum(tensor.nbytes for tensor in inputs))
    thread = threading.get_ident()

    def measure(_: Module, __: object, output: Any) -> None:
        if isinstance(output, Tensor) and threading.get_ident() == thread:
            memory.add(output)

    hook = register_module_forward_hook(measure)
    try:
        yield memory
    finally:
        hook.remove()


def _same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    return len(first) == len(second) and all(
        (one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all()))
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.device == other.device
        else one is other
        for one, other in zip(first, second, strict=True)
    )
