"""Winsor-CAM."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from captum.attr import GradientAttribution
from torch import Tensor
from torch.nn import Conv1d, Conv2d, Conv3d, Identity, Module

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import ForwardFunc, TargetType, logged
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.forward_pass import Differentiation, forward_pass
from captum_fusion._engine.guards import (
    check_channels_first,
    check_forward_func,
    check_gradients_allowed,
    check_layer,
)
from captum_fusion.functional import as_float, grad_cam_weights, normalize, upsample, weighted_sum, winsorized_weights


@fill_docstring
class WinsorCam(GradientAttribution):
    r"""Computes Winsor-CAM: Grad-CAM of all convolutions, weighted by their importance without its outliers.

    Early layers add detail to the map, and clipping keeps a single important layer from deciding it alone. In symbols,
    for the channels A_lk of a layer l and their gradients g, and the percentile tau of the positive importances I:

    .. math::

        w_{lk} &= \mathrm{mean}(g_{lk}) \\
        I_l &= \mathrm{mean}_k(w_{lk}) \\
        L &= \sum_l \mathrm{scale}(\min(I_l, \tau)) \; U\left(N\left(\mathrm{ReLU}\left(\sum_k w_{lk} A_{lk}\right)
            \right)\right)

    Layers without a positive importance have no weight, and the others have weights between 0.1 and 1. A low percentile
    weights all of these alike, which favours detail; a high one favours the layers that matter most. The attribution
    has the input's shape, each channel holding the same map.

    More details can be found in the paper: https://arxiv.org/abs/2507.10846

    Args:
        {forward_func}
        layers (list[torch.nn.Module], optional): The layers, whose outputs are (N, C, \*s). Default: None, which means
            all convolutions of ``forward_func``
        percentile (float, optional): The percentile of the positive importances above which they are clipped, in
            [0, 100]. Default: 99.0, as in the authors' code

    Raises:
        TypeError: If ``forward_func`` is not a module and no layers are passed.
        ValueError: If the percentile is outside [0, 100].

    Examples::

        >>> from torchvision.models import resnet18
        >>> model = resnet18(weights=None).eval()
        >>> WinsorCam(model).attribute(torch.rand(1, 3, 64, 64), target=281).shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(
        self, forward_func: ForwardFunc, *, layers: Sequence[Module] | None = None, percentile: float = 99.0
    ) -> None:
        super().__init__(forward_func)
        if layers is None and not isinstance(forward_func, Module):
            raise TypeError(
                f"forward_func is a {type(forward_func).__name__}, whose convolutions are unknown; expected a "
                "torch.nn.Module, or a list of layers"
            )
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile is {percentile}; expected a number in [0, 100]")
        self.layers = layers
        self.percentile = percentile

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
            *Tensor* of **attributions** of the input's shape, not negative, float32 or wider, each channel holding the
            same map.

        Raises:
            TypeError: If there are several inputs.
            ValueError: If no convolution, or not every listed layer, gives a map with as many spatial axes as the
                input; if the input's channels are not in ``channel_dim``, or if the target does not select one score
                per example.
            {gradient_errors}
        """
        check_gradients_allowed(type(self).__name__)
        check_forward_func(self.forward_func)
        if not isinstance(inputs, Tensor):
            raise TypeError(f"inputs are a {type(inputs).__name__}; expected one tensor")
        layers = self.layers
        if layers is None:
            modules = cast(Module, self.forward_func).modules()
            layers = [part for part in modules if isinstance(part, (Conv1d, Conv2d, Conv3d))]
        identity = Identity()
        values: list[Tensor] = []

        def forward(x: Tensor, *arguments: Any) -> Any:
            with _recorded(layers, values):
                return self.forward_func(identity(x), *arguments)

        call = ModelCall(forward, inputs, target, additional_forward_args, channel_dim=channel_dim, layer=identity)
        size = tuple(call.tensors[0].shape[2:])
        maps, importances = [], []

        def explained(output: Tensor) -> Tensor:
            scores = call.explained(output)
            channels = [value for value in values if value.dim() == inputs.dim()]
            expected = 1 if self.layers is None else max(1, len(layers), len(values))
            if len(channels) < expected:
                raise ValueError(
                    f"{len(channels)} of {len(layers)} layers gave a map of {inputs.dim() - 2} spatial axes that "
                    "gradients reach; expected convolutions in forward_func, or a list of layers that all do"
                )
            check_channels_first(tuple(call.tensors[0].shape), tuple(channels[0].shape[2:]))
            gradients = torch.autograd.grad(scores.sum(), channels, retain_graph=True, materialize_grads=True)
            for gradient, value in zip(gradients, channels, strict=True):
                weights = grad_cam_weights(gradient)
                maps.append(upsample(normalize(weighted_sum(as_float(value.detach()), weights).relu()), size))
                importances.append(weights.mean(dim=1))
            return scores

        with forward_pass(call, differentiation=Differentiation(explained)):
            weights = winsorized_weights(torch.stack(importances, dim=1), self.percentile)
            total = weighted_sum(torch.cat(maps, dim=1), weights)
        attributions: Tensor = call.in_form((total.expand(call.tensors[0].shape),))
        return attributions.contiguous()


@contextmanager
def _recorded(layers: Sequence[Module], values: list[Tensor]) -> Iterator[None]:
    """Collects the output of each run of the layers."""

    def keep(_: Module, __: object, value: object) -> Tensor | None:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return None
        values.append(value)
        # The next module may work in place.
        return value.clone()

    # All are checked before the first has a hook, which an error would leave there.
    checked = [check_layer(layer) for layer in layers]
    hooks = [layer.register_forward_hook(keep) for layer in checked]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
