"""Where the command prints."""

from rich.console import Console


class Output(Console):
    """Standard output, whose reader may leave when it has seen enough."""

    def on_broken_pipe(self) -> None:
        """Leaves to the caller what rich would end the process for."""
        raise BrokenPipeError
