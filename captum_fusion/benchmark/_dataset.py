"""The images of a benchmark with their labels and objects, and where a model sees these."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import eq
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.path import Path as Polygon
from PIL import ExifTags, Image
from torch import Tensor

from captum_fusion._app.images import exif_orientation
from captum_fusion._app.models.preprocessing import Frame

Box = tuple[float, float, float, float]
Size = tuple[int, int]
"""The width and height of an image."""

# How EXIF orientations turn x and y: the rows of a matrix.
_TURNS = {
    2: ((-1, 0), (0, 1)),
    3: ((-1, 0), (0, -1)),
    4: ((1, 0), (0, -1)),
    5: ((0, 1), (1, 0)),
    6: ((0, -1), (1, 0)),
    7: ((0, -1), (-1, 0)),
    8: ((0, 1), (-1, 0)),
}
# How many pixels a box may reach beyond its image, as rounded ones do.
ROUNDED = 2


@dataclass(frozen=True)
class Outline:
    """The pixels of an object: inside polygons, each x y x y ..., or by run lengths, column by column, off first."""

    polygons: Sequence[Sequence[float]] = ()
    runs: Sequence[int] = ()
    size: tuple[int, int] = (0, 0)
    """The height and width of the image whose pixels the runs count."""

    def contains(self, points: np.ndarray) -> np.ndarray:
        """Tells whether each of some points (K, 2) lies inside."""
        if self.polygons:
            # A centre on an edge belongs to one side, as for pycocotools.
            inside = [Polygon(np.reshape(p, (-1, 2))).contains_points(points + 1e-6) for p in self.polygons]
            return np.any(inside, axis=0)  # type: ignore[no-any-return]
        height, width = self.size
        pixels = np.repeat(np.arange(len(self.runs)) % 2, self.runs).reshape(width, height)
        x, y = np.floor(points).astype(int).T
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        return inside & (pixels[x.clip(0, width - 1), y.clip(0, height - 1)] == 1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Instance:
    """An object in an image: its label, its box and its outline in the annotation's pixels."""

    label: int
    box: Box
    outline: Outline | None = None
    crowd: bool = False
    """Whether it is a group of objects rather than one."""


@dataclass(frozen=True)
class LabelledImage:
    """An image file with its labels and objects; ``instances`` is None where the source has no objects."""

    name: str
    file: Path
    labels: tuple[int, ...] = ()
    instances: tuple[Instance, ...] | None = None
    size: Size | None = None
    """The size that the annotation gives."""


@dataclass(frozen=True)
class Source:
    """Images and the names of their labels, None where labels are the model's own class indices."""

    images: list[LabelledImage]
    categories: tuple[str, ...] | None = None
    of_objects: bool = False
    """Whether the categories are those of COCO or VOC, which ImageNet's classes name more closely."""
    classes: int | None = None
    """The number of classes that labels without names count, where the source knows it."""
    notes: list[str] = field(default_factory=list)
    """The files that were left out."""


@dataclass(frozen=True)
class Placement:
    """The affine map from an annotation's pixels to a model's, by turning, scaling and cropping."""

    matrix: np.ndarray
    offset: np.ndarray
    size: int
    note: str

    def regions(self, instances: Sequence[Instance]) -> "Regions":
        """Maps objects to the pixels that the model sees."""
        centres = (np.mgrid[: self.size, : self.size][::-1] + 0.5).reshape(2, -1).T
        points = (centres - self.offset) @ np.linalg.inv(self.matrix).T
        boxes, singles, mask = [torch.zeros(0, 4)], [], torch.zeros(self.size, self.size, dtype=torch.bool)
        for instance in instances:
            corners = np.reshape(instance.box, (2, 2)) @ self.matrix.T + self.offset
            corners = np.sort(corners, axis=0).clip(0, self.size)
            region = box = torch.from_numpy(corners).float().reshape(1, 4)
            visible = bool((corners[0] < corners[1]).all())
            if visible:
                boxes.append(box)
            if instance.outline is not None:
                region = torch.from_numpy(instance.outline.contains(points)).reshape(1, self.size, self.size)
                mask |= region[0]
                visible = bool(region.any())
            if visible and not instance.crowd:
                singles.append(region[0])
        complete = all(instance.outline is not None for instance in instances)
        return Regions(torch.cat(boxes), mask if complete else torch.zeros_like(mask), singles)


class Regions(NamedTuple):
    """The regions of one class's objects in the model's input."""

    boxes: Tensor
    """(K, 4)"""
    mask: Tensor
    """(size, size); empty where an outline is missing."""
    instances: list[Tensor]
    """Each object that is no crowd, by its outline, or by its box where it has none."""


def place(image: LabelledImage, frame: Frame, size: int) -> Placement:
    """Places the objects of an image in the pixels that a model sees.

    Annotations whose size is that of the stored image are turned as its EXIF orientation turns the image; those
    of the upright image are not. Those of a larger or smaller copy are scaled.

    Raises:
        ValueError: If the annotation is of an image of another shape, or reaches beyond the image.
    """
    with Image.open(image.file) as opened:
        # Some releases of Pillow swap the sides of a turned TIFF before they load it; its tags hold the stored ones.
        tags, orientation = getattr(opened, "tag_v2", None), exif_orientation(opened) or 1
        stored = (tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]) if tags else opened.size
    upright = stored[::-1] if orientation >= 5 else stored
    annotated = image.size or stored
    for is_close in (eq, _same_shape):
        turn = orientation if is_close(annotated, stored) else 1 if is_close(annotated, upright) else None
        if turn is not None:
            break
    else:
        raise ValueError(
            f"its annotation is for an image of {annotated[0]} x {annotated[1]} pixels, but the image has {stored[0]} "
            f"x {stored[1]}; expected the same size or a scaled copy"
        )
    for instance in image.instances or ():
        reach = instance.box[2:]
        if any(end > side + ROUNDED for end, side in zip(reach, annotated, strict=True)):
            raise ValueError(
                f"its annotation has a box that reaches to {reach[0]:g}, {reach[1]:g} in {annotated[0]} x "
                f"{annotated[1]} pixels; expected boxes inside the image"
            )
        if instance.outline and instance.outline.runs and instance.outline.size != annotated[::-1]:
            raise ValueError(
                f"its annotation has run lengths of {instance.outline.size[::-1]} pixels; expected {annotated}, the "
                "size of the image"
            )
    matrix = np.array(_TURNS.get(turn, ((1, 0), (0, 1))), dtype=float)
    notes = ["boxes and outlines are turned by the EXIF orientation"] if turn != 1 else []
    notes += ["boxes and outlines are scaled to the image"] if sorted(annotated) != sorted(stored) else []
    start, scale = np.array(frame[:2]), size / (np.array(frame[2:]) - frame[:2])
    offset = ((matrix.sum(axis=1) < 0) * upright - start) * scale
    matrix = (scale * upright)[:, None] * matrix / annotated
    return Placement(matrix, offset, size, "; ".join(notes))


def _same_shape(first: Size, second: Size) -> bool:
    # Sides of a scaled copy are rounded.
    return abs(first[0] * second[1] - first[1] * second[0]) <= max(sum(first), sum(second))
