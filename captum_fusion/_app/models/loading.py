"""Classifiers by name, from torchvision, timm, Hugging Face or a callable."""

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from captum_fusion._app.messages import reason
from captum_fusion._app.models.classifier import Classifier, LoadedModel, read_categories
from captum_fusion._app.models.preprocessing import GREY
from captum_fusion._app.models.torchvision import LITE_SIZES, from_lite, from_torchvision
from captum_fusion._app.models.weights import State, load_state_dict, read_state_dict
from captum_fusion._app.options import DEFAULT_MODEL
from captum_fusion.arguments import Activation
from captum_fusion.targets import scores_in


def load_classifier(
    model: str | nn.Module | None = None,
    weights: str | None = None,
    size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    activation: Activation | None = None,
    classes: str | Path | None = None,
) -> Classifier:
    """Builds a classifier from the options of the same names, see ``ModelOptions``.

    Returns:
        *Classifier*; in evaluation mode, but for a model that was given itself.
    """
    if size is not None and size < 1:
        raise ValueError(f"size is {size}; expected at least 1")
    if isinstance(model, nn.Module):
        if weights is not None:
            raise ValueError(f"weights is {weights!r}, but a model object keeps its own weights; load them yourself")
        name, loaded = type(model).__name__, _bare(model)
    else:
        name = DEFAULT_MODEL if model is None else model
        state = None if weights in (None, "none") else read_state_dict(Path(str(weights)))
        # Seeded, so that random weights are the same ones each time.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loaded = _build(name, weights is None, state, size)
        if state is not None:
            load_state_dict(loaded.network, state, f"{weights} does not fit {name}")
        loaded.network.eval()
        return_scores(loaded.network)
    preprocessing = loaded.preprocessing
    for option, values in (("mean", mean), ("std", std)):
        if values and len(values) != len(preprocessing.mean):
            raise ValueError(f"{option} is {values}; expected {len(preprocessing.mean)} values, one for each channel")
    if mean and max(mean) > 1:
        raise ValueError(f"mean is {mean}; pixels are in [0, 1], so divide a mean and std of 0 to 255 by 255")
    preprocessing = replace(preprocessing, mean=mean or preprocessing.mean, std=std or preprocessing.std)
    if size is not None:
        resize = round(size * preprocessing.resize / preprocessing.size)
        preprocessing = replace(preprocessing, resize=resize, size=size)
    categories = loaded.categories if classes is None else read_categories(Path(classes))
    return Classifier(name, loaded.network, preprocessing, categories, activation or loaded.activation)


def return_scores(network: nn.Module) -> RemovableHandle:
    """Makes a model that returns its scores among other things, as a dictionary or a tuple, return them alone."""

    def scores(_: nn.Module, __: object, output: Any) -> Any:
        return scores_in(output)

    return network.register_forward_hook(scores)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Runs what is inside in this precision, whatever the caller's autocast."""
    dtype = None if precision == "float32" else getattr(torch, precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def find_device(name: str | None) -> torch.device:
    """The device of this name; without one, cuda if there is one, else cpu.

    Raises:
        ValueError: If there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:
        raise ValueError(f"device is {name!r}, which cannot be used: {reason(error)}") from error
    return device


def _build(name: str, pretrained: bool, state: State | None, size: int | None) -> LoadedModel:
    """The model of a name, with its preprocessing and its categories."""
    if name in LITE_SIZES:
        return from_lite(name, pretrained, state, size)
    # These modules import timm and transformers.
    if name.startswith("timm:"):
        from captum_fusion._app.models.timm import from_timm

        return from_timm(name.removeprefix("timm:"), pretrained, state)
    if name.startswith("hf:"):
        from captum_fusion._app.models.hugging_face import from_hugging_face

        return from_hugging_face(name.removeprefix("hf:"), pretrained)
    if ":" in name:
        loaded = _from_callable(name)
        if state is None and not pretrained:
            torch.manual_seed(1)
            _check_random(name, loaded.network, _from_callable(name).network)
        return loaded
    return from_torchvision(name, pretrained, state)


def _from_callable(name: str) -> LoadedModel:
    module_name, _, attribute = name.partition(":")
    if module_name.endswith(".py") or "/" in module_name:
        raise ValueError(
            f"The model {name} names a file; expected package.module:callable, for example "
            f"{Path(module_name).stem}:{attribute} in the folder {Path(module_name).parent.absolute()}"
        )
    try:
        builder = getattr(import_module(module_name), attribute)
    except (Exception, SystemExit) as error:
        raise ValueError(f"The model {name} cannot be imported: {reason(error)}{_location(error)}") from error
    try:
        model = builder()
    except (Exception, SystemExit) as error:
        raise ValueError(f"The model {name} cannot be built: {reason(error)}{_location(error)}") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} returned {type(model).__name__}; expected a torch.nn.Module")
    return _bare(model)


def _check_random(name: str, network: nn.Module, other: nn.Module) -> None:
    """Refuses weights that are mostly the same from another seed: nothing tells loaded ones from random ones."""
    pairs = [pair for pair in zip(network.parameters(), other.parameters(), strict=True) if not is_lazy(pair[0])]
    same = sum(int((first == second).sum()) for first, second in pairs)
    if same > sum(first.numel() for first, _ in pairs) / 2:
        raise ValueError(
            f"weights is 'none', but {name} builds its model with weights of its own, which do not depend on the "
            "random seed; pass no weights"
        )


def _bare(network: nn.Module) -> LoadedModel:
    """A model whose first convolution tells whether it takes grey images, and that may be one of timm."""
    convolution = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if convolution is not None and convolution.in_channels == 1:
        return LoadedModel(network, GREY)
    config = getattr(network, "pretrained_cfg", None)
    if isinstance(config, Mapping) and config and "timm" in sys.modules:
        from captum_fusion._app.models.timm import preprocessing_of

        return LoadedModel(network, preprocessing_of(type(network).__name__, config))
    return LoadedModel(network)


def _location(error: BaseException) -> str:
    """The file and the line of the user's code that raised an error, if it was raised there."""
    outside = [
        frame
        for frame in extract_tb(error.__traceback__)
        if frame.filename != __file__
        and frame.filename[0] != "<"
        and f"{os.sep}importlib{os.sep}" not in frame.filename
    ]
    return f" ({outside[-1].filename}, line {outside[-1].lineno})" if outside else ""
