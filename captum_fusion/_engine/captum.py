"""Every use of Captum's internals, so that a Captum release touches one file."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

import torch
from captum._utils.common import _run_forward as run_forward
from captum._utils.common import _select_targets as select_targets
from captum._utils.gradient import _forward_layer_eval as layer_value
from captum._utils.gradient import compute_layer_gradients_and_eval as layer_gradients
from captum._utils.progress import progress
from captum._utils.typing import BaselineType, TargetType, TensorOrTupleOfTensorsGeneric
from captum.log import log_usage

from captum_fusion._engine.progress import listener_bar

__all__ = [
    "BaselineType",
    "ForwardFunc",
    "ProgressBar",
    "TargetType",
    "TensorOrTupleOfTensorsGeneric",
    "eager",
    "is_compiled",
    "layer_gradients",
    "layer_value",
    "logged",
    "progress_bar",
    "run_forward",
    "select_targets",
]

ForwardFunc = Callable[..., Any]
Method = TypeVar("Method", bound=Callable[..., Any])


class ProgressBar(Protocol):
    """The methods of a progress bar that masked passes call."""

    def update(self, n: float) -> object:
        """Advances the bar by n."""

    def set_postfix_str(self, s: str) -> object:
        """Shows a note after the numbers."""

    def close(self) -> None:
        """Closes the bar."""


def logged(method: Method) -> Method:
    """Captum's usage logging; ``NoiseTunnel`` needs the ``__wrapped__`` that it leaves on ``attribute``."""
    return cast(Method, log_usage(part_of_slo=True)(method))


_eager_lock = threading.Lock()
_eager_users: list[Any] = []


@contextmanager
def eager() -> Iterator[None]:
    """Runs compiled functions uncompiled, because compiled code skips the hooks that Captum sets.

    torch keeps one stance for the whole process: the first thread sets it and the last one restores it. Releases of
    torch before 2.6 cannot do that.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is None:
        yield
        return
    with _eager_lock:
        # Later ones hold the first one's stance.
        _eager_users.append(_eager_users[0] if _eager_users else set_stance("force_eager"))
    try:
        yield
    finally:
        with _eager_lock:
            stance = _eager_users.pop()
            if not _eager_users:
                stance.__exit__(None, None, None)


def is_compiled(forward_func: object) -> bool:
    """Tells whether ``torch.compile`` gave this model or function, or ``Module.compile`` has compiled it in place."""
    in_place = getattr(forward_func, "_compiled_call_impl", None) is not None
    return in_place or hasattr(forward_func, "_orig_mod") or hasattr(forward_func, "_torchdynamo_orig_callable")


def progress_bar(description: str, total: int) -> ProgressBar:
    """Captum's progress bar, moved on by hand, or that of a listener."""
    return listener_bar(description, total) or cast(ProgressBar, progress(desc=description, total=total))
