"""Classifiers of timm by name."""

from collections.abc import Mapping
from math import floor
from typing import Any

import torch
from torchvision.transforms import InterpolationMode

from captum_fusion._app.messages import close_names, install_hint
from captum_fusion._app.models.classifier import LoadedModel, imagenet_categories
from captum_fusion._app.models.preprocessing import Preprocessing
from captum_fusion._app.models.weights import State, count_classes


def from_timm(name: str, pretrained: bool, state: State | None) -> LoadedModel:
    """A model of timm, with the preprocessing and the categories that timm has for it.

    Args:
        name (str): A name that ``timm.create_model`` takes; "local-dir:FOLDER" needs no network.
        pretrained (bool): Whether to load its weights.
        state (Mapping or None): Weights that will be loaded, whose head gives the number of classes.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ValueError(f"timm:{name} needs the package {error.name}: {install_hint('timm')}") from error
    elsewhere = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not elsewhere and not timm.is_model(name):
        raise ValueError(f"timm {timm.__version__} has no model {name!r}.{close_names(name, timm.list_models())}")
    try:
        classes = {} if state is None else _classes(timm, name, state)
        model = timm.create_model(name, pretrained=pretrained, **classes)
    except Exception as error:  # Of its own, of the hub's and of the network's.
        advice = " Pass --weights FILE, or --weights none for random weights." if pretrained else ""
        raise ValueError(
            f"timm cannot build {name}{' with its weights' if pretrained else ''}: {error}.{advice}"
        ) from error
    return LoadedModel(model, preprocessing_of(f"timm:{name}", model.pretrained_cfg), _categories(timm, model))


def _classes(timm: Any, name: str, state: State) -> dict[str, int]:
    """The number of classes of the weights, as an argument of the model's builder, where they have the model's head."""
    with torch.device("meta"):
        head = timm.create_model(name, pretrained=False).pretrained_cfg.get("classifier")
    weight = f"{head if isinstance(head, str) else (head or ['head'])[0]}.weight"
    classes = count_classes(state, weight, 0)
    return {"num_classes": classes} if classes else {}


def preprocessing_of(name: str, config: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing in the ``pretrained_cfg`` of a model of timm, with timm's defaults for what it leaves out."""
    from timm.data import resolve_data_config

    config = resolve_data_config(config)
    channels, *size = config["input_size"]
    if channels != 3 or size[0] != size[1] or config["crop_mode"] not in ("center", "squash"):
        raise ValueError(
            f"{name} takes inputs of {channels}x{size[0]}x{size[1]}, cropped by {config['crop_mode']!r}; expected "
            "a square of three channels from the middle of the image"
        )
    return Preprocessing(
        resize=floor(size[0] / config["crop_pct"]),
        size=size[0],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=InterpolationMode(config["interpolation"]),
        squash=config["crop_mode"] == "squash",
    )


def _categories(timm: Any, model: Any) -> tuple[str, ...] | None:
    names = model.pretrained_cfg.get("label_names")
    if names and len(names) == model.num_classes:
        descriptions = model.pretrained_cfg.get("label_descriptions") or {}
        return tuple(descriptions.get(name, name) for name in names)
    subset = timm.data.infer_imagenet_subset(model.pretrained_cfg)
    if subset is None or model.pretrained_cfg.get("num_classes") != model.num_classes:
        return imagenet_categories() if model.num_classes == 1000 else None
    if subset == "imagenet-1k":
        return imagenet_categories()
    info = timm.data.ImageNetInfo(subset)
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))
