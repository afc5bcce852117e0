"""Preserves the model's buffers and the random state."""

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.jit import ScriptModule
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import StochasticDepth

from captum_fusion._engine.captum import is_compiled


def warn(message: str) -> None:
    """Warns at the line of the user's code that led here, past this package and Captum."""
    frame: FrameType | None = sys._getframe()
    level = outermost = 0
    while frame is not None:
        level += 1
        if frame.f_globals.get("__name__", "").partition(".")[0] in ("captum", "captum_fusion"):
            outermost = level
        frame = frame.f_back
    warnings.warn(message, stacklevel=outermost + 1)


class _Draws(TorchDispatchMode):
    """Notes whether this thread, and no other one, draws random numbers."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.any = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.any |= torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        return func(*args, **(kwargs or {}))


class StateGuard:
    """The buffers and the random state to restore."""

    def __init__(self, devices: set[torch.device]) -> None:
        self._random_states = {device: _random_state(device) for device in devices if _has_random_state(device)}
        self.draws = False
        self.unstable: set[str] = set()
        self.warned = self.batch_checked = False
        self._seen: set[Module] = set()
        self._buffers: list[tuple[Module, str, Tensor | None, Tensor | None]] = []

    @contextmanager
    def tracking(self, forward_func: object = None) -> Iterator[None]:
        """Keeps the buffers of each module that this thread runs, before it runs, and notes random numbers."""
        # In a single thread, comparing random states shows the same, and slows no operation down.
        draws = _Draws() if threading.active_count() > 1 else None
        thread = threading.get_ident()

        def keep(module: Module, _: object) -> None:
            if threading.get_ident() == thread and module not in self._seen:
                for part in module.modules():
                    if part not in self._seen:
                        self._keep(part)

        hook = register_module_forward_pre_hook(keep)
        try:
            # Filters belong to the process: they are touched only where a compiled module warns that it calls global
            # hooks twice, which does no harm here.
            with draws or nullcontext():
                if is_compiled(forward_func):
                    with warnings.catch_warnings():
                        warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
                        yield
                else:
                    yield
        finally:
            hook.remove()
            self.draws |= draws.any if draws else threading.active_count() == 1 and bool(self._moved())
            self._warn_if_unstable()

    def _keep(self, module: Module) -> None:
        self._seen.add(module)
        for name, buffer in module._buffers.items():
            if buffer is None or _is_plain(buffer):
                self._buffers.append((module, name, buffer, None if buffer is None else buffer.clone()))
        # A frozen scripted module has no mode.
        if getattr(module, "training", False) and isinstance(module, (_BatchNorm, _DropoutNd, StochasticDepth)):
            self.unstable.add(type(module).__name__)

    def _warn_if_unstable(self) -> None:
        """Warns once where modules in training mode make scores depend on chance or on the other examples."""
        if self.unstable and not self.warned:
            self.warned = True
            warn(
                f"The model is in training mode and has {', '.join(sorted(self.unstable))}: its scores are random or "
                "depend on the rest of the batch. Call model.eval() before explaining it."
            )

    def warn_of_other_rows(self, alone: float, score: float) -> None:
        """Warns once that the score of an input depends on the other rows."""
        if not self.warned:
            self.warned = True
            warn(
                f"An unmasked input scores {alone:.4g} alone, but {score:.4g} in a batch with masked inputs: the "
                "scores are random or depend on the other rows. Look for BatchNorm with track_running_stats=False and "
                "for functional dropout. To keep rows apart, explain one example at a time with "
                "perturbations_per_eval=1."
            )

    def warn_of_chance(self) -> None:
        """Warns once that the model draws random numbers."""
        if self.draws and not self.warned and self._moved():
            self.warned = True
            warn(
                "The model draws random numbers although none of its modules is in training mode: its scores are "
                "random. Look for functional dropout, which needs training=self.training."
            )

    def _moved(self) -> list[torch.device]:
        """The devices whose random state is another one."""
        return [
            device for device, state in self._random_states.items() if not torch.equal(_random_state(device), state)
        ]

    def restore(self) -> None:
        """Restores what has changed."""
        for device in self._moved() if self.draws else []:
            _set_random_state(device, self._random_states[device])
        with torch.no_grad():
            for module, name, buffer, value in self._buffers:
                # Without a trace in the version counter: a backward pass of the caller may still need the buffer.
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    buffer.data.copy_(value)
                now: Any = getattr(module, name, None)
                # A scripted module gives a new tensor each time.
                wrapped = isinstance(module, ScriptModule) and now is not None
                if now is not buffer and not (wrapped and value is not None and torch.equal(now, value)):
                    setattr(module, name, buffer)


def _is_plain(buffer: Tensor) -> bool:
    """Tells whether a buffer can be compared and copied, which sparse, quantized, nested and lazy ones cannot."""
    strided = buffer.layout == torch.strided and not (buffer.is_quantized or buffer.is_nested or buffer.is_meta)
    return strided and not is_lazy(buffer)


_outermost: ContextVar[StateGuard | None] = ContextVar("_outermost", default=None)


@contextmanager
def preserved(inputs: tuple[Tensor, ...]) -> Iterator[StateGuard]:
    """Restores buffers and the random state of the inputs' devices on leaving, also after an exception.

    ``forward_func`` may be any callable, so its modules are noticed as they run, inside ``state.tracking``. What other
    threads run and draw is left alone. For a method inside a method, the outer one restores everything.
    """
    outer = _outermost.get()
    if outer is not None:
        yield outer
        return
    state = StateGuard({tensor.device for tensor in inputs} | {torch.device("cpu")})
    token = _outermost.set(state)
    try:
        yield state
    finally:
        _outermost.reset(token)
        state.restore()


def _has_random_state(device: torch.device) -> bool:
    if device.type in ("cuda", "mps", "xpu"):
        return bool(getattr(torch, device.type).is_available())
    return device.type == "cpu"


def _random_state(device: torch.device) -> Tensor:
    module: Any = torch if device.type == "cpu" else getattr(torch, device.type)
    state: Tensor = module.get_rng_state(*([device] if device.type in ("cuda", "xpu") else []))
    return state


def _set_random_state(device: torch.device, state: Tensor) -> None:
    module: Any = torch if device.type == "cpu" else getattr(torch, device.type)
    module.set_rng_state(state, *([device] if device.type in ("cuda", "xpu") else []))
