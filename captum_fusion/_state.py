"""Leaves the caller's world as it was."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook
from torchvision.ops import StochasticDepth

Watch = Callable[[], AbstractContextManager[None]]

_guarded = ContextVar("_guarded", default=False)


@contextmanager
def undisturbed(inputs: Tensor | tuple[Tensor, ...]) -> Iterator[Watch]:
    """Restores buffers and the global random state on leaving, also after an exception.

    ``forward_func`` may be any callable, so the modules that it runs are found as they run. The first forward pass
    happens inside ``with watch():``, where a global hook sees each module before it runs and keeps the buffers of
    those in training mode, which alone can change them. Where one of these makes an example's score depend on chance
    or on the other examples, a warning says so.

    Args:
        inputs (Tensor or tuple[Tensor, ...]): As given to ``attribute``; the random state of their devices is kept.

    Yields:
        *Callable* watch, which returns a context manager for the first forward pass.
    """
    if _guarded.get():  # A method inside a method: the outer one restores everything.
        yield nullcontext
        return
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    cuda_devices = {tensor.device for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_cuda}
    seen: set[Module] = set()
    buffers: list[tuple[Module, str, Tensor, Tensor]] = []
    unstable: set[str] = set()

    def keep(module: Module, _: object) -> None:
        if module in seen:
            return
        for part in module.modules():
            if part in seen:
                continue
            seen.add(part)
            if part.training:
                kept = part.named_buffers(recurse=False)
                buffers.extend((part, name, buffer, buffer.clone()) for name, buffer in kept)
                if isinstance(part, (_BatchNorm, _DropoutNd, StochasticDepth)):
                    unstable.add(type(part).__name__)

    @contextmanager
    def watch() -> Iterator[None]:
        hook = register_module_forward_pre_hook(keep)
        try:
            yield
        finally:
            hook.remove()
        if unstable:
            warnings.warn(
                f"The model is in training mode and holds {', '.join(sorted(unstable))}, so that scores depend on "
                "chance or on the rest of the batch. Call model.eval() before explaining it.",
                stacklevel=3,
            )

    token = _guarded.set(True)
    try:
        with torch.random.fork_rng(cuda_devices):
            yield watch
    finally:
        _guarded.reset(token)
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                setattr(module, name, buffer)
