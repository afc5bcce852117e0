"""Checks that several methods share: of arguments, layers and outputs, with the errors and warnings that they raise."""

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.jit._script import RecursiveScriptModule
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from torchvision.transforms.v2.functional import convert_bounding_box_format
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from captum_fusion._engine.captum import is_compiled
from captum_fusion._engine.state import warn
from captum_fusion._engine.token_grid import channel_axis, channels_first, has_channels, tensors_in
from captum_fusion.arguments import INTERPOLATE_MODES
from captum_fusion.functional import as_float


def check_forward_func(forward_func: object) -> None:
    """Refuses a compiled model where torch cannot run its hooks: its layer would give no value."""
    if not hasattr(torch.compiler, "set_stance") and is_compiled(forward_func):
        raise ValueError(
            f"forward_func is a compiled model, whose hooks torch {torch.__version__} cannot run; expected torch "
            "2.6 or later, or the uncompiled model"
        )


def check_interpolate_mode(interpolate_mode: object) -> None:
    """Refuses an unknown interpolation, such as another argument passed by position."""
    if interpolate_mode not in INTERPOLATE_MODES:
        raise ValueError(f"interpolate_mode is {interpolate_mode!r}; expected one of {INTERPOLATE_MODES}")


def check_layer(layer: object) -> Module:
    """Refuses anything but a module, such as the None of a class whose layer is not set yet."""
    if not isinstance(layer, Module):
        viewed = hasattr(layer, "view") or hasattr(layer, "__enter__")
        advice = ", as `with feature_map.view() as layer:` gives it" if viewed else ""
        raise TypeError(f"layer is {layer!r}; expected a torch.nn.Module{advice}")
    check_not_scripted(layer)
    return layer


def check_not_scripted(module: Module) -> None:
    """Refuses a scripted module, which takes no hooks; a traced one takes them and does not run them."""
    if isinstance(module, RecursiveScriptModule):
        raise TypeError(
            f"The {module.original_name} is a module of torch.jit.script, on which hooks cannot be set; expected the "
            "module that it was made from"
        )


def check_samples(samples: int) -> None:
    """Refuses a number of samples below 1."""
    if samples < 1:
        raise ValueError(f"samples is {samples}; expected at least 1")


def check_perturbations_per_eval(perturbations_per_eval: int | None) -> None:
    """Refuses a number of masks per evaluation below 1."""
    if perturbations_per_eval is not None and perturbations_per_eval < 1:
        raise ValueError(f"perturbations_per_eval is {perturbations_per_eval}; expected at least 1, or None")


def check_gradients_allowed(name: str) -> None:
    """Refuses ``torch.inference_mode()``, naming the class that needs gradients."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name} needs gradients, which torch.inference_mode() forbids. Call it outside; inside torch.no_grad() "
            "it works."
        )


def check_maskable(inputs: tuple[Tensor, ...], positions: Iterable[int] | None = None) -> None:
    """Refuses inputs of integers, at these positions or all: no value lies between a pixel and its baseline."""
    maskable = [tensor.is_floating_point() for tensor in inputs]
    if not (any(maskable) if positions is None else all(maskable[position] for position in positions)):
        raise TypeError(
            f"inputs hold {[str(tensor.dtype) for tensor in inputs]} values, which cannot be masked; "
            "expected floating-point values, scaled as the model needs them. Pass masks and indices beside an image as "
            "additional_forward_args."
        )


def check_replacement(replaced: object, shape: tuple[int, ...]) -> None:
    """Refuses a result of ``replace`` that is no tensor of the inputs' shape: it would be broadcast unnoticed."""
    if not isinstance(replaced, Tensor) or tuple(replaced.shape) != shape:
        described = f"shape {tuple(replaced.shape)}" if isinstance(replaced, Tensor) else type(replaced).__name__
        raise ValueError(f"replace returned {described}; expected a tensor of the shape of its inputs, {shape}")


def check_replace(replace: object, baselines: object) -> None:
    """Refuses ``replace`` beside ``baselines``, and one that cannot be called."""
    if replace is not None and not callable(replace):
        raise TypeError(f"replace is {replace!r}; expected a function of inputs and removed pixels, or None")
    if replace is not None and baselines is not None:
        raise ValueError("replace and baselines are both given; expected one of them, since both fill removed pixels")


