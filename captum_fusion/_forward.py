"""A forward function with its inputs and its target, checked before any long work starts."""

import warnings
import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_hook

from captum_fusion._captum import ForwardFunc, TargetType, eager, layer_gradients, run_forward, select_targets
from captum_fusion._checks import Activation
from captum_fusion._state import Watch


class CheckedForward:
    r"""What one call of ``attribute`` or of a metric runs.

    The constructor checks everything that can be checked with a single forward pass of the inputs as they are.

    Args:
        forward_func (Callable): As for any Captum attribution.
        inputs (Tensor or tuple[Tensor, ...]): As given to ``attribute``.
        target (int, tuple, Tensor, list or None): As given to ``attribute``.
        additional_forward_args (Any): As given to ``attribute``.
        layer (torch.nn.Module or None): The layer to explain. Default: None
        attribute_to_layer_input (bool): Whether its input is explained rather than its output. Default: False
        activation (str or None): "softmax" over dimension 1 or "sigmoid" of the output before the target is selected,
            or None for the raw output. Default: None
        watch (Callable): Gives the context of the forward pass, see ``undisturbed``. Default: a context that does
            nothing
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType,
        additional_forward_args: object,
        layer: Module | None = None,
        attribute_to_layer_input: bool = False,
        activation: Activation | None = None,
        watch: Watch = nullcontext,
    ) -> None:
        if hasattr(forward_func, "_orig_mod") and not hasattr(torch.compiler, "set_stance"):
            raise ValueError(
                f"forward_func is a compiled model, whose hooks torch {torch.__version__} cannot run; expected torch "
                "2.6 or later, or the model before torch.compile"
            )
        self.forward_func = forward_func
        self.target = _as_tensor(target)
        self.activation = activation
        self.is_tuple = isinstance(inputs, tuple)
        self.inputs = checked_inputs(inputs)
        self.examples = len(self.inputs[0])
        self.additional_forward_args = _checked_arguments(additional_forward_args, self.examples)
        self.layer = layer
        self.attribute_to_layer_input = attribute_to_layer_input
        self.channels_last = self.inputs[0].device.type == "cpu"
        try:
            output, values, self.live_bytes = self._probe(watch)
        except RuntimeError:
            # Models that call view() on feature maps cannot take channels-last inputs.
            self.channels_last = False
            output, values, self.live_bytes = self._probe(watch)
        self.unmasked_scores = self._checked_scores(output, target)
        if layer is not None:
            side = "input" if attribute_to_layer_input else "output"
            self.layer_value = _checked_layer_value(values[-1], side)

    def copies(self) -> Any:
        """The inputs as they were given, for one unmasked forward pass, free for the model to change in place."""
        copies = tuple(tensor.clone() for tensor in self.inputs)
        return copies if self.is_tuple else copies[0]

    def layer_gradients(self, device_ids: list[int] | None) -> tuple[Tensor, Tensor]:
        """The gradients of the targets with respect to the layer, and its activations."""
        assert self.layer is not None
        return layer_gradients(
            self.forward_func,
            self.layer,
            self.copies(),
            self.target,
            self.additional_forward_args,
            device_ids,
            self.attribute_to_layer_input,
        )

    def _arranged(self, tensor: Tensor) -> Tensor:
        """The tensor in the memory format of the forward passes: channels last where convolutions gain by it."""
        return tensor.to(memory_format=torch.channels_last) if self.channels_last and tensor.dim() == 4 else tensor

    def select(self, output: Tensor, target: TargetType) -> Tensor:
        """The target's entries of an output after the activation, float32 or wider."""
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.activation == "softmax":
            output = output.softmax(dim=1)
        elif self.activation == "sigmoid":
            output = output.sigmoid()
        return select_targets(output, target)

    def _probe(self, watch: Watch) -> tuple[Any, list[Any], int]:
        """Runs one forward pass.

        Returns the output, what the layer took in or gave out in each of its runs, and how many bytes of what the
        modules gave out were alive at once.
        """
        values: list[Any] = []
        alive = most = sum(tensor.nbytes for tensor in self.inputs)
        tracked: dict[int, weakref.ref[Tensor]] = {}

        def keep_input(_: Module, args: tuple[Any, ...]) -> None:
            values.append(args[0] if len(args) == 1 else args)

        def keep_output(_: Module, __: tuple[Any, ...], output: Any) -> None:
            values.append(output)

        def measure(_: Module, __: tuple[Any, ...], output: Any) -> None:
            nonlocal alive, most
            if not isinstance(output, Tensor) or id(output) in tracked:
                return
            key, size = id(output), output.nbytes

            def forget(_: object) -> None:
                nonlocal alive
                alive -= size
                del tracked[key]

            tracked[key] = weakref.ref(output, forget)
            alive += size
            most = max(most, alive)

        hooks = [register_module_forward_hook(measure)]
        try:
            if self.layer is not None and self.attribute_to_layer_input:
                hooks.append(self.layer.register_forward_pre_hook(keep_input))
            elif self.layer is not None:
                hooks.append(self.layer.register_forward_hook(keep_output))
            with torch.no_grad(), eager(), watch(), warnings.catch_warnings():
                # Compiled modules call global hooks twice, which does no harm here.
                warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
                inputs = tuple(self._arranged(tensor.clone()) for tensor in self.inputs)
                output = run_forward(self.forward_func, inputs, self.additional_forward_args)
        finally:
            for hook in hooks:
                hook.remove()
        if self.layer is not None and not values:
            known = not isinstance(self.forward_func, Module) or self.layer in set(self.forward_func.modules())
            raise ValueError(
                f"The layer {type(self.layer).__name__} "
                + ("did not run in the forward pass" if known else "is not a module of forward_func")
                + "; expected a module that forward_func calls. A traced, exported or otherwise converted copy of a "
                "model does not call the original's modules."
            )
        return output, values, most

    def _checked_scores(self, output: object, given: TargetType) -> Tensor:
        """The score of each example, from an output that is checked against the target."""
        if not isinstance(output, Tensor):
            raise TypeError(f"forward_func returned {type(output).__name__}; expected a tensor of scores")
        shape = tuple(output.shape)
        if not shape or shape[0] != self.examples:
            raise ValueError(
                f"forward_func returned an output of shape {shape} for {self.examples} examples; expected one row of "
                "scores for each example"
            )
        if self.activation == "softmax" and (len(shape) < 2 or shape[1] == 1):
            raise ValueError(
                f"The softmax over an output of shape {shape} is 1 everywhere; expected at least two classes in "
                'dimension 1. For one score per example give activation="sigmoid" or activation=None.'
            )
        # On the CPU, where a target out of range is an error and not the end of the CUDA context.
        target = self.target.cpu() if isinstance(self.target, Tensor) else self.target
        try:
            scores = self.select(output.detach().cpu(), target)
        except (AssertionError, IndexError, RuntimeError, TypeError) as error:
            raise ValueError(f"target {given!r} does not fit an output of shape {shape}: {error}") from error
        if scores.shape[0] != self.examples or scores.numel() != self.examples:
            chosen = "no target" if given is None else f"target {given!r}"
            raise ValueError(
                f"{chosen} was given for an output of shape {shape}, which selects scores of shape "
                f"{tuple(scores.shape)}; expected a target that selects one score per example"
            )
        not_finite = int((~scores.isfinite()).sum())
        if not_finite:
            raise RuntimeError(
                f"forward_func gave scores that are not finite for {not_finite} of {self.examples} inputs"
            )
        return scores.reshape(-1).to(output.device)


