"""Scores of masked inputs in bounded memory: the one place that runs many forward passes."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module

from captum_fusion._captum import BaselineType, ForwardFunc, TargetType, progress_bar, run_forward
from captum_fusion._checks import Activation
from captum_fusion._forward import CheckedForward, checked_inputs
from captum_fusion._state import Watch
from captum_fusion.functional import gaussian_blur, upsample

# masks(rows, position) gives the masks of these rows for the input at this position: (len(rows), 1, *S) in [0, 1].
Masks = Callable[[Tensor, int], Tensor]

# The rows of one forward pass are as many as keep what its modules have given out, and is still alive, within this
# size. On a CPU, single activations then stay below what _reusable_heap can keep; an accelerator's allocator keeps
# everything, and larger batches keep it busy.
_LIVE_BYTES = {"cpu": 48 * 2**20}
_LIVE_BYTES_ELSEWHERE = 512 * 2**20


class MaskedForward(CheckedForward):
    r"""The score of any masked input of one call of ``attribute`` or of a metric.

    mask(x, m) = m x + (1 - m) b, where m is broadcast over the channels of x and b is the baseline.

    Args:
        forward_func (Callable): As for any Captum attribution.
        inputs (Tensor or tuple[Tensor, ...]): As given to ``attribute``.
        target (int, tuple, Tensor, list or None): As given to ``attribute``.
        additional_forward_args (Any): As given to ``attribute``.
        baselines (Tensor, number, tuple or None): As given to ``attribute``.
        layer (torch.nn.Module or None): The layer to explain. Default: None
        attribute_to_layer_input (bool): Whether its input is explained rather than its output. Default: False
        activation (str or None): What turns the output into scores, see ``CheckedForward``. Default: None
        watch (Callable): Gives the context of the first forward pass, see ``undisturbed``. Default: a context that
            does nothing
        masked (tuple[int, ...] or None): The positions of the inputs to mask, the others pass through. Default: None,
            which means those with as many spatial axes as the layer
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType,
        additional_forward_args: object,
        baselines: BaselineType,
        layer: Module | None = None,
        attribute_to_layer_input: bool = False,
        activation: Activation | None = None,
        watch: Watch = nullcontext,
        masked: tuple[int, ...] | None = None,
    ) -> None:
        tensors = checked_inputs(inputs)
        if not any(tensor.is_floating_point() for tensor in tensors):
            raise TypeError(
                f"inputs hold {[str(tensor.dtype) for tensor in tensors]} values, which cannot be masked; expected "
                "floating-point values, scaled as the model needs them"
            )
        self.baselines = _checked_baselines(baselines, tensors)
        super().__init__(
            forward_func, inputs, target, additional_forward_args, layer, attribute_to_layer_input, activation, watch
        )
        self.masked = _masked_positions(self.inputs, self.layer_value.dim()) if masked is None else masked
        for position in self.masked:
            if not self.inputs[position].is_floating_point():
                raise TypeError(
                    f"Input {position} holds {self.inputs[position].dtype} values, which cannot be masked; expected "
                    "floating-point values, scaled as the model needs them"
                )
        budget = _LIVE_BYTES.get(self.inputs[0].device.type, _LIVE_BYTES_ELSEWHERE)
        self.rows_per_eval = max(1, budget * self.examples // self.live_bytes)

    def size(self, position: int) -> tuple[int, ...]:
        """The spatial shape of an input."""
        return tuple(self.inputs[position].shape[2:])

    def scores(
        self, examples: Tensor, masks: Masks, perturbations_per_eval: int | None = None, description: str | None = None
    ) -> Tensor:
        """Scores one masked input for each row.

        Args:
            examples (Tensor): The example that each row masks, shape (rows,).
            masks (Callable): Gives the masks of some rows for one of the inputs.
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

    def scores_of_maps(self, maps: Tensor, perturbations_per_eval: int | None = None) -> Tensor:
        r"""Scores each example masked by its own map, of shape (N, 1, \*s); see ``scores``."""
        everyone = torch.arange(self.examples, device=maps.device)
        return self.scores(
            everyone, lambda rows, position: upsample(maps[rows], self.size(position)), perturbations_per_eval
        )

    def as_attributions(self, maps: Tensor) -> Any:
        r"""Maps of shape (N, 1, \*S) in the form of the inputs: each channel holds the map, an unmasked input None."""
        attributions: list[Tensor | None] = [None] * len(self.inputs)
        for position in self.masked:
            shape = self.inputs[position].shape
            attributions[position] = upsample(maps, self.size(position)).expand(shape).contiguous()
        return tuple(attributions) if self.is_tuple else attributions[0]

    def _buffers(self, rows: int) -> dict[int, Tensor]:
        """Memory for the masked rows of each masked input, used again for every forward pass."""
        return {
            position: self._arranged(self.inputs[position].new_empty((rows, *self.inputs[position].shape[1:])))
            for position in self.masked
        }

    @torch.no_grad()
    def _score_rows(self, examples: Tensor, rows: Tensor, masks: Masks, buffers: dict[int, Tensor]) -> Tensor:
        row_inputs = []
        for position, tensor in enumerate(self.inputs):
            if position not in self.masked:
                row_inputs.append(tensor[examples])
                continue
            mask = masks(rows, position).to(tensor)
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
        return self.select(output, target).reshape(-1)


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


def _masked_positions(inputs: tuple[Tensor, ...], layer_dim: int) -> tuple[int, ...]:
    positions = tuple(position for position, tensor in enumerate(inputs) if tensor.dim() == layer_dim)
    shapes = [tuple(tensor.shape) for tensor in inputs]
    if not positions:
        raise ValueError(
            f"inputs have shapes {shapes}; expected at least one with {layer_dim - 2} spatial axes, as the layer has"
        )
    return positions


def blurred_where_none(
    inputs: Tensor | tuple[Tensor, ...], baselines: BaselineType, kernel_size: int, sigma: float
) -> BaselineType:
    """The given baselines, and the blurred input where there is none."""
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    given: Any = (None,) * len(tensors) if baselines is None else baselines
    if not isinstance(given, tuple) or len(given) != len(tensors):
        return baselines
    return tuple(
        gaussian_blur(tensor.detach(), kernel_size, sigma)
        if value is None and isinstance(tensor, Tensor) and tensor.dim() > 2 and tensor.is_floating_point()
        else value
        for tensor, value in zip(tensors, given, strict=True)
    )
