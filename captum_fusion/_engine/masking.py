"""Perturbed rows to scores, in bounded memory."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import log2
from typing import Any, cast

import torch
from torch import Tensor

from captum_fusion._engine.call import ModelCall, checked_inputs
from captum_fusion._engine.captum import ProgressBar, is_compiled, progress_bar, run_forward
from captum_fusion._engine.forward_pass import Differentiation, ForwardPass, forward_pass
from captum_fusion._engine.guards import check_channels_first, check_maskable, check_replacement
from captum_fusion._engine.layer_hooks import VIEW_HINT
from captum_fusion._engine.state import warn
from captum_fusion._engine.token_grid import channels_back, channels_first
from captum_fusion.functional import upsample

# masks(rows, position) gives the masks of these rows for the input at this position: (len(rows), 1, *S) in [0, 1].
Masks = Callable[[Tensor, int], Tensor]
# replace(inputs, removed) gives the inputs with other values where pixels are removed, (rows, 1, *S) of dtype bool.
Replace = Callable[[Tensor, Tensor], Tensor]

# One forward pass has as many rows, a power of two, as bring the live outputs of its modules closest to this size. On a
# CPU, single activations then fit into the reusable heap; an accelerator's allocator keeps everything, and larger
# batches keep it busy. The number is computed and not timed: another number of rows rounds differently, and the same
# call must return the same map.
_CPU_BYTES, _ACCELERATOR_BYTES = 96 * 2**20, 2 * 2**30

_FIXED = "If it takes a fixed number of inputs, explain that many examples at a time with perturbations_per_eval=1."


class Perturbation:
    """The change of the rows of a forward pass: in the inputs that it fills, or in the model while it runs."""

    positions: tuple[int, ...] = ()
    """The inputs that it fills; the others pass through."""

    def fill(self, position: int, rows: Tensor, examples: Tensor, out: Tensor) -> None:
        """Writes one input of these rows, each made from one example."""
        raise NotImplementedError

    def running(self, rows: Tensor, size: int) -> AbstractContextManager[object]:  # noqa: ARG002
        """Returns the context in which the model runs; of its ``size`` rows, only these first ones are perturbed."""
        return nullcontext()


class Masking(Perturbation):
    """mask(x, m) = m x + (1 - m) b, m broadcast over the channels of x, b the baseline."""

    def __init__(self, call: ModelCall, positions: tuple[int, ...], masks: Masks) -> None:
        self.call, self.positions, self.masks = call, positions, masks

    def fill(self, position: int, rows: Tensor, examples: Tensor, out: Tensor) -> None:
        """Masks one input."""
        tensor, baseline = self.call.tensors[position].detach(), self.call.baseline_tensors[position]
        # lerp(b, x, m) is m x + (1 - m) b. A value that all examples share is broadcast rather than repeated.
        baseline, tensor = (part if len(part) == 1 else part[examples] for part in (baseline, tensor))
        # Copied, since writing in another memory order than is read from takes longer.
        out.copy_(torch.lerp(baseline, tensor, self.masks(rows, position).to(tensor)))


class Replacement(Perturbation):
    """Fills removed pixels by a function; the masks, of dtype bool, are True for the pixels to keep."""

    def __init__(self, call: ModelCall, positions: tuple[int, ...], masks: Masks, replace: Replace) -> None:
        self.call, self.positions, self.masks, self.replace = call, positions, masks, replace

    def fill(self, position: int, rows: Tensor, examples: Tensor, out: Tensor) -> None:
        """Replaces the removed pixels of one input."""
        inputs, channel_dim = self.call.tensors[position].detach()[examples], self.call.channel_dim
        removed = ~self.masks(rows, position).to(inputs.device)
        # The function may change its arguments in place.
        replaced = self.replace(*(channels_back(part.clone(), channel_dim) for part in (inputs, removed)))
        check_replacement(replaced, tuple(channels_back(inputs, channel_dim).shape))
        out.copy_(torch.where(removed, channels_first(replaced, channel_dim).to(inputs), inputs))


class MaskedScorer:
    """Scores perturbed rows of the inputs.

    ``positions`` names the inputs to mask, by default those with as many spatial axes as the layer.
    """

    def __init__(self, unmasked: ForwardPass, positions: tuple[int, ...] | None = None) -> None:
        self.forward_pass = unmasked
        self.call = unmasked.call
        self.inputs = tuple(tensor.detach() for tensor in self.call.tensors)
        self.positions = _with_axes_of(unmasked.layer_value, self.inputs) if positions is None else positions
        self._compiled = is_compiled(self.call.forward_func)
        budget = _CPU_BYTES if self.call.device.type == "cpu" else _ACCELERATOR_BYTES
        self._rows = (self.call.perturbations_per_eval or 0) * self.call.examples or 2 ** max(
            0, round(log2(budget * self.call.examples / unmasked.peak_bytes))
        )
        # Convolutions on a CPU are faster in this memory format.
        self._channels_last = self.call.device.type == "cpu"
        self._passed = False
        for position in self.positions:
            check_channels_first(tuple(self.inputs[position].shape), tuple(unmasked.layer_value.shape[2:]))

    @property
    def size(self) -> tuple[int, ...]:
        """The spatial shape S of the first masked input."""
        return self.size_of(self.positions[0])

    def size_of(self, position: int) -> tuple[int, ...]:
        """The spatial shape of an input."""
        return tuple(self.inputs[position].shape[2:])

    def upsample(self, maps: Tensor, position: int | None = None) -> Tensor:
        """U: maps at the size of an input, by default the first masked one."""
        size = self.size if position is None else self.size_of(position)
        return upsample(maps, size, self.call.interpolate_mode)

    def as_attributions(self, maps: Tensor | dict[int, Tensor]) -> Any:
        r"""Maps of shape (N, 1, \*S) in the form of the inputs: each channel holds the map, unmasked inputs zeros.

        Inputs without a map of their own share that of the first masked one.
        """
        own = maps if isinstance(maps, dict) else {self.positions[0]: maps}
        shared = own[self.positions[0]]
        return self.call.in_form(
            tuple(
                self.upsample(own.get(position, shared), position).expand(tensor.shape).contiguous()
                if position in self.positions
                else torch.zeros_like(tensor, dtype=shared.dtype)
                for position, tensor in enumerate(self.inputs)
            )
        )

    def on_same_inputs(self, *maps: dict[int, Tensor]) -> tuple[dict[int, Tensor], ...]:
        """Gives all components maps for the same inputs: their own, or the first input's at the other input's size."""
        positions = sorted({position for own in maps for position in own})
        first = self.positions[0]
        return tuple({i: own[i] if i in own else self.upsample(own[first], i) for i in positions} for own in maps)

    def scores_of_maps(self, maps: dict[int, Tensor]) -> Tensor:
        r"""Scores each example masked by each of its own maps, (N, K, \*s) for each input; gives (N, K)."""
        shared = maps[self.positions[0]]
        examples, columns = torch.ones(shared.shape[:2], device=shared.device).nonzero(as_tuple=True)

        def masks(rows: Tensor, position: int) -> Tensor:
            return self.upsample(maps.get(position, shared)[examples[rows], columns[rows]].unsqueeze(1), position)

        return self.masked_scores(examples, masks).reshape(shared.shape[:2])

    def masked_scores(self, examples: Tensor, masks: Masks, progress: str | ProgressBar | None = None) -> Tensor:
        """Scores one masked input for each row; see ``scores``."""
        return self.scores(examples, Masking(self.call, self.positions, masks), progress)

    def scores(self, examples: Tensor, perturbation: Perturbation, progress: str | ProgressBar | None = None) -> Tensor:
        """Scores each row of a perturbation; gives the shape of ``examples``, float32 or wider.

        ``examples`` holds the example that each row is made from, (rows,), or several that differ in their targets at
        most, (rows, targets): the row is scored once for all of their targets. ``progress`` is the description of a new
        progress bar, or an open bar to advance. Scores that are not finite are refused, and so is a ``forward_func``
        that fails for several rows.
        """
        shape = examples.shape
        examples = examples.reshape(len(examples), -1).to(self.call.device)
        bar = progress if not isinstance(progress, str) else None
        if isinstance(progress, str) and self.call.show_progress:
            bar = progress_bar(progress, len(examples))
        try:
            scores = self._in_chunks(examples, perturbation, bar)
        finally:
            if bar and bar is not progress:
                bar.close()
        not_finite = int((~scores.isfinite()).any(dim=1).sum())
        if not_finite:
            raise RuntimeError(
                f"forward_func returned scores that are not finite for {not_finite} of {len(scores)} masked inputs. "
                "Expected finite scores: check the model for overflow (reduced precision?) and the baselines."
            )
        self._check_saturation(scores.flatten(), examples.flatten())
        return scores.reshape(shape)

    def _in_chunks(self, examples: Tensor, perturbation: Perturbation, bar: ProgressBar | None) -> Tensor:
        """The scores, (rows, targets), a chunk at a time, with half as many rows whenever memory runs out."""
        heap = _reusable_heap() if self.call.device.type == "cpu" else None
        # One row of the first pass is the unmasked first example. If its score differs from that of the unmasked pass,
        # scores depend on the other rows, on chance or on the memory format.
        reference = len(examples) > 1 and not self.forward_pass.state.batch_checked
        most = first_most = self._rows if self._compiled else min(self._rows, len(examples) + reference)
        # All passes have the same number of rows if the caller has set it, or if another one would compile the model
        # again.
        fixed = self._compiled or self.call.perturbations_per_eval is not None
        buffers: dict[int, Tensor] = {}
        chunks: list[Tensor] = []
        start = 0
        while start < len(examples):
            stop = min(start + most - reference, len(examples))
            size = most if fixed else stop - start + reference
            try:
                chunk = self._score_rows(examples, perturbation, start, stop, size, buffers)
            except (RuntimeError, MemoryError) as error:
                if most == 1 or not _out_of_memory(error):
                    raise
                chunk = None
            # Outside the handler, which keeps the failed forward pass alive.
            if chunk is None:
                buffers.clear()
                if self.call.device.type == "cuda":
                    torch.cuda.empty_cache()
                if most == first_most:
                    warn(
                        f"Out of memory for {most} masked inputs in one forward pass; continuing with half as many, or "
                        "fewer. Pass a smaller perturbations_per_eval to avoid the failed attempts."
                    )
                most //= 2
                continue
            if reference and self._differs(chunk[stop - start, 0], examples[0, 0]):
                if self._channels_last:
                    self._channels_last = False
                    buffers.clear()
                    continue
                alone = self.forward_pass.unmasked_scores[examples[0, 0]]
                self.forward_pass.state.warn_of_other_rows(float(alone), float(chunk[stop - start, 0]))
            self.forward_pass.state.batch_checked |= reference
            reference = False
            chunks.append(chunk[: stop - start])
            if bar:
                bar.update(stop - start)
            start = stop
        del heap
        return torch.cat(chunks)

    @torch.no_grad()
    def _score_rows(
        self,
        examples: Tensor,
        perturbation: Perturbation,
        start: int,
        stop: int,
        size: int,
        buffers: dict[int, Tensor],
    ) -> Tensor:
        """The scores of the rows from start to stop, and of the first example as it is in the remaining ones."""
        rows = torch.arange(start, stop, device=self.call.device)
        chosen = torch.cat([examples[start:stop], examples[:1].expand(size - len(rows), -1)])
        batch = []
        for position, tensor in enumerate(self.inputs):
            own = chosen[:, 0].to(tensor.device)
            if position not in perturbation.positions:
                batch.append(tensor[own])
                continue
            if position not in buffers:
                # The same memory for every pass; the first one has the most rows.
                channels_last = self._channels_last and tensor.dim() == 4
                order = torch.channels_last if channels_last else torch.contiguous_format
                shape = (size, *tensor.shape[1:])
                buffers[position] = torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=order)
            out = buffers[position][:size]
            if len(rows):
                perturbation.fill(position, rows, own[: len(rows)], out[: len(rows)])
            out[len(rows) :] = tensor[own[len(rows) :]]
            batch.append(out)
        channels_last = self._channels_last
        output = self._run(tuple(batch), chosen[:, 0], perturbation, rows)
        if self._channels_last != channels_last:
            buffers.clear()
        if len(output) != size:
            raise ValueError(
                f"forward_func returned {len(output)} scores for {size} masked inputs; expected one for each, for "
                f"any number of inputs. {_FIXED}"
            )
        scores = [self.call.select(output, scored).reshape(-1) for scored in chosen.unbind(dim=1)]
        return torch.stack(scores, dim=1).to(self.call.device)

    def _run(self, batch: tuple[Tensor, ...], examples: Tensor, perturbation: Perturbation, rows: Tensor) -> Tensor:
        arguments = self.call.arguments_of(examples)
        try:
            return self._pass(batch, arguments, perturbation.running(rows, len(examples)))
        except (AssertionError, RuntimeError, ValueError) as error:
            if _out_of_memory(error):
                raise
            if self._channels_last and re.search("view size|contiguous|stride", str(error)):
                # Models that call view() on feature maps cannot take channels-last inputs.
                self._channels_last = False
            elif len(examples) != self.call.examples:
                raise RuntimeError(
                    f"forward_func failed for {len(examples)} masked inputs in one call, but not for the "
                    f"{self.call.examples} unmasked ones. {_FIXED} It failed with {type(error).__name__}: {error}"
                ) from error
            else:
                raise
        contiguous = tuple(part.contiguous() for part in batch)
        return self._pass(contiguous, arguments, perturbation.running(rows, len(examples)))

    def _pass(
        self, batch: tuple[Tensor, ...], arguments: tuple[Any, ...], running: AbstractContextManager[object]
    ) -> Tensor:
        # The first one may run other modules than the unmasked pass, such as those for several rows.
        is_tracked = self._passed or self._compiled
        tracking = nullcontext() if is_tracked else self.forward_pass.state.tracking(self.call.forward_func)
        self._passed = True
        with running, tracking:
            output: Tensor = cast(Tensor, run_forward(self.call.run, batch, None, arguments))
        return output

    def _differs(self, score: Tensor, example: Tensor) -> bool:
        """Whether an example's score among masked inputs differs from its own score by more than rounding."""
        exact = self.call.device.type == "cpu" and not torch.is_autocast_enabled(self.call.device.type)
        rounding = 1e-3 if exact and self.forward_pass.output.dtype in (torch.float32, torch.float64) else 0.05
        unmasked = self.forward_pass.unmasked_scores[example]
        scale = self.forward_pass.output[example].abs().max()
        if self.call.activation:
            # A logit's absolute rounding is its probability's relative one.
            scale = (torch.maximum(score, unmasked) * scale.clamp(min=1)).clamp(max=1)
        return bool((score - unmasked).abs() > rounding * scale)

    def _check_saturation(self, scores: Tensor, examples: Tensor) -> None:
        """Warns where the activation leaves nothing of the differences between scores."""
        if not self.call.activation:
            return
        unmasked = self.forward_pass.unmasked_scores
        extreme = (scores == unmasked[examples]) & ((unmasked == 0) | (unmasked == 1))[examples]
        none = torch.zeros_like(unmasked)
        rows, saturated = (
            none.index_add(0, examples, part.to(none.dtype)) for part in (torch.ones_like(extreme), extreme)
        )
        if ((rows > 1) & (rows == saturated)).any():
            warn(
                f"The {self.call.activation} is {float(unmasked[int((rows == saturated).int().argmax())]):g} for an "
                "unmasked input and for every mask, so masks cannot be compared. If forward_func returns sums, or "
                "other scores on a large scale, pass activation=None to compare the scores themselves."
            )


