"""The processes that share a benchmark, as torchrun starts them; a single one without it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed

from captum_fusion._app.messages import one_line

T = TypeVar("T")
# A process that has finished its share waits for as long as others work.
_TIMEOUT = timedelta(days=365)


class ProcessGroup:
    """The rank of this process, the number of processes, and what they do together."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._group = group

    def wait(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            distributed.barrier(group=self._group)

    def broadcast_from_rank0(self, action: Callable[[], T]) -> T:
        """Runs an action on rank 0 and returns its result on all; if it fails, all processes raise its error."""
        if self.size == 1:
            return action()
        outcome: list[Any] = [None]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                outcome = [(True, action())]
            except Exception as error:
                failure, outcome = error, [(False, one_line(error))]
        distributed.broadcast_object_list(outcome, src=0, group=self._group)
        succeeded, value = outcome[0]
        if not succeeded:
            raise failure or ValueError(value)
        result: T = value
        return result


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """The processes that torchrun or the caller has started."""
    started = "WORLD_SIZE" in os.environ and not distributed.is_initialized()
    if started:
        distributed.init_process_group("gloo")
    if not distributed.is_initialized():
        yield ProcessGroup()
        return
    # A group of its own: the caller's may have another backend and a shorter timeout.
    group = distributed.new_group(backend="gloo", timeout=_TIMEOUT)
    try:
        yield ProcessGroup(distributed.get_rank(), distributed.get_world_size(), group)
    finally:
        distributed.destroy_process_group(None if started else group)
