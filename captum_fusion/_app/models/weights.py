"""Weights from files that the user names."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_fusion._app.messages import reason, shorten

State = Mapping[str, Tensor]

# The entries of checkpoints that hold weights. Averaged weights come first, as in timm.
_ENTRIES = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "net")
# Safe to read, but not known to torch.
_NAMESPACE = (
    " Convert it: torch.serialization.add_safe_globals([argparse.Namespace]); torch.save(torch.load({file!r}, "
    "weights_only=True)['model'], 'weights.pt')."
)


def read_state_dict(file: Path) -> State:
    """The weights in a file: bare, or an entry of a checkpoint; of averaged and last weights the averaged ones."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # The reader of a file that is no such file raises nearly everything.
        foreign = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        cause = f" It holds a {foreign[1]}, which could run code when it is read." if foreign else ""
        if foreign and foreign[1] == "argparse.Namespace":
            cause = f" It holds an argparse.Namespace.{_NAMESPACE.format(file=str(file))}"
        raise ValueError(
            f"{file} does not hold weights only.{cause} Expected a state dict, names and tensors, as torch.save writes "
            "it"
        ) from error
    while entries := [
        name for name in _ENTRIES if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)
    ]:
        if len(entries) > 1:
            warnings.warn(f"{file} holds {' and '.join(entries)}; {entries[0]} is used", stacklevel=2)
        content = content[entries[0]]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(part, Tensor) for part in content.values())
    ):
        keys = f" with the entries {', '.join(map(str, content))}" if isinstance(content, Mapping) and content else ""
        raise ValueError(
            f"{file} holds {type(content).__name__}{shorten(keys)}; expected a state dict, names and tensors, alone or "
            f"as one of the entries {', '.join(_ENTRIES)}"
        )
    # The counter of torch's AveragedModel is none of the model's weights.
    return {str(name): value for name, value in content.items() if name != "n_averaged"}


def load_state_dict(model: nn.Module, state: State, message: str) -> None:
    """Loads weights, or says which of them do not fit.

    Raises:
        ValueError: If they do not fit, with the message in front.
    """
    own = model.state_dict()
    state = _unwrap(state, own)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
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
    """The number of classes of a state dict, from the entry of its head, which may have a wrapper's prefix."""
    name = next((name for name in state or () if f".{name}".endswith(f".{head}")), None)
    return len(state[name]) if state is not None and name is not None and state[name].dim() else default


def _unwrap(state: State, own: State) -> State:
    """The state without what wrappers such as DataParallel, compile and Lightning put before all names."""
    unwrapped = state
    while not own.keys() & unwrapped.keys():
        prefixes = {name.partition(".")[0] for name in unwrapped}
        if len(prefixes) > 1 or not all("." in name for name in unwrapped):
            return state
        unwrapped = {name.partition(".")[2]: value for name, value in unwrapped.items()}
    return unwrapped
