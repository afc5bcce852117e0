"""One unmasked forward pass: the output, the layer's value and gradients, and the memory of a row."""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_hook

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import eager, layer_gradients, layer_value, run_forward
from captum_fusion._engine.guards import (
    ProbabilityWatch,
    batch_hint,
    check_layer,
    check_layer_values,
    check_runs,
    explain_missing_graph,
    undetected_examples,
    warn_of_undetected,
)
from captum_fusion._engine.layer_hooks import check_map, checked_values, not_run, sole_user
from captum_fusion._engine.second_order import SecondOrder
from captum_fusion._engine.spatial_view import PackedError, unpacked
from captum_fusion._engine.state import StateGuard, preserved
from captum_fusion.functional import as_float
from captum_fusion.functional._numerics import broadcast_to


@dataclass(frozen=True)
class Differentiation:
    """The scores to differentiate at the layer."""

    scores_of: Callable[[Tensor], Tensor]
    """The scores to differentiate, from the output of ``forward_func``."""
    grad_kwargs: Mapping[str, Any] | None = None
    """Further arguments of ``torch.autograd.grad``."""
    hessian: bool = False
    """Whether to differentiate once more, along the layer's value."""


@dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """The results of one unmasked forward pass; ``forward_pass`` makes it."""

    call: ModelCall
    output: Tensor
    """The return value of ``forward_func``."""
    unmasked_scores: Tensor
    """The target's score of each example, (N,)."""
    layer_value: Tensor
    r"""A, (N, C, \*s), float32 or wider, with its graph where gradients were asked for."""
    layer_gradients: Tensor
    r"""The gradients of the targets' scores with respect to A, (N, C, \*s)."""
    hessian_products: Tensor
    r"""The Hessian of the targets' scores with respect to A, times A, (N, C, \*s), where it was asked for."""
    layer_runs: int
    """The number of runs of the layer; its value is that of the last one."""
    state: StateGuard
    peak_bytes: int = 0
    """The peak size of the inputs and the live outputs of all modules; 0 if it was not measured."""
    packed_layer: Module | None = None
    """The caller's layer, if ``call.layer`` is a module that unpacks the only tensor of its value; else None."""

    @cached_property
    def scale(self) -> Tensor:
        """The largest absolute value in the inputs and outputs of each example, (N,), for ``functional.rounding``."""
        values = [tensor for tensor in (self.output, *self.call.tensors) if tensor.is_floating_point()]
        # Infinite logits, of classes that are ruled out, tell nothing about rounding.
        rows = [value.detach().reshape(self.call.examples, -1).nan_to_num(0, 0, 0).abs() for value in values]
        return torch.stack([row.amax(dim=1).to(self.unmasked_scores) for row in rows if row.numel()]).amax(dim=0)

    def cloned_inputs(self) -> Any:
        """The inputs in the caller's form, for a method that may change them in place."""
        return self.call.in_form(tuple(tensor.detach().clone() for tensor in self.call.tensors))

    def matches(self, call: ModelCall) -> bool:
        """Whether the forward pass of another call would be the same."""
        mine, other = ((each.forward_func, each.layer, each.attribute_to_layer_input) for each in (self.call, call))
        return mine == other and _same((*self.call.tensors, *self.call.arguments), (*call.tensors, *call.arguments))


_current: ContextVar[ForwardPass | None] = ContextVar("_current", default=None)