def batch_hint(tensors: tuple[Tensor, ...]) -> str:
    """Advises ``unsqueeze(0)`` for an example without a batch dimension, (C, H, W), as ``transform(image)`` returns it.

    A sequence (N, C, L) or a batch (1, C, H, W) has as many axes, so the advice only follows a failure.
    """
    for shape in (tuple(tensor.shape) for tensor in tensors):
        if len(shape) == 3 and shape[0] in (1, 3, 4):
            return f" If {shape} is one image, (C, H, W), pass image.unsqueeze(0)."
        if len(shape) == 4 and shape[0] == 1 and shape[1] not in (1, 3, 4):
            return f" If {shape} is one volume, (C, D, H, W), pass volume.unsqueeze(0)."
    return ""


def check_logits(output: Tensor, sizes: list[tuple[int, ...]]) -> None:
    """Refuses a softmax over an output whose class axis is not known.

    An output with scores for each pixel has the spatial axes of an input, whose sizes are ``sizes``.
    """
    first, last = (
        max((grid == size) + _is_scaled(grid, size) for size in sizes)
        for grid in (tuple(output.shape[2:]), tuple(output.shape[1:-1]))
    )
    if output[0].numel() > output.shape[1] and first <= last:
        raise ValueError(
            f"The softmax is over dimension 1, but an output of shape {tuple(output.shape)} may have its classes in "
            "another one; expected scores (N, classes), or (N, classes, *S) of each pixel. Inside forward_func, select "
            "the scores to explain, as in lambda x: model(x)[:, query], or move the classes to dimension 1; or pass "
            "activation=None."
        )


class ProbabilityWatch(TorchFunctionMode):
    """Notes the last softmax or sigmoid that a forward function computes: no value shows that it is a probability."""

    def __init__(self) -> None:
        super().__init__()
        self._last: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("softmax", "sigmoid"):
            self._last = result
        return result

    def warn(self, output: Tensor, activation: str) -> None:
        """Warns where the activation is applied to probabilities.

        A second softmax squeezes probabilities of 1000 classes into 0.001 to 0.0027. A converted model shows no
        operation, but rows that sum to 1 are probabilities, and eight logits or more are almost never all in [0, 1].
        """
        values = output.detach().float()
        # The mean of several networks' probabilities may lie outside by rounding, in half precision by this much.
        if not ((values >= -1e-3) & (values <= 1 + 1e-3)).all():
            return
        same = self._last is not None and output.untyped_storage().data_ptr() == self._last.untyped_storage().data_ptr()
        rows = values.dim() > 1 and values.shape[1] > 1 and bool(((values.sum(dim=1) - 1).abs() < 1e-2).all())
        if same or rows or values[0].numel() >= 8:
            warn(
                f"forward_func returned values in [0, 1]{' that sum to 1' if rows else ''}, as probabilities are, and "
                f"the {activation} is applied to them. Pass activation=None for probabilities."
            )


def _is_scaled(grid: tuple[int, ...], size: tuple[int, ...]) -> bool:
    """Tells whether a grid has the sides of an image divided by one number, or each less by the same number of pixels.

    Any length is a fraction of a sequence's only side, so a sequence needs the input's own length.
    """
    if len(grid) != len(size) or len(grid) < 2:
        return grid == size
    stride = max(image / side for image, side in zip(size, grid, strict=True))
    less = {image - side for image, side in zip(size, grid, strict=True)}
    return len(less) == 1 or all(abs(side - image / stride) <= 1 for image, side in zip(size, grid, strict=True))


