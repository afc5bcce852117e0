"""A benchmark's pictures and what is known about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2.functional import clamp_bounding_boxes, pil_to_tensor
from torchvision.tv_tensors import BoundingBoxes

from captum_fusion._app.models.preprocessing import Frame

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Outline:
    """The pixels of an object: inside polygons, each x y x y ..., or where runs tell, column by column, off first."""

    polygons: Sequence[Sequence[float]] = ()
    runs: Sequence[int] = ()
    size: tuple[int, int] = (0, 0)
    """The height and width of the picture whose pixels the runs count."""


@dataclass(frozen=True)
class Instance:
    """An object in a picture: its label, and where it is, in the picture's pixels."""

    label: int
    box: Box
    outline: Outline | None = None
    crowd: bool = False
    """Whether it is a group of objects rather than one."""

    def box_seen(self, frame: Frame, size: int) -> Tensor:
        """The box in the pixels that a model sees, (1, 4), or (0, 4) where it sees nothing of it."""
        x1, y1, x2, y2 = self.box
        across, down = size / (frame.x2 - frame.x1), size / (frame.y2 - frame.y1)
        moved = [(x1 - frame.x1) * across, (y1 - frame.y1) * down, (x2 - frame.x1) * across, (y2 - frame.y1) * down]
        boxes = BoundingBoxes([moved], format="XYXY", canvas_size=(size, size), dtype=torch.float32)
        seen: Tensor = clamp_bounding_boxes(boxes).as_subclass(Tensor)
        return seen[(seen[:, 0] < seen[:, 2]) & (seen[:, 1] < seen[:, 3])]

    def mask_seen(self, frame: Frame, size: int) -> Tensor:
        """The mask in the pixels that a model sees, (1, size, size), or (0, size, size) where it sees nothing of it."""
        canvas = Image.new("1", (size, size))
        if self.outline is not None and self.outline.polygons:
            across, down = size / (frame.x2 - frame.x1), size / (frame.y2 - frame.y1)
            for polygon in self.outline.polygons:
                corners = zip(polygon[::2], polygon[1::2], strict=True)
                # Pillow counts pixels from their centres.
                moved = [((x - frame.x1) * across - 0.5, (y - frame.y1) * down - 0.5) for x, y in corners]
                ImageDraw.Draw(canvas).polygon(moved, fill=1)
        elif self.outline is not None:
            height, width = self.outline.size
            on = torch.arange(len(self.outline.runs), dtype=torch.uint8) % 2
            pixels = on.repeat_interleave(torch.tensor(self.outline.runs)).reshape(width, height).T
            canvas = Image.fromarray(pixels.contiguous().numpy()).transform(
                (size, size), Image.Transform.EXTENT, tuple(frame)
            )
        mask: Tensor = pil_to_tensor(canvas).bool()
        return mask[mask.flatten(1).any(dim=1)]


class Regions(NamedTuple):
    """Where a model sees the objects of one class."""

    boxes: Tensor
    """(K, 4)"""
    mask: Tensor
    """(size, size); empty where an outline is missing."""
    singles: list[Tensor]
    """Each object that is no crowd, by its outline, or by its box where it has none."""


def regions_seen(instances: Sequence[Instance], frame: Frame, size: int) -> Regions:
    """Where a model sees some objects."""
    boxes = [instance.box_seen(frame, size) for instance in instances]
    masks = [instance.mask_seen(frame, size) for instance in instances]
    outlined = all(instance.outline for instance in instances)
    mask = torch.cat([torch.zeros(1, size, size, dtype=torch.bool), *masks]).any(dim=0)
    singles = [
        region
        for instance, box, outline in zip(instances, boxes, masks, strict=True)
        for region in (outline if instance.outline else box)
        if not instance.crowd
    ]
    return Regions(torch.cat([torch.zeros(0, 4), *boxes]), mask if outlined else torch.zeros_like(mask), singles)


@dataclass(frozen=True)
class Picture:
    """A picture file with what is known about it; ``instances`` is None where the source tells of no objects."""

    name: str
    file: Path
    labels: tuple[int, ...] = ()
    instances: tuple[Instance, ...] | None = None


@dataclass(frozen=True)
class Source:
    """The pictures and what their labels are called, None where labels are the model's own class indices."""

    pictures: list[Picture]
    categories: tuple[str, ...] | None = None
    of_objects: bool = False
    """Whether the categories are those of COCO or VOC, which ImageNet's classes name more closely."""
