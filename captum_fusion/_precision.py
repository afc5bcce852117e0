"""Full precision whatever the caller's settings are."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Computes in the tensors' own type, without the caller's autocast and reduced precision of matrix products.

    A regression solved in bfloat16 or TF32 has the errors of its factorization as large as its results; masks and blurs
    are off by some thousandths.
    """
    torch_backends: Any = torch.backends
    backends: tuple[Any, Any] = (torch_backends.cuda.matmul, getattr(torch_backends.mkldnn, "matmul", None))
    # Each backend has its own setting from torch 2.9 on, where the one of all fails if they differ.
    apart = all(hasattr(backend, "fp32_precision") for backend in backends)
    before = [backend.fp32_precision for backend in backends] if apart else [torch.get_float32_matmul_precision()]

    def set_precisions(precisions: list[str]) -> None:
        if not apart:
            torch.set_float32_matmul_precision(precisions[0])
        for backend, precision in zip(backends if apart else (), precisions, strict=apart):
            backend.fp32_precision = precision

    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        set_precisions(["ieee"] * 2 if apart else ["highest"])
        stack.callback(set_precisions, before)
        yield
