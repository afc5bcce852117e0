"""Many rows in chunks of bounded memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from captum_fusion._engine.captum import ProgressBar
from captum_fusion._engine.state import warn


def in_chunks(
    compute: Callable[[int, int, int], Tensor], total: int, rows: int, device: torch.device, bar: ProgressBar | None
) -> Tensor:
    """Computes something for many rows, a chunk at a time, with half as many whenever memory runs out.

    Args:
        compute (Callable): Takes the first row of a chunk, the row after its last one, and the most rows that a chunk
            has from here on; returns one value for each of its rows.
        total (int): The number of rows.
        rows (int): The most rows of a chunk.
        device (torch.device): Where the rows are computed.
        bar (ProgressBar or None): Moves on with the rows.

    Returns:
        *Tensor* of shape (total,).
    """
    heap = _reusable_heap() if device.type == "cpu" else None
    chunks: list[Tensor] = []
    start = 0
    most = given = rows
    while start < total:
        stop = min(start + most, total)
        try:
            chunk = compute(start, stop, most)
        except (RuntimeError, MemoryError) as error:
            if most == 1 or not out_of_memory(error):
                raise
            chunk = None
        # Outside the handler, which keeps the failed forward pass alive.
        if chunk is None:
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if most == given:
                warn(
                    f"Out of memory for {most} masked inputs in one forward pass; continuing with half as many, or "
                    "fewer. Give a smaller perturbations_per_eval to avoid the failed attempts."
                )
            most //= 2
            continue
        chunks.append(chunk)
        if bar:
            bar.update(stop - start)
        start = stop
    del heap
    return torch.cat(chunks)


def _reusable_heap() -> Tensor:
    """Makes glibc keep the memory of freed activations for the next forward pass while the result is alive.

    A forward pass frees every activation that it allocates. By default glibc returns most of that to the kernel and
    takes it back, page by page, in the next pass: up to half of a forward pass's time. It keeps allocations of up to
    32 MiB for reuse once one of that size has been freed, and it returns the end of its heap, never the middle: hence
    one block that stays at the end. None of the blocks is written to, so none takes memory.
    """
    torch.empty(2**25 - 2**13, dtype=torch.uint8)
    return [torch.empty(2**25 - 2**14, dtype=torch.uint8) for _ in range(8)][-1]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(
        sign in str(error)
        for sign in ("DefaultCPUAllocator", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")
    )