def compared_classes(others: Tensor, score: Tensor, references: int, example: int) -> Tensor:
    """The scores of an example's other classes (K,) without those that a mask rules out; refuses any not finite.

    Masks rule classes out by -1e4 or less, and logits are some hundred; scores of another scale, as the target's own
    score shows, rule out none. Down to -1e9 they may be logits, which matters if fewer than ``references`` remain.
    """
    values = others.detach()
    ruled_out = values < -max(5e3, 10 * float(score.detach().abs()))
    compared = values[~ruled_out]
    if not compared.isfinite().all() or not len(compared):
        raise ValueError(
            f"Of the {len(others)} classes besides the target of example {example}, "
            f"{int((~compared.isfinite()).sum())} have NaN or infinity, and {int(ruled_out.sum())} scores as low as "
            "those of classes that a mask rules out; expected finite scores to compare with. If no mask does, divide "
            "the scores inside forward_func."
        )
    if len(compared) < min(references, len(others)) and (values[ruled_out] > -1e9).any():
        warn(
            "Classes with scores below -5000 and below -10 times the target's are not compared, as a mask rules "
            "classes out by such scores. If no mask does, divide the scores inside forward_func."
        )
    return others[~ruled_out]


def check_not_negative(scores: Tensor, masked: Tensor) -> None:
    """Refuses scores below 0: a share of them that is lost is defined for probabilities."""
    lowest = float(torch.minimum(scores, masked).min())
    if lowest < 0:
        raise ValueError(
            f"The lowest score of the inputs and masked inputs is {lowest:.4g}; expected probabilities, which are not "
            'negative: pass activation="softmax" or activation="sigmoid" for logits'
        )


def check_values(output: Tensor) -> None:
    """Refuses a model on the meta device, whose tensors have shapes and no values, and what is no score.

    Differences of truth values are not defined, and a complex number would lose its imaginary part.
    """
    if output.dtype == torch.bool or output.is_complex():
        raise TypeError(
            f"forward_func returned {output.dtype} values; expected scores, which are real numbers, such as "
            "output.float() or output.abs()"
        )
    if output.is_meta:
        raise ValueError(
            "forward_func returned a tensor on the meta device, which holds no values; expected a model with weights, "
            'as after model.to_empty(device="cpu") and model.load_state_dict(...)'
        )


def check_dense(value: Tensor, name: str) -> None:
    """Refuses a sparse or nested tensor, whose rows cannot be repeated for masked inputs, and one without values."""
    if value.is_meta:
        raise ValueError(f"{name} is a tensor on the meta device, which holds no values; expected one that does")
    if value.layout != torch.strided or value.is_nested:
        raise ValueError(
            f"{name} is a tensor of layout {value.layout}{' of nested tensors' if value.is_nested else ''}, whose rows "
            "cannot be repeated; expected a dense one, as value.to_dense() gives it"
        )


def check_rows_inside(value: object, name: str, examples: int) -> None:
    """Refuses a row for each example in anything but a tensor: every masked row would get all of them."""
    if isinstance(value, Tensor) or examples == 1:
        return
    tensors = any(part.dim() and len(part) == examples for part in tensors_in(value))
    array = isinstance(value, np.ndarray) and value.shape[:1] == (examples,)
    # A list of numbers is rather a size or a list of indices, which all examples share.
    texts = isinstance(value, (list, tuple)) and len(value) == examples and {type(part) for part in value} == {str}
    if tensors or array or texts:
        raise ValueError(
            f"{name} is a {type(value).__name__} with a row for each of the {examples} examples, and rows outside of "
            "tensors are not repeated for masked inputs; expected each tensor as an argument of its own. Bind what all "
            "examples share inside forward_func."
        )


last_run_chosen: WeakSet[Module] = WeakSet()
"""The layers whose last run ``last_feature_map`` has chosen."""


def check_runs(layer: Module, runs: int, shapes: list[tuple[int, ...]]) -> None:
    """Warns of a layer that ran several times: the hooks keep its last run only.

    In a Siamese network that is the second image's, whose map would mask both.
    """
    alike = len(shapes) == runs and len(set(shapes)) == 1
    if runs > 1 and (alike or layer not in last_run_chosen):
        warn(
            f"The layer ran {runs} times in the forward pass; its last run is explained"
            + (", which may be that of the last input, for all inputs of that shape. " if alike else ". ")
            + f"Choose a run with captum_fusion.layer_run(layer, 0, of={runs})."
        )


