"""Output and progress of the command."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from captum_fusion import Progress, progress_to
from captum_fusion._app.messages import printable, report_error

_SECONDS_PER_LINE = 30


class Output(Console):
    """Standard output, of plain text: names from outside may look like markup or like emoji."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """A text from outside without control characters, wherever it is printed: in a line, a title or a cell."""
        return super().render_str(printable(text), **options)

    def on_broken_pipe(self) -> None:
        """Goes on without a reader that has left, rather than end the process as rich does."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class ProgressDisplay:
    """The progress of the command on standard error: a bar on a terminal, else a line every half minute."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._due = monotonic() + _SECONDS_PER_LINE

    @contextmanager
    def bar(self, prefix: str) -> Iterator[Callable[[str], None]]:
        """Shows the current step and the progress of its masked passes.

        Args:
            prefix (str): The text before each step.

        Yields:
            A function that takes the name of the next step.
        """
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        terminal = self._console.is_terminal
        with Bar(*columns, console=self._console, transient=True, disable=not terminal, redirect_stdout=False) as bar:
            step, task = prefix, bar.add_task(prefix, total=None)

            def begin(name: str) -> None:
                nonlocal step, task
                step = f"{printable(prefix)}{name}"
                bar.remove_task(task)
                task = bar.add_task(step, total=None)

            def move(progress: Progress) -> None:
                description = f"{step}, {progress.note}" if progress.note else step
                bar.update(task, description=description, completed=progress.done, total=progress.total)
                if not terminal and monotonic() >= self._due:
                    self._due = monotonic() + _SECONDS_PER_LINE
                    report_error(f"{description}, {progress.done} of {progress.total}")

            with progress_to(move):
                yield begin
