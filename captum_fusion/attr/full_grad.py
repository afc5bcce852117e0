"""FullGrad."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from captum.attr import GradientAttribution
from torch import Tensor
from torch.nn import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, Identity, Module
from torch.nn.modules.batchnorm import _BatchNorm

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import ForwardFunc, TargetType, logged
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.forward_pass import Differentiation, forward_pass
from captum_fusion._engine.guards import (
    check_batch_norm,
    check_channels_first,
    check_forward_func,
    check_gradients_allowed,
)
from captum_fusion.functional import as_float, full_grad_map, implicit_bias

_CONVOLUTIONS = (Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d)


@fill_docstring
class FullGrad(GradientAttribution):
    r"""Computes FullGrad: the gradients of the input and of the biases of all convolutions and batch normalizations.

    In a network of ReLUs, the score is the sum of the input and of all biases, each times its gradient. The map shows
    where these terms are. In symbols, for the input x and the bias b of each channel of each layer, which adds the same
    to every pixel, and their gradients g:

    .. math::

        L = \sum N(|g_x x|) + \sum_l U\left(\sum_k N(|g_{lk} b_{lk}|)\right)

    Transposed convolutions and frozen batch normalizations count too. The bias of batch normalization includes what its
    mean subtracts. The attribution has the input's shape, each channel holding the same map, and needs no layer.

    More details can be found in the paper: https://arxiv.org/abs/1905.00780

    Args:
        {forward_func}
        model (torch.nn.Module, optional): The model whose biases are explained. Default: None, which means
            ``forward_func``

    Raises:
        TypeError: If ``forward_func`` is not a module and no model is passed.

    Examples::

        >>> from torchvision.models import resnet18
        >>> model = resnet18(weights=None).eval()
        >>> FullGrad(model).attribute(torch.rand(1, 3, 64, 64), target=281).shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(self, forward_func: ForwardFunc, *, model: Module | None = None) -> None:
        super().__init__(forward_func)
        if model is None and not isinstance(forward_func, Module):
            raise TypeError(
                f"forward_func is a {type(forward_func).__name__}, whose biases are unknown; expected a "
                "torch.nn.Module, or the one that it calls as model"
            )
        self.model = model

    @logged
    def attribute(
        self,
        inputs: Tensor,
        target: TargetType = None,
        additional_forward_args: object = None,
        *,
        channel_dim: int = 1,
    ) -> Tensor:
        r"""Computes the attribution of the input.

        Args:
            inputs (Tensor): The input of ``forward_func``, shape (N, C, \*S) with one to three spatial axes.
            {target}
            {additional_forward_args}
            {channel_dim}

        Returns:
            *Tensor* of **attributions** of the input's shape, float32 or wider, each channel holding the same map.

        Raises:
            TypeError: If there are several inputs.
            ValueError: If no convolution or batch normalization with a bias runs; if a batch normalization has no
                running statistics, or returns a function of its output that is not a module inside it; if the input has
                no spatial axes or its channels are not in ``channel_dim``, or if the target does not select one score
                per example.
            {gradient_errors}
        """
        check_gradients_allowed(type(self).__name__)
        check_forward_func(self.forward_func)
        if not isinstance(inputs, Tensor):
            raise TypeError(f"inputs are a {type(inputs).__name__}; expected one tensor")
        model = cast(Module, self.forward_func if self.model is None else self.model)
        identity = Identity()
        runs: list[tuple[Tensor, Tensor]] = []

        def forward(x: Tensor, *arguments: Any) -> Any:
            with _recorded(model, runs):
                return self.forward_func(identity(x), *arguments)

        call = ModelCall(forward, inputs, target, additional_forward_args, channel_dim=channel_dim, layer=identity)
        size = tuple(call.tensors[0].shape[2:])
        total = torch.zeros(())

        def explained(output: Tensor) -> Tensor:
            nonlocal total
            scores = call.explained(output)
            maps = [(bias, value) for bias, value in runs if value.dim() == inputs.dim()]
            if not maps:
                raise ValueError("No convolution or batch normalization with a bias ran; expected a model that has one")
            check_channels_first(tuple(call.tensors[0].shape), tuple(maps[0][1].shape[2:]))
            gradients = torch.autograd.grad(
                scores.sum(), [value for _, value in maps], retain_graph=True, materialize_grads=True
            )
            for (bias, _), gradient in zip(maps, gradients, strict=True):
                products = as_float(gradient) * bias.reshape(-1, *(1,) * len(size))
                total = total + full_grad_map(products, size)
            return scores

        with forward_pass(call, differentiation=Differentiation(explained)) as unmasked:
            products = call.of_input(unmasked.layer_gradients * unmasked.layer_value, 0)
            total = total + full_grad_map(products, size)
        attributions: Tensor = call.in_form((total.detach().expand(call.tensors[0].shape),))
        return attributions.contiguous()


@contextmanager
def _recorded(model: Module, runs: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Collects the bias and the output of each run of a convolution or a batch normalization."""
    before_activation: dict[Module, Tensor] = {}

    def enter(norm: Module, _: Module, arguments: tuple[Tensor, ...]) -> Tensor:
        before_activation[norm] = arguments[0]
        return arguments[0].clone()

    def keep(module: Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        value = before_activation.pop(module, output)
        bias = _bias_of(module)
        if bias is None or not value.requires_grad:
            return None
        if _is_norm(module) and arguments and not module.training:
            check_batch_norm(module, arguments[0].detach(), value.detach(), bias.detach(), _eps_of(module))
        runs.append((bias.detach(), value))
        # The next module may work in place.
        return value.clone() if value is output else None

    hooks = []
    for module in model.modules():
        if isinstance(module, _CONVOLUTIONS) or _is_norm(module):
            hooks.append(module.register_forward_hook(keep))
        # A batch normalization with an activation inside adds its bias before its first child.
        child = next(module.children(), None) if _is_norm(module) else None
        if child is not None:
            hooks.append(child.register_forward_pre_hook(partial(enter, module)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_norm(module: Module) -> bool:
    """Tells whether a module is a batch normalization; a frozen one has everything as buffers."""
    return isinstance(module, _BatchNorm) or {"running_mean", "running_var", "weight", "bias"} <= module._buffers.keys()


def _eps_of(module: Module) -> float:
    """The epsilon of a batch normalization; a frozen one without the attribute has torch's default."""
    return float(getattr(module, "eps", 1e-5))


def _bias_of(module: Any) -> Tensor | None:
    """The amount that a module adds to every pixel of each channel, shape (C,)."""
    if not _is_norm(module):
        bias: Tensor | None = module.bias
        return bias
    if module.running_mean is None or module.running_var is None:
        raise ValueError(f"{module} has no running statistics, by which alone it is linear; expected them")
    return implicit_bias(module.running_mean, module.running_var, _eps_of(module), module.weight, module.bias)
