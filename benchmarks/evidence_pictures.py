"""Converts three collections of pictures with objects to files of COCO's form, which the benchmark reads as coco:FILE.

- coco128: images/*.jpg; boxes/*.txt with a line for each object, its category and its box's centre and size as shares
  of the picture; segments/*.txt with a line for each outline, its category and its corners; box_names.yaml and
  segment_names.yaml, which number the categories differently. An outline belongs to the object of its category whose
  box it fits best.
- voc2012: images/*.jpg and annotations/*.xml in VOC's form
- ilsvrc: images/* and annotations.json, for each file its ImageNet index "label" and its "boxes", (x1, y1, x2, y2)
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_iou

# The least intersection over union of an outline's box and its object's.
_FITS = 0.5


class Thing(NamedTuple):
    """An object: its category, its box (x1, y1, x2, y2), and its outlines as x y x y ..., in pixels."""

    category: str
    box: list[float]
    polygons: list[list[float]]


def convert(collection: str, folder: Path, output: Path) -> Path:
    """Writes the annotations of a collection, and a link to its pictures where COCO has them; returns the file."""
    things = dict(sorted(COLLECTIONS[collection](folder)))
    categories = sorted({each.category for objects in things.values() for each in objects})
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, objects) in enumerate(things.items()):
        images.append({"id": number, "file_name": name})
        for category, (x1, y1, x2, y2), polygons in objects:
            box = [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]
            annotation = {"id": len(annotations), "image_id": number, "category_id": categories.index(category)}
            annotations.append(annotation | {"bbox": box, "segmentation": polygons})
    named = [{"id": index, "name": name} for index, name in enumerate(categories)]
    file = output / "annotations" / f"instances_{collection}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not (output / collection).exists():
        (output / collection).symlink_to((folder / "images").resolve())
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": named}))
    return file


def _coco128(folder: Path) -> Iterator[tuple[str, list[Thing]]]:
    names, outline_names = (
        dict(re.findall(r"^\s+(\d+): *(.+?) *$", (folder / f"{kind}_names.yaml").read_text(), re.MULTILINE))
        for kind in ("box", "segment")
    )
    for picture in (folder / "images").glob("*.jpg"):
        with Image.open(picture) as image:
            scale = np.array(image.size)
        things = []
        for category, values in _lines(folder / "boxes" / f"{picture.stem}.txt"):
            middle, sides = values.reshape(2, 2) * scale
            things.append(Thing(names[category], [*(middle - sides / 2), *(middle + sides / 2)], []))
        for category, values in _lines(folder / "segments" / f"{picture.stem}.txt"):
            points = values.reshape(-1, 2) * scale
            own = [*points.min(axis=0), *points.max(axis=0)]
            fits = [(_overlap(own, each.box), each) for each in things if each.category == outline_names[category]]
            overlap, thing = max(fits, key=lambda fit: fit[0], default=(0.0, None))
            if thing is not None and overlap >= _FITS:
                thing.polygons.append(points.round(2).flatten().tolist())
        yield picture.name, things


def _voc2012(folder: Path) -> Iterator[tuple[str, list[Thing]]]:
    for file in (folder / "annotations").glob("*.xml"):
        root = ElementTree.parse(file).getroot()
        things = []
        for item in root.iter("object"):
            x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax"))
            # VOC counts pixels from 1 and includes the last one.
            things.append(Thing(item.findtext("name", ""), [x1 - 1, y1 - 1, x2, y2], []))
        yield root.findtext("filename", ""), things


def _ilsvrc(folder: Path) -> Iterator[tuple[str, list[Thing]]]:
    # The benchmark takes an index for the category's name.
    for name, known in json.loads((folder / "annotations.json").read_text(encoding="utf-8")).items():
        yield name, [Thing(str(known["label"]), box, []) for box in known["boxes"]]


COLLECTIONS: dict[str, Callable[[Path], Iterator[tuple[str, list[Thing]]]]] = {
    "ilsvrc": _ilsvrc,
    "voc2012": _voc2012,
    "coco128": _coco128,
}


def _lines(file: Path) -> list[tuple[str, Any]]:
    """Reads the category and the numbers of each line; none where the file is missing."""
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return [(category, np.array(numbers, dtype=float)) for category, *numbers in lines]


def _overlap(first: list[float], second: list[float]) -> float:
    return float(box_iou(torch.tensor([first]), torch.tensor([second])))
