"""Who hears of the progress of masked passes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Progress(NamedTuple):
    """How far something is."""

    description: str
    done: int
    total: int
    note: str = ""
    """What a progress bar shows after the numbers, such as the error so far."""


Listener = Callable[[Progress], object]
_listener: ContextVar[Listener | None] = ContextVar("_listener", default=None)


class Stopped(BaseException):
    """What a listener raises to stop the work; no exception that handlers of failures would take for one."""


@contextmanager
def progress_to(listener: Listener) -> Iterator[None]:
    """Tells a listener, in place of drawing progress bars, between the passes that this thread makes inside.

    What the listener raises ends the work there, with everything as it was before.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(progress: Progress) -> None:
    """Tells the listener, if there is one."""
    listener = _listener.get()
    if listener is not None:
        listener(progress)


class ToldBar:
    """A progress bar that is told to the listener."""

    def __init__(self, description: str, total: int) -> None:
        self._progress = Progress(description, 0, total)
        tell(self._progress)

    def update(self, n: float) -> None:
        """Moves on by n."""
        self._progress = self._progress._replace(done=self._progress.done + int(n))
        tell(self._progress)

    def set_postfix_str(self, s: str) -> None:
        """Tells something after the numbers, the next time."""
        self._progress = self._progress._replace(note=s)

    def close(self) -> None:
        """Ends the bar, of which there is nothing to tell."""


def told_bar(description: str, total: int) -> ToldBar | None:
    """A progress bar for the listener, or None where nobody listens."""
    return None if _listener.get() is None else ToldBar(description, total)
