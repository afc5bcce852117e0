"""What the command says on standard error, in a line each."""

import sys

from captum_fusion._app.names import one_line, reason

_EXTRA = {"cyclopts", "matplotlib", "pandas", "PIL", "rich", "scipy"}


def report_error(line: str) -> None:
    """Says what is wrong."""
    sys.stderr.write(f"captum-fusion: {line}\n")


def format_error(error: Exception) -> str:
    """What to say of an error."""
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] in _EXTRA:
        return f"the command needs the package {error.name}: pip install 'captum-fusion[cli]'"
    if isinstance(error, OSError) and error.filename is not None:
        return one_line(f"{error.filename}: {error.strerror}")
    known = isinstance(error, (OSError, RuntimeError, TypeError, ValueError))
    return one_line(error) if known else reason(error)
