"""Messages: one line each, with close names, and safe for the terminal that shows them."""

import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches

# The package is on no index yet. A release changes this line only.
_SOURCE = "."
_CLI_PACKAGES = {"cyclopts", "matplotlib", "pandas", "PIL", "rich", "scipy"}
_MOST_CLOSE_NAMES = 5


def install_hint(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install '{_SOURCE}[{extra}]' in a checkout"


def report_error(line: str) -> None:
    """Writes an error or a warning to standard error."""
    sys.stderr.write(f"captum-fusion: {printable(line)}\n")


def format_error(error: Exception) -> str:
    """The line for an error: its message, with its kind where that is not one of ours."""
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] in _CLI_PACKAGES:
        return f"the command needs the package {error.name}: {install_hint('cli')}"
    if isinstance(error, OSError) and error.filename is not None:
        return one_line(f"{error.filename}: {error.strerror}")
    expected = isinstance(error, (OSError, RuntimeError, TypeError, ValueError))
    return one_line(error) if expected else reason(error)


def reason(error: BaseException) -> str:
    """The kind and the message of an error from elsewhere, in one line."""
    text = shorten(one_line(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def one_line(text: object) -> str:
    """A message of several lines as one."""
    return " ".join(str(text).split())


def shorten(text: str) -> str:
    """Shortens a text to at most 400 letters, with an ellipsis."""
    return text if len(text) <= 400 else f"{text[:399]}…"


def printable(text: str) -> str:
    """A text from outside with escapes in place of control characters, which a terminal would obey."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def close_names(name: str, choices: Iterable[str]) -> str:
    """A sentence with the choices that are close to a name: first those that contain it as a word."""
    names = list(dict.fromkeys(choices))
    word = re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE)
    containing = [choice for choice in names if name and word.search(choice)]
    close = list(dict.fromkeys([*containing, *get_close_matches(name, names, n=3)]))[:_MOST_CLOSE_NAMES]
    if not close:
        return ""
    return f" Did you mean {', '.join(map(repr, close[:-1]))}{' or ' if close[1:] else ''}{close[-1]!r}?"


def words(name: str) -> str:
    """A name in lower case with single spaces between its words: "Tiger_Cat" is "tiger cat"."""
    return " ".join(re.split(r"[\s_-]+", name.strip().lower()))
