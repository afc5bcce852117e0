"""What the user asked, taken apart and checked without running anything."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from captum_fusion._engine.captum import BaselineType, ForwardFunc, TargetType, is_compiled, select_targets
from captum_fusion._engine.guards import check_activation
from captum_fusion._engine.precision import as_float
from captum_fusion.arguments import Activation
from captum_fusion.functional import gaussian_blur


class ModelCall:
    r"""The arguments that every ``attribute`` and every metric takes.

    Args:
        forward_func (Callable): As for any Captum attribution.
        inputs (Tensor or tuple[Tensor, ...]): As given to ``attribute``.
        target (int, tuple, Tensor, list or None): As given to ``attribute``.
        additional_forward_args (Any): As given to ``attribute``.
        activation (str or None): "softmax" over dimension 1 or "sigmoid" of the output before the target is selected,
            or None for the raw output. Default: None
        baselines (Tensor, number, tuple or None): As given to ``attribute``. Default: None
        blur (tuple[int, float] or None): The kernel size and sigma of the Gaussian that blurs an input with spatial
            axes where no baseline is given. Default: None, which means 0 there
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType,
        additional_forward_args: object,
        activation: Activation | None = None,
        baselines: BaselineType = None,
        blur: tuple[int, float] | None = None,
    ) -> None:
        check_activation(activation)
        if is_compiled(forward_func) and not hasattr(torch.compiler, "set_stance"):
            raise ValueError(
                f"forward_func is a compiled model, whose hooks torch {torch.__version__} cannot run; expected torch "
                "2.6 or later, or the model before torch.compile"
            )
        self.forward_func = forward_func
        self.is_tuple = isinstance(inputs, tuple)
        self.inputs = checked_inputs(inputs)
        self.examples = len(self.inputs[0])
        self.device = self.inputs[0].device
        given = additional_forward_args
        self.additional_forward_args: tuple[Any, ...] = (
            () if given is None else given if isinstance(given, tuple) else (given,)
        )
        self.given_target = target
        self.target = target.to(self.device) if isinstance(target, Tensor) else target
        if isinstance(target, list) and len(target) == self.examples > 1 and {type(index) for index in target} == {int}:
            # Selected without a loop.
            self.target = torch.tensor(target, device=self.device)
        self.activation = activation
        self.given_baselines = baselines
        self.baselines = _checked_baselines(baselines, self.inputs, blur)

    def check_rows(self) -> None:
        """Refuses additional tensors whose rows cannot be repeated as those of the inputs are."""
        for position, value in enumerate(self.additional_forward_args):
            if isinstance(value, Tensor) and value.dim() and len(value) != self.examples:
                raise ValueError(
                    f"additional_forward_args[{position}] is a tensor of shape {tuple(value.shape)}; expected one row "
                    f"for each of the {self.examples} examples. Bind a tensor that all examples share inside "
                    "forward_func."
                )

    def arguments(self, examples: Tensor) -> tuple[Any, ...]:
        """The additional arguments of rows that repeat some of the examples."""
        return tuple(
            value[examples.to(value.device)] if isinstance(value, Tensor) and value.dim() else value
            for value in self.additional_forward_args
        )

    def alike(self) -> Tensor:
        """Runs of consecutive examples that differ in their targets at most, (runs, longest).

        A shorter run has its first example again in the places that are left.
        """
        rows = [tensor.detach() for tensor in self.inputs]
        rows += [value for value in self.additional_forward_args if isinstance(value, Tensor) and value.dim()]
        rows += [baseline for baseline in self.baselines if len(baseline) > 1]
        first = torch.ones(self.examples, dtype=torch.bool)
        first[1:] = torch.stack(
            [(value[1:] != value[:-1]).reshape(self.examples - 1, value[0].numel()).any(dim=1).cpu() for value in rows]
        ).any(dim=0)
        starts = first.nonzero()
        lengths = starts.diff(dim=0, append=torch.tensor([[self.examples]]))
        places = torch.arange(int(lengths.max()))
        return (starts + torch.where(places < lengths, places, 0)).to(self.device)

    def select(self, output: Tensor, examples: Tensor | None = None) -> Tensor:
        """The target's score in each row of an output, after the activation, float32 or wider, in memory of its own.

        Args:
            output (Tensor): One row for each of the examples.
            examples (Tensor or None): The example that each row repeats. Default: None, which means all in order
        """
        target = self.target
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
        """What gradients are taken of: the target's score of each example, before any activation."""
        return select_targets(output, self.target)

    def checked_scores(self, output: object) -> Tensor:
        """The score of each example, from an output that is checked against the target."""
        if not isinstance(output, Tensor):
            given = type(output).__name__
            raise TypeError(f"forward_func returned {given}; expected a tensor of scores.{_wrap(output)}")
        shape = tuple(output.shape)
        if not shape or shape[0] != self.examples:
            raise ValueError(
                f"forward_func returned an output of shape {shape} for {self.examples} examples; expected one row of "
                "scores for each example"
            )
        if self.activation == "softmax" and (len(shape) < 2 or shape[1] == 1):
            raise ValueError(
                f"The softmax over an output of shape {shape} is 1 everywhere; expected at least two classes in "
                'dimension 1. For one score per example give activation="sigmoid" if it is a logit, or activation=None '
                "if it is a probability or any other score."
            )
        try:
            # On the CPU, where a target out of range is an error and not the end of the CUDA context.
            scores = self.select(output.detach().cpu())
        except (AssertionError, IndexError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{self._chosen()} given, which does not fit an output of shape {shape}: {error}"
            ) from error
        if scores.shape[0] != self.examples or scores.numel() != self.examples:
            raise ValueError(
                f"{self._chosen()} given for an output of shape {shape}, which selects scores of shape "
                f"{tuple(scores.shape)}; expected a target that selects one score per example"
            )
        not_finite = int((~scores.isfinite()).sum())
        if not_finite:
            raise RuntimeError(
                f"forward_func gave scores that are not finite for {not_finite} of {self.examples} inputs as they are. "
                "Expected finite scores: check the inputs and the model."
            )
        return scores.reshape(-1).to(self.device)

    def _chosen(self) -> str:
        return "no target was" if self.given_target is None else f"target {self.given_target!r} was"


