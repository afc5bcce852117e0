"""Names that are close to or loosely the same as a given one."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

_CLOSE = 5


def close_names(given: str, known: Iterable[str]) -> str:
    """A sentence with the known names that are close to the given one: first those that hold it as a word."""
    names = list(dict.fromkeys(known))
    word = re.compile(rf"\b{re.escape(given)}\b", re.IGNORECASE)
    holding = [name for name in names if given and word.search(name)]
    close = list(dict.fromkeys([*holding, *get_close_matches(given, names, n=3)]))[:_CLOSE]
    return f" Close: {', '.join(close)}." if close else ""


def words(name: str) -> str:
    """A name in lower case with single spaces for what separates its words: "Tiger_Cat" is "tiger cat"."""
    return " ".join(re.split(r"[\s_-]+", name.strip().lower()))


def one_line(text: object) -> str:
    """A message of several lines as one."""
    return " ".join(str(text).split())


def reason(error: BaseException) -> str:
    """What an error from elsewhere says, in one line, with its kind."""
    text = one_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
