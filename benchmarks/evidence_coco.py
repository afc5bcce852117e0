"""Writes the annotations of COCO128, a text file for each picture, as one file of COCO's form.

The folder holds images/*.jpg; boxes/*.txt with a line for each object, its category and its box's centre and size as
shares of the picture; segments/*.txt with a line for each outline, its category and its corners; and box_names.yaml and
segment_names.yaml, which number the categories differently. An outline belongs to the object of its category whose box
it fits best; objects without one keep their box alone.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# How well an outline's own box must fit an object's box, as their intersection over union.
_FITS = 0.5


def convert(folder: Path, output: Path) -> Path:
    """Writes the annotation file, and a link to the pictures where COCO has them.

    Args:
        folder (Path): The folder of COCO128.
        output (Path): The folder to write to.

    Returns:
        *Path* of the annotation file.
    """
    names, outline_names = (_names(folder / f"{kind}_names.yaml") for kind in ("box", "segment"))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for picture in sorted((folder / "images").glob("*.jpg")):
        with Image.open(picture) as image:
            width, height = image.size
        scale = np.array([width, height])
        images.append({"id": len(images), "file_name": picture.name, "width": width, "height": height})
        things = []
        for category, centre_size in _lines(folder / "boxes" / f"{picture.stem}.txt"):
            middle, sides = (centre_size.reshape(2, 2) * scale)[:2]
            box = np.concatenate([middle - sides / 2, middle + sides / 2])
            things.append({"name": names[category], "box": box, "polygons": []})
        for category, corners in _lines(folder / "segments" / f"{picture.stem}.txt"):
            points = corners.reshape(-1, 2) * scale
            own = np.concatenate([points.min(axis=0), points.max(axis=0)])
            fits = [
                (_overlap(own, thing["box"]), thing) for thing in things if thing["name"] == outline_names[category]
            ]
            overlap, thing = max(fits, key=lambda fit: fit[0], default=(0.0, None))
            if thing is not None and overlap >= _FITS:
                thing["polygons"].append([round(float(value), 2) for value in points.flatten()])
        for thing in things:
            x1, y1, x2, y2 = (round(float(value), 2) for value in thing["box"])
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": images[-1]["id"],
                    "category_id": next(index for index, name in names.items() if name == thing["name"]),
                    "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                    "segmentation": thing["polygons"],
                }
            )
    categories = [{"id": index, "name": name} for index, name in names.items()]
    file = output / "annotations" / "instances_coco128.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not (output / "coco128").exists():
        (output / "coco128").symlink_to((folder / "images").resolve())
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def _names(file: Path) -> dict[int, str]:
    return {int(index): name.strip() for index, name in re.findall(r"^\s+(\d+):(.+)$", file.read_text(), re.MULTILINE)}


def _lines(file: Path) -> list[tuple[int, np.ndarray]]:
    """The category and the numbers of each line; none where there is no such file."""
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return [(int(category), np.array(numbers, dtype=float)) for category, *numbers in lines]


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    """The intersection over union of two boxes."""
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    areas = [float(np.prod(box[2:] - box[:2])) for box in (first, second)]
    return shared / (sum(areas) - shared)
