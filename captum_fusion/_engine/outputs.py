"""Scores in the output of a model."""

from collections.abc import Mapping
from typing import Any


def scores_in(output: Any) -> Any:
    """Takes the scores out of a model's output.

    Args:
        output (Any): A tensor; a dictionary or a Hugging Face ``ModelOutput`` with ``logits`` or ``out``; or a tuple or
            a list, whose first entry holds the scores.

    Returns:
        *Tensor* of scores, or the output itself where it holds none of these.
    """
    if isinstance(output, Mapping):
        return next((scores_in(output[name]) for name in ("logits", "out") if name in output), output)
    if isinstance(output, (tuple, list)) and output:
        return scores_in(output[0])
    return output