def check_channels_first(shape: tuple[int, ...], layer_size: tuple[int, ...] = ()) -> None:
    """Refuses inputs whose channels are not in dimension 1, by the layer's size; warns if only their shape shows it.

    Masks are broadcast over dimension 1. In (N, T, 3, H, W) that is time, and the map would differ by colour.
    """
    axis = channel_axis(shape)
    if axis == 1 and shape[1] > 4 and _is_scaled(layer_size, shape[1:-1]) and not _is_scaled(layer_size, shape[2:]):
        axis = -1
    if axis == 1:
        return
    name = "(N, T, C, H, W)" if axis == 2 else "(N, *S, C)"
    message = (
        f"An input has shape {shape}, which looks like {name} with {shape[axis]} channels; expected (N, C, *S), or "
        f"channel_dim={axis}, which names the axis of the channels."
    )
    # The layer's axis is longer than this one and fits the one before it: it is that one's, unless it was enlarged.
    if layer_size and shape[axis] < layer_size[axis - 2 if axis > 0 else axis] <= shape[axis - 1]:
        raise ValueError(message)
    warn(message)


def warn_of_channels_last(shape: tuple[int, ...], sizes: list[tuple[int, ...]], hint: str) -> None:
    """Warns of a layer whose rows would be taken for channels: the axes before its last one fit an input's size."""
    scaled, as_it_is = (any(_is_scaled(grid, size) for size in sizes) for grid in (shape[1:-1], shape[2:]))
    # Few rows fit any size.
    if scaled and not as_it_is and min(shape[1:-1]) > 2:
        warn(f"The layer's value has shape {shape}, which looks like a channels-last map (N, *s, C). {hint}")


def check_channel_dim(channel_dim: int, inputs: tuple[Tensor, ...]) -> None:
    """Refuses an axis of the channels that is the examples' or that no input has."""
    if channel_dim != 1 and not any(has_channels(tensor, channel_dim) for tensor in inputs):
        raise ValueError(
            f"channel_dim is {channel_dim} for inputs of shapes {[tuple(tensor.shape) for tensor in inputs]}; expected "
            "the axis of their channels, such as 1, 2 or -1"
        )


undetected_examples: ContextVar[set[int] | None] = ContextVar("undetected_examples", default=None)
"""Inside the unmasked pass, the examples in which a forward function found nothing to explain."""


def warn_of_undetected(examples: set[int]) -> None:
    """Warns that maps are zeros, since there is no detection whose score could be explained."""
    if examples:
        warn(f"The examples {sorted(examples)} have no detection of the label: their maps are zeros")


def warn_of_empty_components(gradient: Iterable[Tensor], region: Iterable[Tensor]) -> None:
    """Warns of component maps without a positive value: the fusion follows the other map alone there."""
    for name, maps in (("gradient", gradient), ("region", region)):
        filled = torch.stack([own.flatten(1).any(dim=1) for own in maps]).any(dim=0)
        if not filled.all():
            warn(
                f"The {name} map has no positive value for {int((~filled).sum())} of {len(filled)} examples, so "
                "Fusion-CAM follows the other map alone there. Try another layer, such as one after a ReLU."
            )


def explain_missing_graph(error: RuntimeError) -> None:
    """Says why scores have no gradients at the layer, because torch's message names an argument of its own."""
    if any(part in str(error) for part in ("allow_unused", "does not require grad", "used in the graph")):
        raise RuntimeError(
            "The scores have no gradients at the layer: the model detaches them or runs without gradients, the layer "
            "does not reach the target, or it lies inside a checkpoint, which needs use_reentrant=False. Expected "
            "scores that depend on the layer by autograd. Methods without gradients, such as LayerScoreCam, work "
            "anyway."
        ) from error


def check_layer_values(value: Tensor, name: str) -> None:
    """Refuses a layer whose activations or gradients are not finite: a map of them is NaN, or 0 by accident."""
    finite = value.detach().isfinite()
    if not finite.all():
        wrong = int((~finite.flatten(1).all(dim=1)).sum())
        raise RuntimeError(
            f"The layer's {name} hold NaN or infinity for {wrong} of {len(value)} examples; expected finite numbers. "
            "Choose another layer, or check the model for overflow (reduced precision?)."
        )


