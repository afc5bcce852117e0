"""Preprocessing: an image becomes the input of a model."""

from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from captum_fusion._app.images import as_rgb

# A model sees the middle of an image; of an image this much longer than wide it would see next to nothing.
_LONGEST = 100


class Frame(NamedTuple):
    """A part of an image, in the image's pixels."""

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
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean is {self.mean} and std is {self.std}; expected one value of each for each channel")
        if not all(map(isfinite, self.mean)):
            raise ValueError(f"mean is {self.mean}; expected numbers")
        if not all(isfinite(value) and value > 0 for value in self.std):
            raise ValueError(f"std is {self.std}; expected numbers above 0")

    def crop(self, image: Any) -> Tensor:
        """The part of a PIL image that the model sees, (1, 3, size, size) in [0, 1]; grey for a model of one channel.

        Raises:
            ValueError: If the image is so long that the model would see almost nothing of it.
        """
        width, height = image.size
        if max(width, height) > _LONGEST * min(width, height):
            raise ValueError(
                f"it has {width} x {height} pixels, and the model would see less than one in {_LONGEST} of them; crop "
                "it to the part to explain"
            )
        sides = [self.resize] * (2 if self.squash else 1)
        upright = as_rgb(image).image.convert("L" if len(self.mean) == 1 else "RGB")
        resized = transforms.resize(upright, sides, interpolation=self.interpolation)
        pixels = transforms.pil_to_tensor(transforms.center_crop(resized, [self.size]))
        return torch.unsqueeze(pixels, 0) / 255

    def frame(self, width: int, height: int) -> Frame:
        """The part of an image of this size from which ``crop`` takes its pixels."""
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

    def blank(self, device: torch.device) -> Tensor:
        """Two inputs of medium grey, to try a model out."""
        return self.normalize(torch.full((2, len(self.mean), self.size, self.size), 0.5, device=device))


IMAGENET = Preprocessing(256, 224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
# The means of ImageNet's.
GREY = Preprocessing(256, 224, mean=(0.449,), std=(0.226,))
