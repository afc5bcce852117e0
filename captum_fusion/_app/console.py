"""Where the command prints."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from captum_fusion._engine.progress import Progress, progress_to


class Output(Console):
    """Standard output, whose reader may leave when it has seen enough."""

    def on_broken_pipe(self) -> None:
        """Goes on without the reader, rather than end the process as rich does."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def progress_bar(of: str) -> Iterator[Callable[[str], None]]:
    """Shows on standard error, where that is a terminal, what is at work and how far its masked passes are.

    Args:
        of (str): What stands before it.

    Yields:
        A function that is told what begins.
    """
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    shown = console.is_terminal
    with Bar(*columns, console=console, transient=True, disable=not shown, redirect_stdout=False) as bar:
        now, task = "", bar.add_task(of, total=None)

        def begin(what: str) -> None:
            nonlocal now, task
            now = f"{of}{what}"
            bar.remove_task(task)
            task = bar.add_task(now, total=None)

        def move(progress: Progress) -> None:
            description = f"{now}, {progress.note}" if progress.note else now
            bar.update(task, description=description, completed=progress.done, total=progress.total)

        with progress_to(move):
            yield begin
