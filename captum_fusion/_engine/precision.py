"""The precision of what is computed, whatever the precision of the model."""

import torch
from torch import Tensor


def as_float(values: Tensor) -> Tensor:
    """The values in float32, or in float64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
