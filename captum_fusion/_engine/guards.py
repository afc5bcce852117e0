"""Arguments and circumstances that are refused before any forward pass."""

import torch
from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.captum import is_compiled
from captum_fusion.arguments import INTERPOLATE_MODES


def check_forward_func(forward_func: object) -> None:
    """Refuses a compiled model where torch cannot run its hooks: its layer would give no value."""
    if not hasattr(torch.compiler, "set_stance") and is_compiled(forward_func):
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
