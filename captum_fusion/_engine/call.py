"""The arguments of one public call, checked once and carried to everything below it."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from captum.attr import LayerAttribution
from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.captum import BaselineType, ForwardFunc, TargetType, select_targets
from captum_fusion._engine.guards import (
    check_channel_dim,
    check_dense,
    check_forward_func,
    check_interpolate_mode,
    check_layer,
    check_logits,
    check_perturbations_per_eval,
    check_rows_inside,
    check_values,
)
from captum_fusion._engine.token_grid import channels_back, channels_first
from captum_fusion.arguments import Activation, InterpolateMode, check_activation
from captum_fusion.functional import as_float, gaussian_blur


@dataclass(frozen=True, eq=False)
class ModelCall:
    """The arguments of an ``attribute`` or a metric, under Captum's names; what follows from them is computed once.

    Nothing is run. ``blur`` is the kernel size and sigma of the Gaussian that makes the baseline of an input with
    spatial axes where none is given; without it that baseline is 0. ``inputs`` and ``baselines`` have their channels in
    ``channel_dim``; everything that follows from them has them in dimension 1.
    """

    forward_func: ForwardFunc
    inputs: Tensor | tuple[Tensor, ...]
    target: TargetType = None
    additional_forward_args: object = None
    activation: Activation | None = None
    baselines: BaselineType = None
    perturbations_per_eval: int | None = None
    show_progress: bool = False
    _: KW_ONLY
    channel_dim: int = 1
    blur: tuple[int, float] | None = None
    layer: Module | None = None
    device_ids: list[int] | None = None
    attribute_to_layer_input: bool = False
    interpolate_mode: InterpolateMode = "bilinear"

    def __post_init__(self) -> None:
        check_activation(self.activation)
        check_interpolate_mode(self.interpolate_mode)
        check_perturbations_per_eval(self.perturbations_per_eval)
        check_forward_func(self.forward_func)
        # Computing them checks them.
        _ = self.tensors if self.baselines is None else self.baseline_tensors

    @classmethod
    def of_layer(
        cls,
        method: LayerAttribution,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType,
        additional_forward_args: object,
        attribute_to_layer_input: bool,
        activation: Activation | None = None,
        interpolate_mode: InterpolateMode = "bilinear",
    ) -> "ModelCall":
        """The call of a layer's method, with the forward function and the layer that the method has now."""
        return cls(
            forward_func=method.forward_func,
            inputs=inputs,
            target=target,
            additional_forward_args=additional_forward_args,
            activation=activation,
            layer=check_layer(method.layer),
            device_ids=method.device_ids,
            attribute_to_layer_input=attribute_to_layer_input,
            interpolate_mode=interpolate_mode,
        )

    def masked(
        self,
        baselines: BaselineType,
        perturbations_per_eval: int | None,
        show_progress: bool,
        channel_dim: int = 1,
        blur: tuple[int, float] | None = None,
    ) -> "ModelCall":
        """The same call with the arguments of its masked passes."""
        return replace(
            self,
            baselines=baselines,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
            channel_dim=channel_dim,
            blur=blur,
        )

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        r"""The inputs as a tuple, (N, C, \*S) each that has spatial axes."""
        inputs = checked_inputs(self.inputs)
        check_channel_dim(self.channel_dim, inputs)
        return tuple(channels_first(tensor, self.channel_dim) for tensor in inputs)

    @cached_property
    def examples(self) -> int:
        """N, the number of examples."""
        return len(self.tensors[0])

    @cached_property
    def device(self) -> torch.device:
        """The device of the first input, on which scores are collected."""
        return self.tensors[0].device

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """The additional arguments as a tuple."""
        further = self.additional_forward_args
        return () if further is None else further if isinstance(further, tuple) else (further,)

    @cached_property
    def targets(self) -> TargetType:
        """The target on the inputs' device; a list of integers is a tensor, which is selected without a loop."""
        target = self.target
        if isinstance(target, list) and len(target) == self.examples > 1 and {type(index) for index in target} == {int}:
            target = torch.tensor(target)
        return target.to(self.device) if isinstance(target, Tensor) else target

    @cached_property
    def baseline_tensors(self) -> tuple[Tensor, ...]:
        """The baseline of each input as a tensor with one row, or one row per example."""
        values: tuple[Any, ...] = self.baselines if isinstance(self.baselines, tuple) else (self.baselines,)
        if self.baselines is None:
            values *= len(self.tensors)
        if len(values) != len(self.tensors):
            raise ValueError(
                f"{len(values)} baselines were given for {len(self.tensors)} inputs; expected one for each"
            )
        return tuple(
            _checked_baseline(position, value, tensor, self.blur, self.channel_dim)
            for position, (value, tensor) in enumerate(zip(values, self.tensors, strict=True))
        )

    def in_form(self, tensors: tuple[Tensor, ...]) -> Any:
        """One tensor for each input, in the form in which the inputs were given."""
        tensors = self._in_layout(tensors)
        return tensors if isinstance(self.inputs, tuple) else tensors[0]

    def _in_layout(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One tensor for each input, with its channels where the input has them."""
        return tuple(channels_back(tensor, self.channel_dim) for tensor in tensors)

    def run(self, *arguments: Any) -> Any:
        """Runs ``forward_func`` on inputs whose channels are dimension 1, and further arguments."""
        if self.channel_dim == 1:
            return self.forward_func(*arguments)
        count = len(self.tensors)
        inputs = (tensor.contiguous() for tensor in self._in_layout(arguments[:count]))
        return self.forward_func(*inputs, *arguments[count:])

    def of_input(self, attributions: Tensor, position: int) -> Tensor:
        r"""Attributions of an input, (N, C, \*s), whether they come in its layout or as a layer's map."""
        moved = channels_first(attributions, self.channel_dim)
        return moved if moved.shape[2:] == self.tensors[position].shape[2:] else attributions

    def arguments_of(self, examples: Tensor) -> tuple[Any, ...]:
        """The additional arguments of rows that repeat some of the examples."""
        return tuple(
            value[examples.to(value.device)] if isinstance(value, Tensor) and value.dim() else value
            for value in self.arguments
        )

    def check_rows(self) -> None:
        """Refuses additional tensors whose rows cannot be repeated as those of the inputs are."""
        for position, value in enumerate(self.arguments):
            check_rows_inside(value, f"additional_forward_args[{position}]", self.examples)
            if not isinstance(value, Tensor) or not value.dim():
                continue
            check_dense(value, f"additional_forward_args[{position}]")
            if len(value) != self.examples:
                raise ValueError(
                    f"additional_forward_args[{position}] is a tensor of shape {tuple(value.shape)}; expected one row "
                    f"for each of the {self.examples} examples. Bind a tensor that all examples share inside "
                    "forward_func."
                )

    def target_groups(self) -> Tensor:
        """Finds runs of consecutive examples that differ at most in their targets, (runs, longest).

        A shorter run repeats its first example in the remaining columns.
        """
        rows = [tensor.detach() for tensor in self.tensors]
        rows += [value for value in self.arguments if isinstance(value, Tensor) and value.dim()]
        rows += [baseline for baseline in self.baseline_tensors if len(baseline) > 1]
        first = torch.ones(self.examples, dtype=torch.bool)
        first[1:] = torch.stack(
            [(value[1:] != value[:-1]).reshape(self.examples - 1, value[0].numel()).any(dim=1).cpu() for value in rows]
        ).any(dim=0)
        starts = first.nonzero()
        lengths = starts.diff(dim=0, append=torch.tensor([[self.examples]]))
        columns = torch.arange(int(lengths.max()))
        return (starts + torch.where(columns < lengths, columns, 0)).to(self.device)

    def select(self, output: Tensor, examples: Tensor | None = None) -> Tensor:
        """The target's score in each row of an output, after the activation, float32 or wider, in memory of its own.

        Args:
            output (Tensor): One row for each of the examples.
            examples (Tensor or None): The example that each row repeats. Default: None, which means all in order
        """
        target = self.targets
        if examples is not None and isinstance(target, list):
            target = cast(TargetType, [target[example] for example in examples.tolist()])
        elif examples is not None and isinstance(target, Tensor) and target.numel() > 1:
            target = target[examples.to(target.device)]
        if isinstance(target, Tensor):
            target = target.to(output.device)
        output = as_float(output)
        if self.activation == "softmax":
            output = output.softmax(dim=1)
        elif self.activation == "sigmoid":
            output = output.sigmoid()
        return select_targets(output, target).clone()

    def explained(self, output: Tensor) -> Tensor:
        """The scores whose gradients are taken: the target's of each example, before any activation."""
        return select_targets(output, self.targets)

    def checked_scores(self, output: object) -> Tensor:
        """The score of each example, from an output that is checked against the target."""
        if not isinstance(output, Tensor):
            raise TypeError(
                f"forward_func returned {type(output).__name__}; expected a tensor of scores.{_wrap(output)}"
            )
        shape = tuple(output.shape)
        if not shape or shape[0] != self.examples:
            raise ValueError(
                f"forward_func returned an output of shape {shape} for {self.examples} examples; expected one row of "
                "scores for each example."
            )
        check_values(output)
        if self.activation == "softmax" and (len(shape) < 2 or shape[1] == 1):
            raise ValueError(
                f"The softmax over an output of shape {shape} is 1 everywhere; expected at least two classes in "
                'dimension 1. For one score per example, pass activation="sigmoid" if it is a logit, or '
                "activation=None if it is a probability or any other score."
            )
        if self.activation == "softmax":
            check_logits(output, [tuple(tensor.shape[2:]) for tensor in self.tensors])
        try:
            # On the CPU, where a target out of range is an error and not the end of the CUDA context.
            scores = self.select(output.detach().cpu())
        except (AssertionError, IndexError, RuntimeError, TypeError) as error:
            advice = ""
            if isinstance(self.target, list) and len(self.target) > self.examples == 1:
                sizes = ", ".join([str(len(self.target)), *["-1"] * (self.tensors[0].dim() - 1)])
                advice = f" For several classes of one input, pass inputs.expand({sizes})."
            raise ValueError(
                f"target {self.target!r} does not fit an output of shape {shape}: {str(error).rstrip('.!')}.{advice}"
            ) from error
        if scores.shape[0] != self.examples or scores.numel() != self.examples:
            raise ValueError(
                f"target {self.target!r} selects scores of shape {tuple(scores.shape)} from an output of shape "
                f"{shape}; expected a target that selects one score per example"
                + (", or captum_fusion.targets.region_scores for scores of each pixel" if output.dim() > 2 else "")
            )
        finite = scores.isfinite()
        if not finite.all():
            not_finite = int((~finite).sum())
            raise RuntimeError(
                f"forward_func returned scores that are not finite for {not_finite} of {self.examples} unmasked "
                "inputs. Expected finite scores: check the inputs and the model."
            )
        return scores.reshape(-1).to(self.device)


def _wrap(output: object) -> str:
    """Advises how to wrap a forward function that returns no tensor."""
    if isinstance(output, Mapping):
        names = [name for name, value in output.items() if isinstance(value, Tensor)]
        name = next((usual for usual in ("logits", "out") if usual in names), names[0] if names else "logits")
        part = f".{name}" if hasattr(output, name) else f"[{name!r}]"
    elif isinstance(output, (tuple, list)):
        part = "[0]"
    elif is_dataclass(output):
        names = [field.name for field in fields(output) if isinstance(getattr(output, field.name), Tensor)]
        part = f".{names[0] if names else 'logits'}"
    else:
        return ""
    return f" Wrap the model, as in lambda x: model(x){part}, and pass the wrapper as forward_func."


def checked_inputs(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs as a tuple."""
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise TypeError(f"inputs hold {[type(tensor).__name__ for tensor in tensors]}; expected one or more tensors")
    for position, tensor in enumerate(tensors):
        check_dense(tensor, f"inputs[{position}]")
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if any(not shape or shape[0] == 0 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            f"inputs have shapes {shapes}; expected the same number of examples, at least 1, in dimension 0"
        )
    return tensors


def _checked_baseline(
    position: int, value: Any, tensor: Tensor, blur: tuple[int, float] | None, channel_dim: int
) -> Tensor:
    if value is None and blur is not None and tensor.dim() > 2 and tensor.is_floating_point():
        return gaussian_blur(tensor.detach(), *blur).to(tensor)
    if isinstance(value, Tensor):
        check_dense(value, f"The baseline of input {position}")
    if isinstance(value, Tensor) and value.dim():
        moved = channels_first(value, channel_dim)
        if moved.shape not in (tensor.shape, tensor[:1].shape):
            raise ValueError(
                f"The baseline of input {position} has shape {tuple(value.shape)}; expected a number or "
                f"the input's shape, {tuple(channels_back(tensor, channel_dim).shape)}, or one example of it"
            )
        return moved.detach().to(tensor)
    if value is None or (isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)):
        return torch.full_like(tensor[:1], 0 if value is None else float(value), requires_grad=False)
    raise TypeError(f"The baseline of input {position} is {value!r}; expected a number, a tensor or None")
