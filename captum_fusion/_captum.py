"""Every use of Captum's internals, so that a Captum release touches one file."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar, cast

import torch
from captum._utils.common import _run_forward, _select_targets
from captum._utils.gradient import compute_layer_gradients_and_eval
from captum._utils.progress import progress
from captum._utils.typing import BaselineType, TargetType, TensorOrTupleOfTensorsGeneric
from captum.log import log_usage
from torch import Tensor
from torch.nn import Module

__all__ = [
    "BaselineType",
    "ForwardFunc",
    "ProgressBar",
    "TargetType",
    "TensorOrTupleOfTensorsGeneric",
    "eager",
    "layer_gradients",
    "logged",
    "progress_bar",
    "run_forward",
    "select_targets",
]

ForwardFunc = Callable[..., Any]
Method = TypeVar("Method", bound=Callable[..., Any])


class ProgressBar(Protocol):
    """What the masking engine needs of a progress bar."""

    def update(self, n: float) -> object:
        """Moves on by n."""

    def close(self) -> None:
        """Ends the bar."""


def logged(method: Method) -> Method:
    """Captum's usage logging; ``NoiseTunnel`` needs the ``__wrapped__`` that it leaves on ``attribute``."""
    return cast(Method, log_usage(part_of_slo=True)(method))


def eager() -> AbstractContextManager[object]:
    """Runs compiled functions as they were written, since compiled code passes over the hooks that Captum sets.

    Releases of torch before 2.6 cannot do that.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    return cast(AbstractContextManager[object], set_stance("force_eager")) if set_stance else nullcontext()


def progress_bar(description: str, total: int) -> ProgressBar:
    """Captum's progress bar, moved on by hand."""
    return cast(ProgressBar, progress(desc=description, total=total))


def run_forward(forward_func: ForwardFunc, inputs: tuple[Tensor, ...], additional_forward_args: tuple[Any, ...]) -> Any:
    """Calls ``forward_func`` as Captum does and returns its whole output."""
    return _run_forward(forward_func, inputs, None, additional_forward_args)


def layer_gradients(
    forward_func: ForwardFunc,
    layer: Module,
    inputs: Tensor | tuple[Tensor, ...],
    target: TargetType,
    additional_forward_args: tuple[Any, ...],
    device_ids: list[int] | None,
    attribute_to_layer_input: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of the targets with respect to the layer and its activations, float32 or wider."""
    with eager():
        gradients, activations = compute_layer_gradients_and_eval(
            forward_func,
            layer,
            inputs,
            target,
            additional_forward_args,
            device_ids=device_ids,
            attribute_to_layer_input=attribute_to_layer_input,
        )
    precision = torch.promote_types(activations[0].dtype, torch.float32)
    return gradients[0].to(precision), activations[0].detach().to(precision)


def select_targets(output: Tensor, target: TargetType) -> Tensor:
    """Selects the target of each example from the output, in all of Captum's target forms."""
    return _select_targets(output, target)
