"""Output and progress of the command."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from captum_fusion._engine.progress import Progress, progress_to


class Output(Console):
    """Standard output, of plain text: names from outside may look like markup or like emoji."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def on_broken_pipe(self) -> None:
        """Goes on without a reader that has left, rather than end the process as rich does."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def progress_bar(prefix: str) -> Iterator[Callable[[str], None]]:
    """Shows on standard error, where that is a terminal, the current step and the progress of its masked passes.

    Args:
        prefix (str): The text before each step.

    Yields:
        A function that takes the name of the next step.
    """
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with Bar(*columns, console=console, transient=True, disable=hidden, redirect_stdout=False) as bar:
        step, task = prefix, bar.add_task(prefix, total=None)

        def begin(name: str) -> None:
            nonlocal step, task
            step = f"{prefix}{name}"
            bar.remove_task(task)
            task = bar.add_task(step, total=None)

        def move(progress: Progress) -> None:
            description = f"{step}, {progress.note}" if progress.note else step
            bar.update(task, description=description, completed=progress.done, total=progress.total)

        with progress_to(move):
            yield begin
