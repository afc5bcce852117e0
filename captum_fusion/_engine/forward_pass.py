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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import eager, layer_gradients, layer_value, run_forward
from captum_fusion._engine.guards import (
    batch_hint,
    check_layer,
    check_layer_values,
    check_runs,
    explain_missing_graph,
    nothing_found,
    warn_of_nothing_found,
)
from captum_fusion._engine.spatial_view import PackedError, unpacked
from captum_fusion._engine.state import StateGuard, preserved
from captum_fusion._engine.token_grid import tensors_in
from captum_fusion.functional import as_float


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
    live_bytes: int = 0
    """The most memory that the outputs of the modules took at once, where it was measured."""
    packed_layer: Module | None = None
    """The layer that was named, where ``call.layer`` is the module that takes the only tensor out of its value."""

    @cached_property
    def scale(self) -> Tensor:
        """The largest absolute value in the inputs and outputs of each example, (N,), for ``functional.rounding``."""
        values = [tensor for tensor in (self.output, *self.call.tensors) if tensor.is_floating_point()]
        # Infinite logits, of classes that are ruled out, say nothing of rounding.
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
    """Lets the methods inside run the model again, since something else might have changed it in between."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def forward_pass(
    call: ModelCall,
    *,
    gradients_of: Callable[[Tensor], Tensor] | None = None,
    grad_kwargs: Mapping[str, Any] | None = None,
    with_graph: bool = False,
    with_hessian: bool = False,
    measure_memory: bool = False,
    scored: bool = True,
) -> Iterator[ForwardPass]:
    """Runs the model once as it is, and takes the gradients of scores of its output; on leaving, all is as it was.

    Without gradients, the layer's value may still keep its graph, ``with_graph``. With them, the scores may be
    differentiated once more, ``with_hessian``. Where no target is explained, not ``scored``, the output may be
    anything.

    A method inside another one, such as a component of a fusion, shares the outer forward pass if its own would be the
    same.
    """
    with preserved(call.tensors) as state, ExitStack() as stack:
        outer = _current.get()
        if outer is not None and gradients_of is None and not with_graph and scored and outer.matches(call):
            unmasked = replace(outer, call=call, unmasked_scores=call.checked_scores(outer.output))
        else:
            # A hook on every module is what a single pass of a tiny network does not need.
            with _memory(call.tensors) if measure_memory else nullcontext() as memory:
                try:
                    unmasked = _run(call, state, gradients_of, grad_kwargs, with_graph, with_hessian, scored)
                except PackedError:
                    packed = check_layer(call.layer)
                    module = stack.enter_context(unpacked(packed, call.attribute_to_layer_input))
                    call = replace(call, layer=module, attribute_to_layer_input=False)
                    unmasked = _run(call, state, gradients_of, grad_kwargs, with_graph, with_hessian, scored)
                    unmasked = replace(unmasked, packed_layer=packed)
            if memory:
                unmasked = replace(unmasked, live_bytes=memory.most)
        token = _current.set(unmasked)
        try:
            yield unmasked
        finally:
            _current.reset(token)


def _run(
    call: ModelCall,
    state: StateGuard,
    gradients_of: Callable[[Tensor], Tensor] | None,
    grad_kwargs: Mapping[str, Any] | None,
    with_graph: bool,
    with_hessian: bool,
    scored: bool,
) -> ForwardPass:
    output = scores = torch.empty(0)
    passed = False
    empty: set[int] = set()
    second_order = _SecondOrder(call, grad_kwargs) if with_hessian else None

    def observed(*arguments: Any) -> Any:
        nonlocal output, scores, passed
        token = nothing_found.set(empty)
        try:
            with second_order.running() if second_order else nullcontext():
                result = call.run(*arguments)
            if scored:
                scores, output = call.checked_scores(result), result.detach().clone()
        except (RuntimeError, ValueError, IndexError) as error:
            if hint := batch_hint(call.tensors):
                raise type(error)(f"{str(error).rstrip('.')}.{hint}") from error
            raise
        finally:
            nothing_found.reset(token)
        passed = True
        return result if gradients_of is None else gradients_of(result)

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
                with sole_user(call.layer), _checked(call.layer, side, runs):
                    if gradients_of is not None:
                        gradients, values = layer_gradients(
                            observed,
                            call.layer,
                            inputs,
                            additional_forward_args=arguments,
                            device_ids=devices,
                            attribute_to_layer_input=side,
                            grad_kwargs=second_order.grad_kwargs if second_order else dict(grad_kwargs or {}),
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
                raise _not_run(call.layer, call) from None
            _check_map(values[0], call, _side(side))
            check_runs(len(runs), [tuple(tensor.shape) for tensor in call.tensors])
    state.warn_of_chance()
    value, gradient, product = (
        as_float(part[0]).to(call.device) if part else torch.empty(0) for part in (values, gradients, products)
    )
    check_layer_values(value, "activations")
    check_layer_values(gradient, "gradients")
    check_layer_values(product, "second derivatives")
    warn_of_nothing_found(empty)
    if empty and value.numel():
        # A layer of zeros has a map of zeros by every method.
        rows = torch.tensor([i not in empty for i in range(call.examples)], device=value.device)
        value = value * rows.reshape(-1, *(1,) * (value.dim() - 1))
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


class _SecondOrder:
    """Differentiates the gradients of a layer once more, along its value."""

    def __init__(self, call: ModelCall, grad_kwargs: Mapping[str, Any] | None) -> None:
        self.call = call
        self.keeps_graph = bool((grad_kwargs or {}).get("create_graph"))
        self.grad_kwargs = {**(grad_kwargs or {}), "create_graph": True}
        self.values: dict[torch.device, Tensor] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keeps the value that the scores follow from: Captum gives a copy of it, which they do not."""

        def keep(_: Module, *values: Any) -> Any:
            value = values[0] if self.call.attribute_to_layer_input else values[-1]
            parts = value if isinstance(value, tuple) else (value,)
            if len(parts) != 1 or not isinstance(parts[0], Tensor):
                return None
            self.values[parts[0].device] = parts[0]
            # The next module may work in place.
            return (parts[0].clone(),) if isinstance(value, tuple) else parts[0].clone()

        layer = check_layer(self.call.layer)
        side = self.call.attribute_to_layer_input
        hook = layer.register_forward_pre_hook(keep) if side else layer.register_forward_hook(keep)
        try:
            # Fused attention has no second derivative.
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            hook.remove()

    def gradients_and_products(
        self, gradients: tuple[Tensor, ...], values: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The gradients, and the Hessian times the layer's value."""
        if not gradients[0].requires_grad:
            return gradients, (torch.zeros_like(gradients[0]),)
        # In the order in which Captum concatenates the parts of a DataParallel model.
        ids = self.call.device_ids or getattr(self.call.forward_func, "device_ids", None) or []
        devices = sorted(self.values, key=lambda device: ids.index(device.index) if len(self.values) > 1 else 0)
        parts = torch.autograd.grad(
            gradients[0],
            [self.values[device] for device in devices],
            values[0].detach(),
            retain_graph=True,
            create_graph=self.keeps_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        product = torch.cat([part.to(gradients[0].device) for part in parts])
        return gradients if self.keeps_graph else (gradients[0].detach(),), (product,)


_EXPECTED = r"expected a single tensor (N, C, *s) with one to three spatial axes"
VIEW_HINT = (
    "For a layer of tokens or channels-last maps, pass its captum_fusion.spatial_view, with a grid for the tokens of "
    "sequences and volumes."
)


def _side(attribute_to_layer_input: bool) -> str:
    return "input" if attribute_to_layer_input else "output"


@contextmanager
def _checked(layer: Module, attribute_to_layer_input: bool, runs: list[None]) -> Iterator[None]:
    """Refuses a layer that gives something else than tensors of real numbers, before Captum's hooks see it."""
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
    try:
        yield
    finally:
        hook.remove()


def _check_map(value: Tensor, call: ModelCall, side: str) -> None:
    shape = tuple(value.shape)
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
        one.dtype == other.dtype and torch.equal(one, other)
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.device == other.device
        else one is other
        for one, other in zip(first, second, strict=True)
    )
