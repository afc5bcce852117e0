"""Precision and rounding: what every equation computes with."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor

# Differences of up to this many units in the last place count as rounding: a network's value is a sum of many terms,
# whose order depends on the batch and changes it by a few dozen units.
_ROUNDING = 100


def as_float(values: Tensor) -> Tensor:
    """Converts values to float32, except for float64: half precision is too coarse for sums and differences.

    Args:
        values (Tensor): Values of any type and shape.

    Returns:
        *Tensor* of the same shape, float32 or float64.

    Examples::

        >>> as_float(torch.tensor([1, 2]))
        tensor([1., 2.])
    """
    exact = values.dtype in (torch.float32, torch.float64)
    return values if exact else values.to(torch.promote_types(values.dtype, torch.float32))


def broadcast_to(values: Tensor, maps: Tensor) -> Tensor:
    """Values of shape (N,) or (N, C) that broadcast against maps of shape (N, C, *S)."""
    return values.reshape(*values.shape, *(1,) * (maps.dim() - values.dim()))


def nonzero(values: Tensor) -> Tensor:
    """Divisors, with 1 for 0."""
    return torch.where(values == 0, 1, values)


def rounding(values: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    r"""Computes the largest difference between two values of a network that counts as rounding.

    Equal scores may differ by rounding, and by other amounts in another batch. A choice or a quotient must not depend
    on such a difference. The error of a probability is proportional to the probability and to the absolute error of the
    logits, which grows with the largest number in the network:

    .. math::

        r = \min(\mathrm{eps} \max(100, 10 \mathrm{scale}), \mathrm{sqrt}(\mathrm{eps})) |\mathrm{value}|

    Args:
        values (Tensor): The value with the larger absolute value.
        scale (Tensor or float, optional): The largest absolute value in the network's inputs and outputs, of the shape
            of the values. Default: 1.0

    Returns:
        *Tensor* of the values' shape.

    Examples::

        >>> rounding(torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([1.0, 1e6])) < 1e-12
        tensor([ True, False])
    """
    values = as_float(values)
    eps = torch.finfo(values.dtype).eps
    if isinstance(scale, Tensor):
        return (10 * eps * scale).clamp(min=_ROUNDING * eps, max=sqrt(eps)) * values.abs()
    return min(eps * max(10 * scale, _ROUNDING), sqrt(eps)) * values.abs()


def safe_divide(numerator: Tensor, divisor: Tensor, terms: Tensor) -> Tensor:
    """Divides, with 0 where the divisor is 0 up to the rounding of a sum whose terms have this total size."""
    return numerator / divisor.masked_fill(divisor.detach().abs() <= rounding(terms.detach()), inf)


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
