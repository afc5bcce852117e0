"""Reports of the progress of masked passes to a listener."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Progress(NamedTuple):
    """The progress of one method or metric.

    Args:
        description (str): The method or metric.
        done (int): The number of finished passes or steps.
        total (int): The total number of passes or steps.
        note (str, optional): Text that a progress bar shows after the numbers, such as the current error. Default: ""
    """

    description: str
    done: int
    total: int
    note: str = ""


Listener = Callable[[Progress], object]
_listener: ContextVar[Listener | None] = ContextVar("_listener", default=None)


class Stopped(BaseException):
    """Raised by a listener to stop the work; handlers of ``Exception`` do not catch it."""


@contextmanager
def progress_to(listener: Listener) -> Iterator[None]:
    """Reports progress to a listener instead of drawing progress bars.

    Inside the ``with`` block, the listener is called between the passes of this thread that have
    ``show_progress=True``. If the listener raises an exception, the work ends and the model is restored.

    Args:
        listener (Callable): A function of a ``Progress``.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(progress: Progress) -> None:
    """Reports progress to the listener, if there is one.

    Args:
        progress (Progress): The progress to report.
    """
    listener = _listener.get()
    if listener is not None:
        listener(progress)


class ListenerBar:
    """A progress bar that reports to the listener."""

    def __init__(self, description: str, total: int) -> None:
        self._progress = Progress(description, 0, total)
        tell(self._progress)

    def update(self, n: float) -> None:
        """Moves on by n."""
        self._progress = self._progress._replace(done=self._progress.done + int(n))
        tell(self._progress)

    def set_postfix_str(self, s: str) -> None:
        """Sets the note of the next report."""
        self._progress = self._progress._replace(note=s)

    def close(self) -> None:
        """Closes the bar; the listener needs no report."""


def listener_bar(description: str, total: int) -> ListenerBar | None:
    """A progress bar for the listener, or None where nobody listens."""
    return None if _listener.get() is None else ListenerBar(description, total)
