"""Fusion-CAM, Score-CAM and the other class activation maps of their comparison as Captum attributions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_fusion._public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Imports what is public when it is asked for, so that the command starts, and can be stopped, at once."""
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}._public"), name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    names: list[str] = __getattr__("__all__")
    return names
