"""The docstrings as ``help()`` and the reference show them: every parameter once, in order, and none extra."""

import inspect
import re
from collections.abc import Iterator
from inspect import Parameter
from typing import Any

import captum_fusion
from captum_fusion import attr, functional, metrics

PUBLIC = [
    *((captum_fusion.__name__, name, getattr(captum_fusion, name)) for name in captum_fusion.__all__),
    *((attr.__name__, name, getattr(attr, name)) for name in attr.__all__),
    *((metrics.__name__, name, getattr(metrics, name)) for name in metrics.__all__),
    *(
        (functional.__name__, name, getattr(functional, name))
        for name in functional.__all__
        if inspect.isfunction(getattr(functional, name))
    ),
]


def callables() -> Iterator[tuple[str, Any, Any]]:
    """The name, what has the docstring and what has the signature of everything that a user may call."""
    seen = set()
    for module, name, value in PUBLIC:
        if id(value) in seen:
            continue
        seen.add(id(value))
        if not inspect.isclass(value):
            yield f"{module}.{name}", value, value
            continue
        # The fields of a named tuple have their own docstrings, and exceptions take none of ours.
        if not issubclass(value, (tuple, BaseException)):
            yield f"{module}.{name}", value, value.__init__
        for method, function in inspect.getmembers(value, inspect.isfunction):
            # What a method's author overrides, such as channel_weights, is documented on the base class.
            of_user = method == "attribute" or not hasattr(value, "attribute")
            if of_user and not method.startswith("_") and function.__module__.startswith(captum_fusion.__name__):
                yield f"{module}.{name}.{method}", function, function


def documented(docstring: str) -> dict[str, list[str]]:
    """The description of each argument, by its name."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n|\n)*)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    entries: dict[str, list[str]] = {}
    if section is not None:
        for entry in re.split(r"^    (?=\S)", section[1], flags=re.MULTILINE)[1:]:
            name = re.match(r"(\w+) \(", entry)
            assert name, f"not of the form 'name (type): what it is': {entry}"
            entries.setdefault(name[1], []).append(entry)
    return entries


def mistakes(docstring: str | None, signed: Any) -> Iterator[str]:
    """The differences between the documented arguments and the signature."""
    entries = documented(docstring or "")
    parameters = {name: value for name, value in inspect.signature(signed).parameters.items() if name != "self"}
    if not docstring or list(entries) != list(parameters):
        yield f"documents {list(entries)}; expected {list(parameters)}"
        return
    kinds = {value.kind for value in parameters.values()}
    # A tunnel around a method passes on what that takes, as Captum's does; the means take metrics by their names.
    takes_any = signed.__qualname__.startswith(("AugmentationTunnel", "DatasetMeans"))
    if Parameter.VAR_POSITIONAL in kinds or (Parameter.VAR_KEYWORD in kinds and not takes_any):
        yield "takes arguments without names"
    for name, parameter in parameters.items():
        if len(entries[name]) != 1:
            yield f"documents {name} {len(entries[name])} times"
        if ("Default:" in entries[name][0]) != (parameter.default is not parameter.empty):
            yield f"{name} has a default that is not documented, or the reverse"
    # Prose that several classes share is filled in when the package is imported; braces inside a line are LaTeX's.
    if re.search(r"^ *\{\w*\}$|\$\w|%\(\w+\)s|<<|>>>>", docstring, re.MULTILINE):
        yield "holds a placeholder"


def test_every_parameter_is_documented() -> None:
    everything = list(callables())
    assert len(everything) > 80
    found = [f"{name} {mistake}" for name, docs, signed in everything for mistake in mistakes(docs.__doc__, signed)]
    assert not found, "\n".join(found)
