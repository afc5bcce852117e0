"""The scores in what a model returns."""

from collections.abc import Mapping
from typing import Any


def scores_in(output: Any) -> Any:
    """The scores of an output that holds more, or the output itself.

    They are ``logits`` or ``out`` in a dictionary or in a Hugging Face ``ModelOutput``, and the first entry of a tuple
    or a list.
    """
    if isinstance(output, Mapping):
        return next((scores_in(output[name]) for name in ("logits", "out") if name in output), output)
    if isinstance(output, (tuple, list)) and output:
        return scores_in(output[0])
    return output
