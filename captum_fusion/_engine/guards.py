"""Arguments and circumstances that are refused before any forward pass."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torchvision.transforms.v2.functional import convert_bounding_box_format
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from captum_fusion._engine.captum import is_compiled
from captum_fusion.arguments import INTERPOLATE_MODES


def check_forward_func(forward_func: object) -> None:
    """Refuses a compiled model where torch cannot run its hooks: its layer would give no value."""
    if is_compiled(forward_func) and not hasattr(torch.compiler, "set_stance"):
        raise ValueError(
            f"forward_func is a compiled model, whose hooks torch {torch.__version__} cannot run; expected torch "
            "2.6 or later, or the model before torch.compile"
        )


def check_interpolate_mode(interpolate_mode: object) -> None:
    """Refuses an unknown way to bring maps to the input's size, and an argument that is there by position."""
    if interpolate_mode not in INTERPOLATE_MODES:
        raise ValueError(f"interpolate_mode is {interpolate_mode!r}; expected one of {INTERPOLATE_MODES}")


def check_layer(layer: object) -> Module:
    """Refuses what is no layer, such as the None of a class whose layer is still to be set."""
    if not isinstance(layer, Module):
        raise TypeError(f"layer is {layer!r}; expected a torch.nn.Module")
    return layer


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


def check_maskable(tensor: Tensor, position: int) -> None:
    """Refuses an input of integers: between a pixel value and its baseline there are none."""
    if not tensor.is_floating_point():
        raise TypeError(
            f"Input {position} holds {tensor.dtype} values, which cannot be masked; expected floating-point values, "
            "scaled as the model needs them"
        )


@contextmanager
def full_precision() -> Iterator[None]:
    """Computes in the tensors' own type, without the caller's autocast and reduced precision of matrix products.

    A regression solved in bfloat16 or TF32 has the errors of its factorization as large as its results.
    """
    torch_backends: Any = torch.backends
    backends: tuple[Any, Any] = (torch_backends.cuda.matmul, getattr(torch_backends.mkldnn, "matmul", None))
    # Each backend has its own setting from torch 2.9 on, where the one of all fails if they differ.
    apart = all(hasattr(backend, "fp32_precision") for backend in backends)
    before = [backend.fp32_precision for backend in backends] if apart else [torch.get_float32_matmul_precision()]

    def set_precisions(precisions: list[str]) -> None:
        if not apart:
            torch.set_float32_matmul_precision(precisions[0])
        for backend, precision in zip(backends if apart else (), precisions, strict=apart):
            backend.fp32_precision = precision

    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        set_precisions(["ieee"] * 2 if apart else ["highest"])
        stack.callback(set_precisions, before)
        yield


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
