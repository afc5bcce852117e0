"""Fusion-CAM, Score-CAM and the other class activation maps of their comparison as Captum attributions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_fusion._public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Imports a public name on its first use, so that ``captum-fusion --help`` need not wait for torch."""
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        public = import_module(f"{__name__}._public")
    except AttributeError as error:
        # As an AttributeError, "from captum_fusion import ..." would report it as a missing name.
        raise ImportError(f"captum_fusion cannot be imported: {error}") from error
    if name != "__all__" and name not in public.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(public, name)


def __dir__() -> list[str]:
    names: list[str] = __getattr__("__all__")
    return names