def check_finite(attributions: Tensor, sums: Tensor) -> None:
    """Refuses attributions that are not finite, or whose sums over the channels are not: they have no order."""
    wrong = int((~(attributions.isfinite().flatten(1).all(dim=1) & sums.isfinite().flatten(1).all(dim=1))).sum())
    if wrong:
        kind = "NaN" if attributions.isnan().any() else "infinity, or overflow in the sum over the channels,"
        raise ValueError(f"attributions hold {kind} in {wrong} of {len(attributions)} examples; expected numbers")


def warn_of_unit_boxes(boxes: Tensor, width: int, height: int, example: int) -> None:
    """Warns of boxes that are all in [0, 1], as YOLO and DETR have them: in pixels, each is a part of the first one."""
    if boxes.is_floating_point() and len(boxes) and min(width, height) > 8 and boxes.max() <= 1:
        warn(
            f"The boxes of example {example} lie in the first pixel of an image that is {width} wide and {height} "
            "high; expected pixels. Multiply boxes in [0, 1] by the width and the height."
        )


def corners(boxes: Tensor) -> Tensor:
    """Boxes as x1, y1, x2, y2, whatever their format: plain tensors are read so, and ``BoundingBoxes`` know theirs.

    Rows and slices of ``BoundingBoxes`` are plain tensors, so this comes before anything else.
    """
    if not isinstance(boxes, BoundingBoxes):
        return boxes
    if boxes.shape[-1] != 4:
        raise ValueError(f"The boxes have the format {boxes.format}; expected boxes without a rotation")
    converted: Tensor = convert_bounding_box_format(boxes, new_format=BoundingBoxFormat.XYXY)
    return converted.as_subclass(Tensor)


def check_windows(
    options: Mapping[str, object], arguments: tuple[object, ...], target: object, image: Tensor, channel_dim: int
) -> None:
    """Refuses what belongs to places in the image: windows are cut out of the image alone."""
    size = tuple(image.shape[2:])

    def has_places(tensor: Tensor) -> bool:
        grids = (tuple(tensor.shape[-len(size) :]), tuple(channels_first(tensor, channel_dim).shape[2:]))
        return isinstance(tensor, BoundingBoxes) or (tensor.dim() > 1 and size in grids)

    for name, value in options.items():
        for tensor in tensors_in(value):
            if tensor.dim() > 2 or has_places(tensor):
                kind = "is" if tensor is value else "holds"
                raise ValueError(
                    f"{name} {kind} a tensor {tuple(tensor.shape)}, which has no windows; expected numbers"
                )
    for tensor in filter(has_places, tensors_in(arguments)):
        raise ValueError(
            f"additional_forward_args hold a tensor {tuple(tensor.shape)}, which has the size of the input and is not "
            "cut into its windows. Apply a mask to the input beforehand; bind what belongs to no place in the input, "
            "such as another image, inside forward_func."
        )
    pixels = [each for each in (target if isinstance(target, list) else [target]) if isinstance(each, tuple)]
    if any(len(pixel) == len(size) + 1 for pixel in pixels):
        raise ValueError(
            f"target is {pixels[0]}, a pixel of the whole input, and forward_func runs on windows of it; expected a "
            "class, or scales=[1.0]"
        )


def check_batch_norm(module: Any, x: Tensor, value: Tensor, bias: Tensor, eps: float) -> None:
    """Refuses a class of batch normalization that does more: its bias may not be what its output depends on."""
    weight = 1 if module.weight is None else as_float(module.weight.detach())
    axes = (-1, *(1,) * (x.dim() - 2))
    expected = as_float(x) * (weight / (as_float(module.running_var) + eps).sqrt()).reshape(axes) + bias.reshape(axes)
    # Rounding of bfloat16 moves values by less than 1 %.
    if (as_float(value) - expected).abs().max() > 0.01 * expected.abs().max():
        raise ValueError(
            f"The {type(module).__name__} returned something else than its batch normalization, and the place of its "
            "bias is unknown; expected a torch.nn.BatchNorm, and an activation as a module of its own"
        )
