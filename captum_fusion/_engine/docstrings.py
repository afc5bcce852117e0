"""Shared descriptions of arguments, filled into the docstrings that name them."""

import re
from textwrap import indent
from typing import Any, TypeVar

Documented = TypeVar("Documented", bound=Any)

_PLACEHOLDER = re.compile(r"^( *)\{(\w+)\}$", re.MULTILINE)
_DESCRIPTIONS = {
    "forward_func": "forward_func (Callable): The forward function of the model or any modification of it.",
    "layer": r"""
layer (torch.nn.Module): The layer for which attributions are computed. Its output (or its input, if
    ``attribute_to_layer_input``) is a single tensor of shape (N, C, \*s) with one to three spatial axes s. For
    tokens and channels-last maps, ``captum_fusion.spatial_view`` provides such a layer. The attributes ``layer`` and
    ``forward_func`` can be set later.""",
    "device_ids": """
device_ids (list[int]): Device ID list, necessary only if ``forward_func`` applies a DataParallel model and is
    not that model itself. Default: None""",
    "tolerance": """
tolerance (float, optional): The largest estimated error of the final map (after ReLU and min-max normalization) at
    any pixel, as a fraction of the map's range, in [0, 1). Above 0, only some channels are scored, and the scores of
    the others are inferred as smooth functions of the masks. Channels are scored until the estimated error is within
    the tolerance; if the scores are not smooth, all channels are scored. The error is within its estimate for about
    nine of ten examples, see ``benchmarks/results/tolerance.md``. Default: 0.0, which is exact""",
    "region_tolerance": """
tolerance (float, optional): The largest estimated error of the region map at any pixel, as a fraction of the map's
    range, in [0, 1), see ``LayerScoreCam``; for the default region method only. Default: 0.0, which is exact""",
    "activation": """
activation (str, optional): The function that turns the output of ``forward_func`` into probabilities before the
    target is selected: "softmax" over dimension 1, "sigmoid", or None if the output holds probabilities, or scores to
    compare without an activation. Default: "softmax\"""",
    "inputs": """
inputs (Tensor or tuple[Tensor, ...]): Inputs of ``forward_func``, examples in dimension 0.""",
    "masked_inputs": r"""
inputs (Tensor or tuple[Tensor, ...]): Inputs of ``forward_func``, examples in dimension 0. Those with as many
    spatial axes as the layer, (N, C, \*S), are masked along these axes and must hold floating-point values; the
    others (tabular values, tokens) stay unmasked. If the model takes features last, (N, T, E), wrap it in a
    ``forward_func`` that takes (N, E, T).""",
    "channel_dim": """
channel_dim (int, optional): The axis of the channels in inputs and baselines, such as 2 for (N, T, C, H, W) or -1
    for (N, H, W, C). It does not apply to the target. Default: 1""",
    "attributions_channel_dim": """
channel_dim (int, optional): The axis of the channels in the attributions. Default: 1""",
    "target": """
target (int, tuple, Tensor, or list, optional): Output indices whose score is explained, in any form that
    ``captum.attr.LayerGradCam`` takes. None only if ``forward_func`` returns one score per example.
    Default: None""",
    "additional_forward_args": """
additional_forward_args (Any, optional): Further arguments of ``forward_func``, after the inputs. Tensors (other
    than scalars) have one row per example; other values are passed unchanged. Default: None""",
    "attribute_to_layer_input": """
attribute_to_layer_input (bool, optional): Whether to explain the layer's input instead of its output.
    Default: False""",
    "relu_attributions": """
relu_attributions (bool, optional): Whether to set negative attributions to 0, as the paper does.
    Default: False""",
    "attr_dim_summation": """
attr_dim_summation (bool, optional): Whether to sum the attributions over the channels. Default: True""",
    "grad_kwargs": """
grad_kwargs (dict, optional): Further arguments of ``torch.autograd.grad``. Default: None""",
    "interpolate_mode": """
interpolate_mode (str, optional): The interpolation of maps to the input's size: "bilinear" (linear, bilinear or
    trilinear, depending on the number of axes), "nearest", "nearest-exact" or "area". Default: "bilinear\"""",
    "baselines": """
baselines (Tensor, number, or tuple, optional): The values that replace masked-out values: a number, a tensor of
    the input's shape or with one example, or for a tuple of inputs a tuple of these, where None means 0.
    Default: None, which means 0""",
    "replace": r"""
replace (Callable, optional): A function that fills removed pixels, such as an inpainting model. It takes some rows
    of an input, (R, C, \*S), and a mask of their removed pixels, of dtype bool and shape (R, 1, \*S), which holds
    none, some or all of them. It returns a tensor of the shape of the rows; pixels that are not removed keep their
    values, whatever it returns there. It is called for one input at a time, on rows of any examples, with gradients
    disabled, which it may enable.""",
    "perturbations_per_eval": """
perturbations_per_eval (int, optional): The number of masks per example in one call of ``forward_func``, at least 1.
    Default: None, which chooses a number that fits the device""",
    "show_progress": """
show_progress (bool, optional): Whether to show a progress bar over the masked inputs. Default: False""",
    "attributions": r"""
attributions (Tensor or tuple[Tensor, ...]): Attributions of any method, (N, C, \*s) at the input's or at a
    layer's resolution, see ``saliency_map``. A single tensor masks every input with as many spatial axes; a tuple
    holds one entry for each input. An input stays unmasked if its entry is None, has no spatial axes, or is zero for
    every example while another entry is not.""",
    "sign": """
sign (str, optional): The sign of the attributions that count, see ``saliency_map``. Default: "positive\"""",
    "map_attributions": r"""
attributions (Tensor): Attributions of any method, (N, C, \*s) at the input's or at a layer's resolution, see
    ``captum_fusion.metrics.saliency_map``.""",
    "threshold": """
threshold (float, optional): The lowest saliency in a region, as a share of the map's maximum, in (0, 1].
    Default: 0.5""",
    "map_size": """
size (tuple[int, ...], optional): The spatial shape S of the image. Default: None, which means that of the
    attributions""",
    "region_errors": """
ValueError: If the attributions do not fit the size or hold NaN, or if another argument is outside its range.""",
    "return_curve": """
return_curve (bool, optional): Whether to also return the curve. Default: False""",
    "layer_attributions": r"""
*Tensor* of **attributions** of shape (N, 1, \*s), or (N, C, \*s) without the sum over the channels, float32 or
wider. Use ``LayerAttribution.interpolate`` to enlarge them to the input's size.""",
    "input_attributions": r"""
with the same map in each channel. For a tuple of inputs a tuple, with zeros for each unmasked input.""",
    "layer_errors": r"""
ValueError: If the layer is not part of the model or has no value of shape (N, C, \*s), if batch sizes differ, if the
    target does not select one score per example, or if another argument is outside its range.""",
    "masking_errors": """
TypeError: If an input to mask holds no floating-point values.
RuntimeError: If scores are not finite, if ``forward_func`` fails for several masked inputs in one call, or if another
    thread runs the layer while its values are recorded.""",
    "metric_errors": """
ValueError: If the attributions cannot belong to the inputs or hold NaN, if the target does not select one score
    per example, or if another argument is outside its range.
TypeError: If an input to mask holds no floating-point values.
RuntimeError: If scores are not finite.""",
    "curve": """
**area** or 3-element tuple of **area**, **fractions**, **probabilities**:

- **area** (*Tensor*): The area under the curve by the trapezoid rule, shape (N,), in [0, 1].
- **fractions** (*Tensor*, returned if return_curve=True): The fraction of changed pixels, from 0 to 1, shape
  (steps + 1,).
- **probabilities** (*Tensor*, returned if return_curve=True): P at each fraction, shape (N, steps + 1).""",
    "gradient_errors": """
RuntimeError: If scores are not finite, if another thread runs the layer while its values are recorded, or inside
    ``torch.inference_mode()``.""",
    "layer_example": """
Examples::

    >>> import torch
    >>> from torchvision.models import resnet18
    >>> model = resnet18(weights=None).eval()
    >>> attribution = CLASS(model, model.layer4)
    >>> attribution.attribute(torch.rand(1, 3, 64, 64), target=281).shape
    torch.Size([1, 1, 2, 2])""",
    "input_example": """
Examples::

    >>> from torchvision.models import resnet18
    >>> model = resnet18(weights=None).eval()
    >>> attribution = CLASS(model, model.layer4)
    >>> attribution.attribute(torch.rand(1, 3, 64, 64), target=281).shape
    torch.Size([1, 3, 64, 64])""",
    "attributions_example": """
>>> import torch
>>> from captum.attr import LayerGradCam
>>> from torchvision.models import resnet18
>>> model = resnet18(weights=None).eval()
>>> images = torch.rand(2, 3, 64, 64)
>>> attributions = LayerGradCam(model, model.layer4).attribute(images, target=281)""",
}

