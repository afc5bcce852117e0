"""Second derivatives of the scores at the layer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.guards import check_layer


class SecondOrder:
    """Differentiates the gradients of a layer once more, along its value."""

    def __init__(self, call: ModelCall, grad_kwargs: Mapping[str, Any]) -> None:
        self.call = call
        self.keeps_graph = bool(grad_kwargs.get("create_graph"))
        self.grad_kwargs = {**grad_kwargs, "create_graph": True}
        self.values: dict[torch.device, Tensor] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keeps the value that the scores depend on; Captum returns a copy, on which they do not depend."""

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
        # Fused attention has no second derivative.
        with hook, sdpa_kernel(SDPBackend.MATH):
            yield

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
