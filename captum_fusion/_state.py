"""Leaves the caller's world as it was."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook
from torchvision.ops import StochasticDepth

_guarded = ContextVar("_guarded", default=False)


@contextmanager
def undisturbed(inputs: Tensor | tuple[Tensor, ...]) -> Iterator[None]:
    """Restores buffers and the global random state on leaving, also after an exception.

    ``forward_func`` may be any callable, so the modules that it runs are found as they run: a global hook sees each
    one before its first forward pass and keeps its buffers. Only modules in training mode can change them. Where one
    of these makes an example's score depend on chance or on the other examples, a warning says so.

    Args:
        inputs (Tensor or tuple[Tensor, ...]): As given to ``attribute``; the random state of their devices is kept.
    """
    if _guarded.get():  # A method inside a method: the outer one restores everything.
        yield
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
            if not part.training:
                continue
            buffers.extend((part, name, buffer, buffer.clone()) for name, buffer in part.named_buffers(recurse=False))
            if isinstance(part, (_BatchNorm, _DropoutNd, StochasticDepth)) and type(part).__name__ not in unstable:
                unstable.add(type(part).__name__)
                warnings.warn(
                    f"The model holds a {type(part).__name__} in training mode, so that scores depend on chance or on "
                    "the rest of the batch. Call model.eval() before explaining it.",
                    stacklevel=2,
                )

    token = _guarded.set(True)
    hook = register_module_forward_pre_hook(keep)
    try:
        with torch.random.fork_rng(cuda_devices):
            yield
    finally:
        hook.remove()
        _guarded.reset(token)
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                setattr(module, name, buffer)
