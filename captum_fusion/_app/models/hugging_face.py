"""Image classifiers of Hugging Face, by name or from a folder."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.transforms import InterpolationMode

from captum_fusion._app.messages import install_hint
from captum_fusion._app.models.classifier import LoadedModel
from captum_fusion._app.models.preprocessing import Preprocessing
from captum_fusion.arguments import Activation

# The numbers that Pillow gives them, which processors hold.
_INTERPOLATIONS = {
    0: InterpolationMode.NEAREST_EXACT,
    1: InterpolationMode.LANCZOS,
    2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
    4: InterpolationMode.BOX,
    5: InterpolationMode.HAMMING,
}


def from_hugging_face(name: str, pretrained: bool) -> LoadedModel:
    """An image classifier with its image processor's preprocessing and the names of its categories.

    Args:
        name (str): A name on the Hugging Face hub, or a folder, which needs no network.
        pretrained (bool): Whether to load its weights.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ValueError(f"hf:{name} needs the package {error.name}: {install_hint('hugging-face')}") from error
    folder = Path(name).is_dir()
    if not folder and name.startswith(("/", ".", "~")):
        raise ValueError(f"hf:{name} names a folder that does not exist")
    auto: Any = transformers.AutoModelForImageClassification
    missing: list[str] = []
    try:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=folder)
        processor: Any = transformers.AutoImageProcessor.from_pretrained(name, local_files_only=folder)
        if pretrained:
            model, info = auto.from_pretrained(name, local_files_only=folder, output_loading_info=True)
            missing = sorted(info["missing_keys"])
        else:
            model = auto.from_config(config)
    except Exception as error:  # Of its own, of the hub's and of the network's.
        raise ValueError(f"Hugging Face cannot load {name}: {' '.join(str(error).split())}") from error
    if missing:
        raise ValueError(
            f"{name} has no weights for {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} of "
            f"{type(model).__name__}; expected an image classifier"
        )
    if config.problem_type == "regression":
        raise ValueError(f"{name} is a regression model; expected an image classifier")
    names = tuple(config.id2label[index] for index in range(config.num_labels))
    unnamed = all(label == f"LABEL_{index}" for index, label in enumerate(names))
    # As in the model's own pipeline.
    several = config.problem_type == "multi_label_classification" or config.num_labels == 1
    activation: Activation = "sigmoid" if several else "softmax"
    return LoadedModel(model.float(), _preprocessing(name, processor), None if unnamed else names, activation)


def _preprocessing(name: str, processor: Any) -> Preprocessing:
    """Reads the preprocessing off one processed image."""
    preprocessing = _read(processor)
    if preprocessing is None or not _same(preprocessing, processor):
        raise ValueError(
            f"The {type(processor).__name__} of {name} does more than resize, crop the centre and normalize; other "
            "steps are not supported. Pass the model as package.module:callable, with --size, --mean and --std."
        )
    return preprocessing


def _read(processor: Any) -> Preprocessing | None:
    """The processor's settings, where they say enough."""
    settings: dict[str, Any] = {name: value for name, value in processor.to_dict().items() if value is not None}
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    shortest = size.get("shortest_edge")
    resize = shortest or size.get("height")
    if not resize or size.get("width", resize) != resize or crop.get("width") != crop.get("height"):
        return None
    side = crop.get("height", resize) if settings.get("do_center_crop") else resize
    squash = shortest is None
    if "crop_pct" in settings and shortest:
        # ConvNeXt's: small inputs are cropped out of larger ones, large ones are the whole image.
        squash = shortest >= 384
        resize = shortest if squash else int(shortest / settings["crop_pct"])
    elif type(processor).__name__.startswith("Levit") and shortest:
        resize = int(256 / 224 * shortest)
    # Normalization of values from 0 to 255, as one of values from 0 to 1.
    factor = 255 * (settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1)
    offset = 1 if settings.get("rescale_offset") else 0
    mean, std = (settings["image_mean"], settings["image_std"]) if settings.get("do_normalize") else ([0] * 3, [1] * 3)
    if settings.get("include_top"):
        std = [value**2 for value in std]  # EfficientNet's divides by it twice.
    return Preprocessing(
        resize=resize,
        size=side,
        mean=tuple((value + offset) / factor for value in mean),
        std=tuple(value / factor for value in std),
        interpolation=_INTERPOLATIONS[int(settings.get("resample", 2))],
        squash=squash,
    )


def _same(preprocessing: Preprocessing, processor: Any) -> bool:
    """Tells whether both make the same input of an image, but for how they interpolate."""
    from PIL import Image

    rows, columns = np.mgrid[0:1:480j, 0:1:640j]
    image = Image.fromarray((255 * np.stack([rows, columns, rows * columns], axis=-1)).astype(np.uint8))
    expected = torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"]))
    values = preprocessing.normalize(preprocessing.crop(image))
    scale = torch.tensor(preprocessing.std).view(-1, 1, 1)
    return values.shape == expected.shape and bool(((values - expected).abs() * scale).max() < 0.02)
