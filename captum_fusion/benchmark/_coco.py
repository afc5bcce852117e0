"""Pictures with the boxes and outlines of their objects, in COCO's form."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from captum_fusion.benchmark._dataset import Instance, Outline, Picture, Source


def coco(file: Path) -> Source:
    """The pictures of an annotation file of COCO's form, instances_val2017.json for example.

    They lie beside it, or, as COCO has them, in the folder val2017 beside the file's own folder.

    Raises:
        ValueError: If the file is not of that form, or if a picture is missing.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    categories = sorted(content["categories"], key=lambda category: int(category["id"]))
    labels = {category["id"]: label for label, category in enumerate(categories)}
    instances: dict[Any, list[Instance]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        instances[annotation["image_id"]].append(_instance(annotation, labels))
    folders = (file.parent, file.parent.parent / file.stem.removeprefix("instances_"))
    pictures = []
    for image in sorted(content["images"], key=lambda image: str(image["file_name"])):
        found = [folder / image["file_name"] for folder in folders if (folder / image["file_name"]).is_file()]
        if not found:
            raise ValueError(f"{image['file_name']} is neither in {folders[0]} nor in {folders[1]}")
        things = tuple(instances[image["id"]])
        present = tuple(sorted({thing.label for thing in things}))
        pictures.append(Picture(image["file_name"], found[0], present, things))
    return Source(pictures, tuple(category["name"] for category in categories), of_objects=True)


def _instance(annotation: Mapping[str, Any], labels: Mapping[Any, int]) -> Instance:
    x, y, width, height = annotation["bbox"]
    segmentation = annotation.get("segmentation")
    outline = None
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], str):
            raise ValueError(
                f"The annotation {annotation['id']} has compressed run lengths; expected polygons or a list of "
                "numbers, as in COCO's own files"
            )
        outline = Outline(runs=segmentation["counts"], size=tuple(segmentation["size"]))
    elif segmentation:
        outline = Outline(polygons=segmentation)
    box = (x, y, x + width, y + height)
    return Instance(labels[annotation["category_id"]], box, outline, bool(annotation.get("iscrowd", 0)))