_CAM = ("target", "additional_forward_args", "attribute_to_layer_input", "relu_attributions", "attr_dim_summation")
_MASKED = ("masked_inputs", "target", "additional_forward_args", "interpolate_mode", "attribute_to_layer_input")
# Arguments that several signatures have in the same order.
_GROUPS: dict[str, tuple[str, ...]] = {
    "layer_constructor": ("forward_func", "layer", "device_ids"),
    "layer_arguments": ("inputs", *_CAM),
    "masked_layer_arguments": ("masked_inputs", *_CAM),
    "masked_arguments": _MASKED,
    "metric_arguments": ("forward_func", "inputs", "attributions", "baselines", "additional_forward_args", "target"),
    "progress_arguments": ("perturbations_per_eval", "show_progress"),
}


def _describe(name: str) -> str:
    return "\n".join(_DESCRIPTIONS[part].strip() for part in _GROUPS.get(name, (name,)))


def fill_docstring(documented: Documented) -> Documented:
    """Fills the lines ``{name}`` in the docstrings of a function, or of a class and its methods.

    CLASS in a shared description stands for the name of the class.
    """
    for part in (documented, *vars(documented).values()) if isinstance(documented, type) else (documented,):
        if getattr(part, "__doc__", None) and (part is documented or callable(part)):
            filled = _PLACEHOLDER.sub(lambda match: indent(_describe(match[2]), match[1]), part.__doc__)
            part.__doc__ = filled.replace("CLASS", documented.__name__)
    return documented