@contextmanager
def masked_scorer(
    call: ModelCall, *, with_gradients: bool = False, positions: tuple[int, ...] | None = None
) -> Iterator[MaskedScorer]:
    """The scorer of a call: everything is checked, and the model has run once."""
    call.check_rows()
    check_maskable(call.tensors, positions)
    differentiation = Differentiation(call.explained) if with_gradients else None
    with forward_pass(call, differentiation=differentiation, measure_memory=True) as unmasked:
        yield MaskedScorer(unmasked, positions)


def spatial_positions(inputs: Tensor | tuple[Tensor, ...]) -> tuple[int, ...]:
    """The positions of the inputs to mask where no layer decides: those with the first one's number of spatial axes."""
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


def _with_axes_of(layer_value: Tensor, inputs: tuple[Tensor, ...]) -> tuple[int, ...]:
    # Masks of booleans and maps of indices pass through.
    positions = tuple(i for i, x in enumerate(inputs) if x.dim() == layer_value.dim() and x.is_floating_point())
    if not positions:
        raise ValueError(
            f"inputs have shapes {[tuple(tensor.shape) for tensor in inputs]} and the layer's value has shape "
            f"{tuple(layer_value.shape)}; expected (N, C, *s) with the same number of spatial axes. {VIEW_HINT}"
        )
    return positions


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
