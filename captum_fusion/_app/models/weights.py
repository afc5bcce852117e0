"""Weights from files that the user names."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_fusion._app.messages import reason

State = Mapping[str, Tensor]


def read_state_dict(file: Path) -> State:
    """The weights in a file: bare, in a checkpoint's "state_dict", and without the prefix of a wrapper."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # The reader of a file that is no such file raises nearly everything.
        foreign = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        found = f" It holds a {foreign[1]}, which could run code when it is read." if foreign else ""
        raise ValueError(
            f"{file} is not a file of weights only.{found} Expected what torch.save writes of a state dict: names and "
            "tensors"
        ) from error
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(part, Tensor) for part in content.values())
    ):
        raise ValueError(
            f"{file} holds {type(content).__name__}; expected a state dict: names and tensors, nothing else"
        )
    for prefix in ("module.", "_orig_mod."):
        if all(str(key).startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items()}
    state: State = content
    return state


def load_state_dict(model: nn.Module, state: State, message: str) -> None:
    """Loads weights, or says which of them do not fit.

    Raises:
        ValueError: If they do not fit, with the message in front.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        own = model.state_dict()
        missing = [key for key in own if key not in state]
        foreign = [key for key in state if key not in own]
        reshaped = [key for key in state if key in own and state[key].shape != own[key].shape]
        parts = [
            f"{len(keys)} {what} ({', '.join(map(str, keys[:3]))}{', ...' if len(keys) > 3 else ''})"
            for keys, what in (
                (missing, "of the model's entries are missing"),
                (foreign, "entries are none of the model's"),
                (reshaped, "have another shape"),
            )
            if keys
        ]
        raise ValueError(f"{message}: {'; '.join(parts) or reason(error)}") from error


def count_classes(state: State | None, head: str, default: int) -> int:
    """The number of classes of a state dict, from the entry of its head."""
    return len(state[head]) if state is not None and head in state and state[head].dim() else default