def _wrap(output: object) -> str:
    """How to wrap a forward function that returns something else than a tensor."""
    if isinstance(output, Mapping):
        names = [name for name, value in output.items() if isinstance(value, Tensor)]
        name = next((known for known in ("logits", "out") if known in names), names[0] if names else "logits")
        part = f".{name}" if hasattr(output, name) else f"[{name!r}]"
    elif isinstance(output, (tuple, list)):
        part = "[0]"
    else:
        return ""
    return f" Wrap the model, as in lambda x: model(x){part}, and give the wrapper as forward_func."


def checked_inputs(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs as a tuple."""
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise TypeError(f"inputs hold {[type(tensor).__name__ for tensor in tensors]}; expected one or more tensors")
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if any(not shape or shape[0] == 0 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            f"inputs have shapes {shapes}; expected the same number of examples, at least 1, in dimension 0"
        )
    return tensors


def _checked_baselines(
    baselines: BaselineType, inputs: tuple[Tensor, ...], blur: tuple[int, float] | None
) -> tuple[Tensor, ...]:
    """The baseline of each input as a tensor with one row, or one row per example."""
    given: Any = (None,) * len(inputs) if baselines is None else baselines
    values = given if isinstance(given, tuple) else (given,)
    if len(values) != len(inputs):
        raise ValueError(f"{len(values)} baselines were given for {len(inputs)} inputs; expected one for each")
    checked = []
    for position, (value, tensor) in enumerate(zip(values, inputs, strict=True)):
        if value is None and blur is not None and tensor.dim() > 2 and tensor.is_floating_point():
            checked.append(gaussian_blur(tensor.detach(), *blur).to(tensor))
        elif isinstance(value, Tensor) and value.dim():
            if value.shape not in (tensor.shape, tensor[:1].shape):
                raise ValueError(
                    f"The baseline of input {position} has shape {tuple(value.shape)}; expected a number, "
                    f"{tuple(tensor.shape)} or {tuple(tensor[:1].shape)}"
                )
            checked.append(value.detach().to(tensor))
        elif value is None or (isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)):
            checked.append(torch.full_like(tensor[:1], 0 if value is None else float(value), requires_grad=False))
        else:
            raise TypeError(f"The baseline of input {position} is {value!r}; expected a number, a tensor or None")
    return tuple(checked)
