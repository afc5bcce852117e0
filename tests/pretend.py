"""A GPU that is pretended, for where there is none: its tensors say ``cuda`` and hold their values on the CPU.

As fake tensors, they refuse to meet tensors of the CPU in the way that CUDA does; unlike these, they have values, so
that whole methods run on them. The autograd engine asks the driver, so that nothing with a backward pass does.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
# Copies go from one device to another, and an index may be on the CPU.
MIXED = {aten.copy_.default, aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


class Pretended(Tensor):
    values: Tensor

    @staticmethod
    def __new__(cls: type, values: Tensor) -> "Pretended":
        made: Pretended = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        made.values = values
        return made

    def tolist(self) -> Any:
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with PretendedGpu():
            return func(*args, **(kwargs or {}))


class PretendedGpu(TorchDispatchMode):
    """Inside, tensors can be made on the device and moved to it."""

    # Only with the key of fake tensors does torch not look for a driver.
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __enter__(self) -> "PretendedGpu":
        torch._C._ensureCUDADeviceGuardSet()
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        ours = [value for value in tensors if isinstance(value, Pretended)]
        if ours and func not in MIXED and any(value.dim() for value in tensors if not isinstance(value, Pretended)):
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found {DEVICE} and cpu")
        on_device = isinstance(args[0], Pretended) if func is aten.copy_.default else bool(ours)
        if kwargs.get("device") is not None:
            on_device = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        known = {id(value.values): value for value in ours}
        args, kwargs = pytree.tree_map_only(Pretended, lambda value: value.values, (args, kwargs))
        given = func(*args, **kwargs)
        if not on_device:
            return given
        return pytree.tree_map_only(
            Tensor, lambda value: known[id(value)] if id(value) in known else Pretended(value), given
        )


def pretended(value: Any) -> Any:
    """A tensor, or a network, on the device; the parameters of a network have no gradients there."""
    if not isinstance(value, nn.Module):
        return Pretended(value.detach())
    for module in value.modules():
        for kept in (module._parameters, module._buffers):
            for name, part in kept.items():
                if part is not None:
                    kept[name] = (
                        nn.Parameter(Pretended(part.detach()), requires_grad=False)
                        if isinstance(part, nn.Parameter)
                        else Pretended(part)
                    )
    return value
