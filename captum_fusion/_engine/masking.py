"""The scores of masked rows."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from math import log2
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.call import ModelCall, checked_inputs
from captum_fusion._engine.captum import (
    BaselineType,
    ForwardFunc,
    ProgressBar,
    TargetType,
    is_compiled,
    progress_bar,
    run_forward,
)
from captum_fusion._engine.chunks import in_chunks, out_of_memory
from captum_fusion._engine.forward_pass import VIEW_HINT, ForwardPass, forward_pass
from captum_fusion._engine.guards import check_interpolate_mode, check_perturbations_per_eval
from captum_fusion._engine.state import in_turn, warn
from captum_fusion.arguments import Activation
from captum_fusion.functional import InterpolateMode, upsample

# masks(rows, position) gives the masks of these rows for the input at this position: (len(rows), 1, *S) in [0, 1].
Masks = Callable[[Tensor, int], Tensor]

# The rows of one forward pass are the power of two for which what its modules have given out, and is still alive, comes
# closest to this size. On a CPU, single activations then stay below what the reusable heap can keep; an accelerator's
# allocator keeps everything, and larger batches keep it busy. Nothing is timed: other rows round differently, and the
# same call gives the same map.
_LIVE_BYTES = {"cpu": 96 * 2**20}
_LIVE_BYTES_ELSEWHERE = 512 * 2**20


_FIXED = "If it takes a fixed number of inputs, explain so many examples at a time and give perturbations_per_eval=1."


class MaskedScorer:
    r"""Scores masked inputs: mask(x, m) = m x + (1 - m) b, m broadcast over the channels of x, b the baseline.

    Args:
        opened (Session): The model that has run once.
        masked (tuple[int, ...] or None): The positions of the inputs to mask, the others pass through. Default: None,
            which means those with as many spatial axes as the layer
        interpolate_mode (str): How maps are brought to the size of an input. Default: "bilinear"
        perturbations_per_eval (int or None): Masks per example in one call of ``forward_func``. Default: None, which
            takes as many rows as are fast on the device
    """

    def __init__(
        self,
        unmasked: ForwardPass,
        masked: tuple[int, ...] | None = None,
        interpolate_mode: InterpolateMode = "bilinear",
        perturbations_per_eval: int | None = None,
    ) -> None:
        self.forward_pass = unmasked
        self.call = unmasked.call
        self.inputs = tuple(tensor.detach() for tensor in self.call.inputs)
        self.masked = _masked_positions(self.inputs, unmasked.layer_value) if masked is None else masked
        self.interpolate_mode = interpolate_mode
        self.perturbations_per_eval = perturbations_per_eval
        self._compiled = is_compiled(self.call.forward_func)
        budget = _LIVE_BYTES.get(self.call.device.type, _LIVE_BYTES_ELSEWHERE)
        self._rows = (perturbations_per_eval or 0) * self.call.examples or 2 ** max(
            0, round(log2(budget * self.call.examples / unmasked.live_bytes))
        )
        # Convolutions on a CPU gain by it.
        self._channels_last = self.call.device.type == "cpu"
        self._passed = False
        for position in self.masked:
            if not self.inputs[position].is_floating_point():
                raise TypeError(
                    f"Input {position} holds {self.inputs[position].dtype} values, which cannot be masked; expected "
                    "floating-point values, scaled as the model needs them"
                )

    @property
    def size(self) -> tuple[int, ...]:
        """The spatial shape S of the first masked input."""
        return self.size_of(self.masked[0])

    def size_of(self, position: int) -> tuple[int, ...]:
        """The spatial shape of an input."""
        return tuple(self.inputs[position].shape[2:])

    def upsample(self, maps: Tensor, position: int | None = None) -> Tensor:
        """U: maps at the size of an input, by default the first masked one."""
        return upsample(maps, self.size if position is None else self.size_of(position), self.interpolate_mode)

    def scores(self, examples: Tensor, masks: Masks, progress: str | ProgressBar | None = None) -> Tensor:
        """Scores one masked input for each row.

        Args:
            examples (Tensor): The example that each row masks, shape (rows,), or several that differ in their targets
                at most, (rows, targets): their masked input is scored once for all of their targets.
            masks (Callable): Gives the masks of some rows for one of the inputs.
            progress (str, ProgressBar or None): Shows a progress bar with this description, or moves one on.
                Default: None

        Returns:
            *Tensor* of the shape of ``examples``, float32 or wider.

        Raises:
            RuntimeError: If a score is not finite, or if ``forward_func`` fails for a number of rows.
        """
        total, shape = len(examples), examples.shape
        examples = examples.reshape(total, -1).to(self.call.device)
        # The first row is the first example as it is: where it scores otherwise than alone, scores depend on the other
        # rows, on chance or on the memory format.
        control = total > 1 and not self.forward_pass.state.batch_checked
        if control:
            examples = torch.cat([examples[:1], examples])
        buffers: dict[int, Tensor] = {}

        def score(start: int, stop: int, most: int) -> Tensor:
            nonlocal buffers
            if not buffers or len(next(iter(buffers.values()))) != most:
                buffers = {}  # Before the new ones take memory.
                buffers = self._buffers(most)
            # Where a number of rows is asked for, and where another one would be compiled anew, every forward pass has
            # the same: the last row is repeated.
            last = start + most if self.perturbations_per_eval or self._compiled else stop
            rows = torch.arange(start, last, device=self.call.device).clamp(max=stop - 1)
            chunk = self._score_rows(examples[rows], rows, masks, control, buffers)[: stop - start]
            if control and start == 0 and self._differs(chunk[0, 0], examples[0, 0]):
                if self._channels_last:
                    self._channels_last, buffers = False, {}
                    return score(start, stop, most)
                alone = self.forward_pass.unmasked_scores[examples[0, 0]]
                self.forward_pass.state.warn_of_other_rows(float(alone), float(chunk[0, 0]))
            self.forward_pass.state.batch_checked |= control
            return chunk

        bar = progress_bar(progress, len(examples)) if isinstance(progress, str) else progress
        try:
            most = self._rows if self._compiled else min(self._rows, len(examples))
            scores = in_chunks(score, len(examples), most, self.call.device, bar)
        finally:
            if bar and bar is not progress:
                bar.close()
        not_finite = int((~scores.isfinite()).any(dim=1).sum())
        if not_finite:
            raise RuntimeError(
                f"forward_func gave scores that are not finite for {not_finite} of {total} masked inputs. "
                "Expected finite scores: check the model for overflow (reduced precision?) and the baselines."
            )
        if control:
            examples, scores = examples[1:], scores[1:]
        self._check_saturation(scores.flatten(), examples.flatten())
        return scores.reshape(shape)

    def scores_of_maps(self, maps: Tensor) -> Tensor:
        r"""Scores each example masked by each of its own maps, (N, K, \*s); gives (N, K)."""
        examples, columns = (part.flatten() for part in torch.ones(maps.shape[:2]).nonzero(as_tuple=True))
        examples, columns = examples.to(maps.device), columns.to(maps.device)
        scores = self.scores(
            examples, lambda rows, position: self.upsample(maps[examples[rows], columns[rows]].unsqueeze(1), position)
        )
        return scores.reshape(maps.shape[:2])

    def as_attributions(self, maps: Tensor) -> Any:
        r"""Maps of shape (N, 1, \*S) in the form of the inputs: each channel holds the map, unmasked inputs zeros."""
        attributions = tuple(
            self.upsample(maps, position).expand(tensor.shape).contiguous()
            if position in self.masked
            else torch.zeros_like(tensor, dtype=maps.dtype)
            for position, tensor in enumerate(self.inputs)
        )
        return attributions if self.call.is_tuple else attributions[0]

    def _arranged(self, tensor: Tensor) -> Tensor:
        return tensor.to(memory_format=torch.channels_last) if self._channels_last and tensor.dim() == 4 else tensor

    def _buffers(self, rows: int) -> dict[int, Tensor]:
        """Memory for the masked rows of each masked input, used again for every forward pass."""
        return {
            position: self._arranged(self.inputs[position].new_empty((rows, *self.inputs[position].shape[1:])))
            for position in self.masked
        }

    @torch.no_grad()
    def _score_rows(
        self, examples: Tensor, rows: Tensor, masks: Masks, control: bool, buffers: dict[int, Tensor]
    ) -> Tensor:
        row_inputs = []
        masked_examples = examples[:, 0]
        for position, tensor in enumerate(self.inputs):
            own = masked_examples.to(tensor.device)
            if position not in self.masked:
                row_inputs.append(tensor[own])
                continue
            if control and rows[0] == 0:
                mask = masks(rows[1:] - 1, position).to(tensor)
                mask = torch.cat([mask.new_ones(1, 1, *self.size_of(position)), mask])
            else:
                mask = masks(rows - int(control), position).to(tensor)
            row_inputs.append(self._masked(position, own, mask, buffers[position][: len(rows)]))
        output = self._run(tuple(row_inputs), masked_examples)
        if len(output) != len(rows):
            raise ValueError(
                f"forward_func returned {len(output)} scores for {len(rows)} masked inputs; expected one for each, for "
                f"any number of inputs. {_FIXED}"
            )
        scores = [self.call.select(output, scored).reshape(-1) for scored in examples.unbind(dim=1)]
        return torch.stack(scores, dim=1).to(self.call.device)

    def _masked(self, position: int, examples: Tensor, mask: Tensor, out: Tensor) -> Tensor:
        """The masked rows of an input, in the memory that is given."""
        tensor, baseline = self.inputs[position], self.call.baselines[position]
        # lerp(b, x, m) is m x + (1 - m) b.
        return torch.lerp(_rows(baseline, examples), _rows(tensor, examples), mask, out=out)

    def _run(self, row_inputs: tuple[Tensor, ...], examples: Tensor) -> Tensor:
        arguments = self.call.arguments(examples)
        try:
            return self._pass(row_inputs, arguments)
        except (AssertionError, RuntimeError, ValueError) as error:
            if out_of_memory(error):
                raise
            if self._channels_last and re.search("view size|contiguous|stride", str(error)):
                # Models that call view() on feature maps cannot take channels-last inputs.
                self._channels_last = False
            elif len(examples) != self.call.examples:
                raise RuntimeError(
                    f"forward_func failed for {len(examples)} masked inputs in one call, though not for the "
                    f"{self.call.examples} as they are. {_FIXED} It failed with {type(error).__name__}: {error}"
                ) from error
            else:
                raise
        return self._pass(tuple(part.contiguous() for part in row_inputs), arguments)

    def _pass(self, row_inputs: tuple[Tensor, ...], arguments: tuple[Any, ...]) -> Tensor:
        # The first one may run other modules than the unmasked pass, such as those for several rows.
        known = self._passed or self._compiled
        tracking = nullcontext() if known else self.forward_pass.state.tracking()
        self._passed = True
        with in_turn(), tracking:
            output: Tensor = run_forward(self.call.forward_func, row_inputs, arguments)
        return output

    def _differs(self, score: Tensor, example: Tensor) -> bool:
        """Whether an example scores otherwise among masked inputs than on its own, by more than rounding."""
        exact = self.call.device.type == "cpu" and not torch.is_autocast_enabled(self.call.device.type)
        rounding = 1e-3 if exact and self.forward_pass.output.dtype in (torch.float32, torch.float64) else 0.05
        scale = 1 if self.call.activation else self.forward_pass.output[example].abs().max()
        return bool((score - self.forward_pass.unmasked_scores[example]).abs() > rounding * scale)

    def _check_saturation(self, scores: Tensor, examples: Tensor) -> None:
        """Warns where the activation leaves nothing of the differences between scores."""
        unmasked = self.forward_pass.unmasked_scores
        extreme = (scores == unmasked[examples]) & ((unmasked == 0) | (unmasked == 1))[examples]
        none = torch.zeros_like(unmasked)
        rows, saturated = (
            none.index_add(0, examples, part.to(none.dtype)) for part in (torch.ones_like(extreme), extreme)
        )
        if self.call.activation and ((rows > 1) & (rows == saturated)).any():
            warn(
                f"The {self.call.activation} gives {float(unmasked[int((rows == saturated).int().argmax())]):g} for an "
                "input as it is and for every mask, so that masks cannot be told apart. Where forward_func returns "
                "sums, or other scores on a large scale, give activation=None to compare the scores themselves."
            )


@contextmanager
def masked_scorer(
    forward_func: ForwardFunc,
    inputs: Tensor | tuple[Tensor, ...],
    target: TargetType,
    additional_forward_args: object,
    *,
    baselines: BaselineType,
    activation: Activation | None,
    layer: Module | None = None,
    device_ids: list[int] | None = None,
    attribute_to_layer_input: bool = False,
    with_gradients: bool = False,
    masked: tuple[int, ...] | None = None,
    blur: tuple[int, float] | None = None,
    interpolate_mode: InterpolateMode = "bilinear",
    perturbations_per_eval: int | None = None,
) -> Iterator[MaskedScorer]:
    """A call, its session and its scorer: everything is checked, and the model has run once."""
    check_perturbations_per_eval(perturbations_per_eval)
    check_interpolate_mode(interpolate_mode)
    call = ModelCall(forward_func, inputs, target, additional_forward_args, activation, baselines, blur)
    call.check_rows()
    if not any(tensor.is_floating_point() for tensor in call.inputs):
        raise TypeError(
            f"inputs hold {[str(tensor.dtype) for tensor in call.inputs]} values, which cannot be masked; expected "
            "floating-point values, scaled as the model needs them"
        )
    with forward_pass(call, layer, device_ids, attribute_to_layer_input, with_gradients=with_gradients) as unmasked:
        yield MaskedScorer(unmasked, masked, interpolate_mode, perturbations_per_eval)


def _rows(values: Tensor, examples: Tensor) -> Tensor:
    """The value of each row; one value for all is broadcast rather than repeated."""
    return values if len(values) == 1 else values[examples]


def spatial_positions(inputs: Tensor | tuple[Tensor, ...]) -> tuple[int, ...]:
    """The positions of the inputs to mask where no layer tells: those with the first one's number of spatial axes."""
    tensors = checked_inputs(inputs)
    axes = [tensor.dim() if tensor.is_floating_point() and 3 <= tensor.dim() <= 5 else 0 for tensor in tensors]
    first = next(filter(None, axes), 0)
    if not first:
        raise ValueError(
            f"inputs have shapes {[tuple(tensor.shape) for tensor in tensors]} and hold "
            f"{[str(tensor.dtype) for tensor in tensors]} values; expected one with one to three spatial axes, "
            "(N, C, *S), and floating-point values"
        )
    return tuple(position for position, count in enumerate(axes) if count == first)


def _masked_positions(inputs: tuple[Tensor, ...], layer_value: Tensor) -> tuple[int, ...]:
    positions = tuple(position for position, tensor in enumerate(inputs) if tensor.dim() == layer_value.dim())
    if not positions:
        raise ValueError(
            f"inputs have shapes {[tuple(tensor.shape) for tensor in inputs]} and the layer gives "
            f"{tuple(layer_value.shape)}; expected (N, C, *s) of both, with as many spatial axes. {VIEW_HINT}"
        )
    return positions