def _as_tensor(target: TargetType) -> TargetType:
    """A list of class indices as a tensor, which is selected without a loop."""
    if isinstance(target, list) and len(target) > 1 and all(isinstance(index, int) for index in target):
        return torch.tensor(target)
    return target


def checked_inputs(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise TypeError(f"inputs hold {[type(tensor).__name__ for tensor in tensors]}; expected one or more tensors")
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if any(not shape or shape[0] == 0 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            f"inputs have shapes {shapes}; expected the same number of examples, at least 1, in dimension 0"
        )
    return tuple(tensor.detach() for tensor in tensors)


def _checked_arguments(additional_forward_args: object, examples: int) -> tuple[Any, ...]:
    if additional_forward_args is None:
        return ()
    arguments = additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)
    for position, value in enumerate(arguments):
        if isinstance(value, Tensor) and value.dim() and len(value) != examples:
            raise ValueError(
                f"additional_forward_args[{position}] is a tensor of shape {tuple(value.shape)}; expected one row for "
                f"each of the {examples} examples. Bind a tensor that all examples share inside forward_func."
            )
    return arguments


def _checked_layer_value(value: object, side: str) -> Tensor:
    if isinstance(value, (tuple, list)) and len(value) == 1:
        value = value[0]
    if not isinstance(value, Tensor):
        count = f" of {len(value)} values" if isinstance(value, (tuple, list)) else ""
        raise ValueError(f"The layer's {side} is a {type(value).__name__}{count}; expected a single tensor")
    if not 3 <= value.dim() <= 5:
        raise ValueError(
            f"The layer's {side} has shape {tuple(value.shape)}; expected (N, C, *s) with one to three spatial axes"
        )
    return value
