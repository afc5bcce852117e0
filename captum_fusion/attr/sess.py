"""SESS."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import ceil
from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import TargetType, logged
from captum_fusion._engine.component import check_component
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.forward_pass import forward_pass
from captum_fusion._engine.guards import check_channels_first, check_not_negative, check_windows
from captum_fusion._engine.saliency import saliency_map
from captum_fusion._engine.state import preserved
from captum_fusion.arguments import Activation
from captum_fusion.attr.augmentation_tunnel import channel_option
from captum_fusion.functional import gaussian_blur, sess_map, upsample
from captum_fusion.targets import in_windows

# The authors' twelve scales, of images of 224 pixels: 224, 288, ..., 928.
_SCALES = tuple(1 + 2 * step / 7 for step in range(12))
_SMOOTHING = (11, 5.0)


@fill_docstring
class SESS(Attribution):
    r"""Fuses the attributions of any method over windows of the enlarged input: saliency by scaling and sliding.

    The map finds small objects and several objects of a class, and is finer than one of the whole input. In symbols,
    for the windows x_k of all scales, the probability P of the target and the saliency map M_k of a window, in its
    place in the input and 0 elsewhere:

    .. math::

        w_k &= \frac{P(x_k)}{\max_k P(x_k)} \\
        L &= \mathrm{blur}\left(\frac{\sum_k w_k M_k}{|\{k : w_k M_k > 0\}|}\right)

    The blur is Gaussian, 11 pixels wide with a standard deviation of 5 pixels.

    More details can be found in the paper: https://arxiv.org/abs/2207.01769

    Args:
        attribution_method (Attribution): Any attribution of Captum or of this package.
        {activation}

    Raises:
        TypeError: If the method is not an attribution.
    """

    def __init__(self, attribution_method: Attribution, activation: Activation | None = "softmax") -> None:
        check_component("attribution_method", attribution_method, None)
        super().__init__(attribution_method.forward_func)
        self.attribution_method = attribution_method
        self.activation = activation

    @logged
    def attribute(
        self,
        inputs: Tensor,
        target: TargetType = None,
        additional_forward_args: object = None,
        *,
        scales: Sequence[float] = _SCALES,
        window: tuple[int, ...] | None = None,
        pre_filter: float = 0.0,
        channel_dim: int = 1,
        **kwargs: Any,
    ) -> Tensor:
        r"""Computes the fused map of the windows.

        At each scale the input is enlarged and covered by windows side by side; the last one of a row ends at the
        border. The twelve default scales have 122 windows, each of which takes a forward pass and an attribution.

        Args:
            inputs (Tensor): The input of ``forward_func``, shape (N, C, \*S) with one to three spatial axes.
            {target}
            {additional_forward_args}
            scales (list[float], optional): The factors by which the input is enlarged, at least one.
                Default: (1, 9/7, 11/7, ..., 29/7), for inputs of 224 pixels 224, 288, ..., 928
            window (tuple[int, ...], optional): The spatial shape of a window. Default: None, which means that of the
                input
            pre_filter (float, optional): The share of the windows to leave out, those with the lowest probabilities,
                in [0, 1). Default: 0.0
            {channel_dim}
            kwargs (Any): Further arguments of the method's own ``attribute``, the same for each window.

        Returns:
            *Tensor* of **attributions** of the input's shape, not negative, float32 or wider, each channel holding the
            same map.

        Raises:
            TypeError: If there are several inputs, or if they hold no floating-point values.
            ValueError: If there are no scales, if a window is larger than the enlarged input, if pre_filter is outside
                [0, 1), or if the target does not select one score per example or selects a negative one; if an argument
                belongs to places in the input, such as a mask, baselines, a pixel as the target, or the region and the
                box of ``captum_fusion.targets``, where windows are smaller than the input.

        Examples::

            >>> from captum.attr import LayerGradCam
            >>> from torchvision.models import resnet18
            >>> model = resnet18(weights=None).eval()
            >>> sess = SESS(LayerGradCam(model, model.layer4))
            >>> sess.attribute(torch.rand(1, 3, 64, 64), target=281, scales=[1, 1.5]).shape
            torch.Size([1, 3, 64, 64])
        """
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            raise TypeError(f"inputs are {kind}; expected one tensor of floating-point values")
        if not len(scales):
            raise ValueError("scales is empty; expected at least one number")
        if not 0 <= pre_filter < 1:
            raise ValueError(f"pre_filter is {pre_filter}; expected a number in [0, 1)")
        call = ModelCall(
            self.forward_func, inputs, target, additional_forward_args, self.activation, channel_dim=channel_dim
        )
        call.check_rows()
        (image,) = call.tensors
        size = tuple(image.shape[2:])
        shape = size if window is None else tuple(window)
        sizes = [tuple(round(scale * side) for side in size) for scale in scales]
        cut = any(level != size or level != shape for level in sizes)
        check_windows(kwargs, call.arguments if cut else (), target if cut else None, image, channel_dim)
        levels = [upsample(image.detach(), level).to(inputs) for level in sizes]
        windows = [(level, place) for level in levels for place in _windows(tuple(level.shape[2:]), shape)]
        kwargs |= channel_option(self.attribution_method, channel_dim)
        probabilities = []
        with preserved(call.tensors) as state, state.tracking(self.forward_func), in_windows(cut):
            for level, place in windows:
                with forward_pass(replace(call, inputs=call.in_form((level[place],)))) as unmasked:
                    probabilities.append(unmasked.unmasked_scores)
            weights = torch.stack(probabilities, dim=1)
            check_not_negative(weights, weights)
            highest = weights.amax(dim=1, keepdim=True)
            ranks = weights.argsort(dim=1, stable=True).argsort(dim=1)
            weights = torch.where(
                ranks < int(pre_filter * len(windows)), 0, weights / torch.where(highest > 0, highest, 1)
            )
            maps = [
                self._map(call, level, place, weights[:, k] > 0, kwargs) for k, (level, place) in enumerate(windows)
            ]
        fused = gaussian_blur(sess_map(torch.cat(maps, dim=1).to(weights), weights), *_SMOOTHING)
        attributions: Tensor = call.in_form((fused.expand(image.shape),))
        return attributions.contiguous()

    def _map(
        self, call: ModelCall, level: Tensor, place: tuple[slice, ...], chosen: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        r"""The saliency map of one window of some examples, in its place in the input, (N, 1, \*S)."""
        size = tuple(call.tensors[0].shape[2:])
        rows = chosen.nonzero().flatten()
        canvas = torch.zeros(len(level), 1, *level.shape[2:], device=level.device)
        if len(rows):
            target = call.targets
            if isinstance(target, list) or (isinstance(target, Tensor) and target.numel() > 1):
                target = target[rows] if isinstance(target, Tensor) else [target[row] for row in rows.tolist()]
            further = {} if not call.arguments else {"additional_forward_args": call.arguments_of(rows)}
            crop = level[place][rows]
            window = replace(call, inputs=call.in_form((crop,)).contiguous())
            attributions = self.attribution_method.attribute(window.inputs, target=target, **further, **kwargs)
            attributions = window.of_input(attributions, 0)
            if not any(part.start for part in place):
                # Once at each scale.
                check_channels_first(tuple(crop.shape), tuple(attributions.shape[2:]))
            canvas[place][rows] = saliency_map(attributions, tuple(crop.shape[2:])).to(canvas)
        return upsample(canvas, size)


def _windows(size: tuple[int, ...], window: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """The windows that cover a map, side by side from its start; the last one of each axis ends at its end."""
    if len(window) != len(size) or any(not 0 < part <= side for part, side in zip(window, size, strict=True)):
        raise ValueError(f"window is {window} for an input enlarged to {size}; expected at most that size")
    starts = [
        [min(step * part, side - part) for step in range(ceil((side - part) / part) + 1)]
        for part, side in zip(window, size, strict=True)
    ]
    return [
        (slice(None), slice(None), *(slice(start, start + part) for start, part in zip(corner, window, strict=True)))
        for corner in product(*starts)
    ]