@contextmanager
def isolated() -> Iterator[None]:
    """Stops methods inside the block from sharing the forward pass, because others may have changed the model."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def forward_pass(
    call: ModelCall,
    *,
    differentiation: Differentiation | None = None,
    with_graph: bool = False,
    measure_memory: bool = False,
    scored: bool = True,
) -> Iterator[ForwardPass]:
    """Runs the model once on the unmasked inputs; on leaving, everything is as it was.

    ``with_graph`` keeps the graph of the layer's value without gradients. Without ``scored``, no target is selected,
    and the output may be anything. A method inside another one, such as a component of a fusion, shares the outer
    forward pass if its own would be the same.
    """
    with preserved(call.tensors) as state, ExitStack() as stack:
        outer = _current.get()
        if outer is not None and differentiation is None and not with_graph and scored and outer.matches(call):
            unmasked = replace(outer, call=call, unmasked_scores=call.checked_scores(outer.output))
        else:
            # Measuring hooks every module, which would slow a single pass of a tiny network.
            with _memory(call.tensors) if measure_memory else nullcontext() as memory:
                try:
                    unmasked = _run(call, state, differentiation, with_graph, scored)
                except PackedError:
                    packed = check_layer(call.layer)
                    module = stack.enter_context(unpacked(packed, call.attribute_to_layer_input))
                    call = replace(call, layer=module, attribute_to_layer_input=False)
                    unmasked = _run(call, state, differentiation, with_graph, scored)
                    unmasked = replace(unmasked, packed_layer=packed)
            if memory:
                unmasked = replace(unmasked, peak_bytes=memory.most)
        token = _current.set(unmasked)
        try:
            yield unmasked
        finally:
            _current.reset(token)


def _run(
    call: ModelCall, state: StateGuard, differentiation: Differentiation | None, with_graph: bool, scored: bool
) -> ForwardPass:
    output = scores = torch.empty(0)
    passed = False
    empty: set[int] = set()
    grad_kwargs = dict((differentiation and differentiation.grad_kwargs) or {})
    second_order = SecondOrder(call, grad_kwargs) if differentiation and differentiation.hessian else None

    def observed(*arguments: Any) -> Any:
        nonlocal output, scores, passed
        token = undetected_examples.set(empty)
        try:
            watch = ProbabilityWatch() if scored and call.activation else None
            with second_order.running() if second_order else nullcontext(), watch or nullcontext():
                result = call.run(*arguments)
            if scored:
                scores, output = call.checked_scores(result), result.detach().clone()
            if watch and call.activation:
                watch.warn(result, call.activation)
        except (RuntimeError, ValueError, IndexError) as error:
            if hint := batch_hint(call.tensors):
                raise type(error)(f"{str(error).rstrip('.')}.{hint}") from error
            raise
        finally:
            undetected_examples.reset(token)
        passed = True
        return result if differentiation is None else differentiation.scores_of(result)

    # Free for the model to change in place; with the graph of the inputs, for the attributions that keep it.
    inputs = tuple(tensor.clone() for tensor in call.tensors)
    arguments = tuple(value.clone() if isinstance(value, Tensor) else value for value in call.arguments)
    values: tuple[Tensor, ...] = ()
    gradients: tuple[Tensor, ...] = ()
    products: tuple[Tensor, ...] = ()
    runs: list[None] = []
    with eager(), state.tracking(call.forward_func):
        if call.layer is None:
            with torch.no_grad():
                run_forward(observed, inputs, None, arguments)
        else:
            devices = call.device_ids or getattr(call.forward_func, "device_ids", None)
            side = call.attribute_to_layer_input
            try:
                with sole_user(call.layer), checked_values(call.layer, side, runs):
                    if differentiation is not None:
                        gradients, values = layer_gradients(
                            observed,
                            call.layer,
                            inputs,
                            additional_forward_args=arguments,
                            device_ids=devices,
                            attribute_to_layer_input=side,
                            grad_kwargs=second_order.grad_kwargs if second_order else grad_kwargs,
                        )
                        if second_order:
                            gradients, products = second_order.gradients_and_products(gradients, values)
                    else:
                        values = layer_value(observed, inputs, call.layer, arguments, devices, side, with_graph)
            except RuntimeError as error:
                explain_missing_graph(error)
                raise
            except AssertionError:
                if not passed or runs:
                    raise
                raise not_run(call.layer, call) from None
            check_map(values[0], call)
            check_runs(call.layer, len(runs), [tuple(tensor.shape) for tensor in call.tensors])
    state.warn_of_chance()
    value, gradient, product = (
        as_float(part[0]).to(call.device) if part else torch.empty(0) for part in (values, gradients, products)
    )
    check_layer_values(value, "activations")
    check_layer_values(gradient, "gradients")
    check_layer_values(product, "second derivatives")
    warn_of_undetected(empty)
    if empty and value.numel():
        # A layer of zeros has a map of zeros by every method.
        rows = torch.tensor([i not in empty for i in range(call.examples)], device=value.device)
        value = value * broadcast_to(rows, value)
    return ForwardPass(
        call=call,
        output=output,
        unmasked_scores=scores,
        layer_value=value,
        layer_gradients=gradient,
        hessian_products=product,
        layer_runs=len(runs),
        state=state,
    )


class _Memory:
    """Counts the bytes of live module outputs, and their maximum."""

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
    """Measures the outputs of the modules that this thread runs."""
    memory = _Memory(sum(tensor.nbytes for tensor in inputs))
    thread = threading.get_ident()

    def measure(_: Module, __: object, output: Any) -> None:
        if isinstance(output, Tensor) and threading.get_ident() == thread:
            memory.add(output)

    with register_module_forward_hook(measure):
        yield memory


def _same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    return len(first) == len(second) and all(
        one.dtype == other.dtype and torch.equal(one, other)
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.device == other.device
        else one is other
        for one, other in zip(first, second, strict=True)
    )
