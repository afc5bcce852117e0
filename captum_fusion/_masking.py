"""Scores of masked inputs in bounded memory: the one place that runs many forward passes."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_hook

from captum_fusion._captum import (
    BaselineType,
    ForwardFunc,
    TargetType,
    eager,
    progress_bar,
    run_forward,
    select_targets,
)
from captum_fusion._state import Watch

Activation = Literal["softmax", "sigmoid"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

# masks(rows, size) gives the masks of these rows, (len(rows), 1, *size), in [0, 1].
Masks = Callable[[Tensor, tuple[int, ...]], Tensor]

# The rows of one forward pass are as many as keep the model's largest activation within this size. On a CPU, a margin
# below what _reusable_heap can keep; an accelerator's allocator keeps everything, and larger batches keep it busy.
_LARGEST_ACTIVATION = {"cpu": 20 * 2**20}
_LARGEST_ACTIVATION_ELSEWHERE = 128 * 2**20


class MaskedForward:
    r"""The score of any masked input of one call of ``attribute``.

    mask(x, m) = m x + (1 - m) b, where m is broadcast over the channels of x and b is the baseline. The inputs with
    as many spatial axes as the layer are masked, the others pass through.

    The constructor checks everything that can be checked with a single forward pass of the inputs as they are.

    Args:
        forward_func (Callable): As for any Captum attribution.
        layer (torch.nn.Module): The layer whose spatial axes the masks have.
        inputs (Tensor or tuple[Tensor, ...]): As given to ``attribute``.
        target (int, tuple, Tensor, list or None): As given to ``attribute``.
        additional_forward_args (Any): As given to ``attribute``.
        baselines (Tensor, number, tuple or None): As given to ``attribute``.
        attribute_to_layer_input (bool): Whether the masks come from the layer's input rather than its output.
        activation (str or None): "softmax" over dimension 1 or "sigmoid" of the output before the target is selected,
            or None for the raw output.
        watch (Callable): Gives the context of the forward pass, see ``undisturbed``. Default: a context that does
            nothing
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: Module,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType,
        additional_forward_args: object,
        baselines: BaselineType,
        attribute_to_layer_input: bool,
        activation: Activation | None,
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
        self.inputs = _checked_inputs(inputs)
        self.examples = len(self.inputs[0])
        self.additional_forward_args = _checked_arguments(additional_forward_args, self.examples)
        self.baselines = _checked_baselines(baselines, self.inputs)
        self.channels_last = self.inputs[0].device.type == "cpu"
        try:
            output, layer_value, largest_activation = self._probe(layer, attribute_to_layer_input, watch)
        except RuntimeError:
            # Models that call view() on feature maps cannot take channels-last inputs.
            self.channels_last = False
            output, layer_value, largest_activation = self._probe(layer, attribute_to_layer_input, watch)
        self._check_output(output, target)
        self.masked = _masked_positions(self.inputs, layer_value.dim())
        budget = _LARGEST_ACTIVATION.get(self.inputs[0].device.type, _LARGEST_ACTIVATION_ELSEWHERE)
        self.rows_per_eval = max(1, budget * self.examples // largest_activation)

    def copies(self) -> tuple[Tensor, ...]:
        """The inputs for one unmasked forward pass, free for the model to change in place."""
        return tuple(tensor.clone() for tensor in self.inputs)

    def scores(
        self, examples: Tensor, masks: Masks, perturbations_per_eval: int | None = None, description: str | None = None
    ) -> Tensor:
        """Scores one masked input for each row.

        Args:
            examples (Tensor): The example that each row masks, shape (rows,).
            masks (Callable): Gives the masks of some rows at a spatial size.
            perturbations_per_eval (int or None): Masks per example in one call of ``forward_func``. Default: None,
                which takes as many rows as are fast on the device.
            description (str or None): Shows a progress bar with this description. Default: None

        Returns:
            *Tensor* of shape (rows,), float32 or wider.

        Raises:
            RuntimeError: If a score is not finite.
        """
        total = len(examples)
        step = min(total, perturbations_per_eval * self.examples if perturbations_per_eval else self.rows_per_eval)
        buffers: dict[int, Tensor] = {}
        heap = _reusable_heap() if examples.device.type == "cpu" else None
        chunks: list[Tensor] = []
        start = 0
        shrunk = False
        bar = progress_bar(description, total) if description else None
        try:
            while start < total:
                rows = torch.arange(start, min(start + step, total), device=examples.device)
                try:
                    buffers = buffers or self._buffers(step)
                    chunk = self._score_rows(examples[rows], rows, masks, buffers)
                except (RuntimeError, MemoryError) as error:
                    if step == 1 or not _out_of_memory(error):
                        raise
                    chunk, buffers = None, {}
                # Outside the handler, which keeps the failed forward pass alive.
                if chunk is None:
                    if examples.is_cuda:
                        torch.cuda.empty_cache()
                    if not shrunk:
                        shrunk = True
                        warnings.warn(
                            f"Out of memory for {step} masked inputs in one forward pass; going on with half as many, "
                            "or fewer. Give a smaller perturbations_per_eval to avoid the failed attempts.",
                            stacklevel=2,
                        )
                    step //= 2
                    continue
                chunks.append(chunk)
                start += len(rows)
                if bar:
                    bar.update(len(rows))
        finally:
            del heap
            if bar:
                bar.close()
        scores = torch.cat(chunks)
        not_finite = int((~scores.isfinite()).sum())
        if not_finite:
            raise RuntimeError(
                f"forward_func gave scores that are not finite for {not_finite} of {total} masked inputs. "
                "Expected finite scores: check the model for overflow (reduced precision?) and the baselines."
            )
        return scores

    def _buffers(self, rows: int) -> dict[int, Tensor]:
        """Memory for the masked rows of each masked input, used again for every forward pass."""
        return {
            position: self._arranged(self.inputs[position].new_empty((rows, *self.inputs[position].shape[1:])))
            for position in self.masked
        }

    def _arranged(self, tensor: Tensor) -> Tensor:
        """The tensor in the memory format of the forward passes: channels last where convolutions gain by it."""
        return tensor.to(memory_format=torch.channels_last) if self.channels_last and tensor.dim() == 4 else tensor

    @torch.no_grad()
    def _score_rows(self, examples: Tensor, rows: Tensor, masks: Masks, buffers: dict[int, Tensor]) -> Tensor:
        row_inputs = []
        for position, tensor in enumerate(self.inputs):
            if position not in self.masked:
                row_inputs.append(tensor[examples])
                continue
            mask = masks(rows, tuple(tensor.shape[2:])).to(tensor)
            masked = buffers[position][: len(rows)]
            # lerp(b, x, m) is m x + (1 - m) b.
            torch.lerp(_rows(self.baselines[position], examples), _rows(tensor, examples), mask, out=masked)
            row_inputs.append(masked)
        arguments = tuple(
            value[examples] if isinstance(value, Tensor) and value.dim() else value
            for value in self.additional_forward_args
        )
        output = run_forward(self.forward_func, tuple(row_inputs), arguments)
        if len(output) != len(rows):
            raise ValueError(
                f"forward_func returned {len(output)} scores for {len(rows)} inputs; expected one for each input, "
                "for any number of inputs"
            )
        target = self.target
        if isinstance(target, list):
            target = cast(TargetType, [target[example] for example in examples.tolist()])
        elif isinstance(target, Tensor) and target.numel() > 1:
            target = target.to(examples.device)[examples]
        return self._select(output, target).reshape(-1)

    def _select(self, output: Tensor, target: TargetType) -> Tensor:
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.activation == "softmax":
            output = output.softmax(dim=1)
        elif self.activation == "sigmoid":
            output = output.sigmoid()
        return select_targets(output, target)

    def _probe(self, layer: Module, attribute_to_layer_input: bool, watch: Watch) -> tuple[Any, Tensor, int]:
        """Runs one forward pass.

        Returns the output, the layer's value as its last run left it, and the bytes of the largest tensor that a
        module takes in or gives out.
        """
        values: list[Any] = []
        largest = max(tensor.nbytes for tensor in self.inputs)

        def keep_input(_: Module, args: tuple[Any, ...]) -> None:
            values.append(args[0] if len(args) == 1 else args)

        def keep_output(_: Module, __: tuple[Any, ...], output: Any) -> None:
            values.append(output)

        def measure(_: Module, __: tuple[Any, ...], output: Any) -> None:
            nonlocal largest
            if isinstance(output, Tensor):
                largest = max(largest, output.nbytes)

        hooks = [register_module_forward_hook(measure)]
        try:
            if attribute_to_layer_input:
                hooks.append(layer.register_forward_pre_hook(keep_input))
            else:
                hooks.append(layer.register_forward_hook(keep_output))
            with torch.no_grad(), eager(), watch(), warnings.catch_warnings():
                # Compiled modules call global hooks twice, which does no harm here.
                warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
                output = run_forward(
                    self.forward_func, tuple(map(self._arranged, self.copies())), self.additional_forward_args
                )
        finally:
            for hook in hooks:
                hook.remove()
        if not values:
            known = not isinstance(self.forward_func, Module) or layer in set(self.forward_func.modules())
            raise ValueError(
                f"The layer {type(layer).__name__} "
                + ("did not run in the forward pass" if known else "is not a module of forward_func")
                + "; expected a module that forward_func calls. A traced, exported or otherwise converted copy of a "
                "model does not call the original's modules."
            )
        return output, _checked_layer_value(values[-1], "input" if attribute_to_layer_input else "output"), largest

    def _check_output(self, output: object, given: TargetType) -> None:
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
            scores = self._select(output.detach().cpu(), target)
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


def _as_tensor(target: TargetType) -> TargetType:
    """A list of class indices as a tensor, which is selected without a loop."""
    if isinstance(target, list) and len(target) > 1 and all(isinstance(index, int) for index in target):
        return torch.tensor(target)
    return target


def _reusable_heap() -> Tensor:
    """Makes glibc keep the memory of freed activations for the next forward pass while the result is alive.

    A forward pass frees every activation that it allocates. By default glibc returns most of that to the kernel and
    takes it back, page by page, in the next pass: up to half of a forward pass's time. It keeps allocations of up to
    32 MiB for reuse once one of that size has been freed, and it returns the end of its heap, never the middle: hence
    one block that stays at the end. None of the blocks is written to, so none takes memory.
    """
    torch.empty(2**25 - 2**13, dtype=torch.uint8)
    return [torch.empty(2**25 - 2**14, dtype=torch.uint8) for _ in range(8)][-1]


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(
        sign in str(error)
        for sign in ("DefaultCPUAllocator", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")
    )


def _rows(values: Tensor, examples: Tensor) -> Tensor:
    """The value of each row; one value for all is broadcast rather than repeated."""
    return values if len(values) == 1 else values[examples]


def _checked_inputs(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise TypeError(f"inputs hold {[type(tensor).__name__ for tensor in tensors]}; expected one or more tensors")
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if any(not shape or shape[0] == 0 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            f"inputs have shapes {shapes}; expected the same number of examples, at least 1, in dimension 0"
        )
    if not any(tensor.is_floating_point() for tensor in tensors):
        raise TypeError(
            f"inputs hold {[str(tensor.dtype) for tensor in tensors]} values, which cannot be masked; expected "
            "floating-point values, scaled as the model needs them"
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


def _checked_baselines(baselines: BaselineType, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The baseline of each input as a tensor with one row, or one row per example."""
    given: Any = (None,) * len(inputs) if baselines is None else baselines
    values = given if isinstance(given, tuple) else (given,)
    if len(values) != len(inputs):
        raise ValueError(f"{len(values)} baselines were given for {len(inputs)} inputs; expected one for each")
    checked = []
    for position, (value, tensor) in enumerate(zip(values, inputs, strict=True)):
        if isinstance(value, Tensor) and value.dim():
            if value.shape not in (tensor.shape, tensor[:1].shape):
                raise ValueError(
                    f"The baseline of input {position} has shape {tuple(value.shape)}; expected a number, "
                    f"{tuple(tensor.shape)} or {tuple(tensor[:1].shape)}"
                )
            checked.append(value.detach().to(tensor))
        elif value is None or isinstance(value, (int, float, Tensor)):
            checked.append(torch.full_like(tensor[:1], 0 if value is None else float(value)))
        else:
            raise TypeError(f"The baseline of input {position} is {value!r}; expected a number, a tensor or None")
    return tuple(checked)


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


def _masked_positions(inputs: tuple[Tensor, ...], layer_dim: int) -> tuple[int, ...]:
    positions = tuple(position for position, tensor in enumerate(inputs) if tensor.dim() == layer_dim)
    shapes = [tuple(tensor.shape) for tensor in inputs]
    if not positions:
        raise ValueError(
            f"inputs have shapes {shapes}; expected at least one with {layer_dim - 2} spatial axes, as the layer has"
        )
    for position in positions:
        if not inputs[position].is_floating_point():
            raise TypeError(
                f"Input {position} holds {inputs[position].dtype} values, which cannot be masked; expected "
                "floating-point values, scaled as the model needs them"
            )
    return positions


def check_perturbations_per_eval(perturbations_per_eval: int | None) -> None:
    """Refuses a number of masks per evaluation below 1."""
    if perturbations_per_eval is not None and perturbations_per_eval < 1:
        raise ValueError(f"perturbations_per_eval is {perturbations_per_eval}; expected at least 1, or None")
