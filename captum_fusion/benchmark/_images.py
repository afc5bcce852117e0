"""The pictures of a benchmark: folders and torchvision's datasets."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from torchvision.datasets import ImageNet, VOCDetection
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes
from torchvision.models.segmentation import FCN_ResNet50_Weights

from captum_fusion._names import close_names

Box = tuple[float, float, float, float]
# torchvision's VOC categories, without the background.
_VOC_CATEGORIES = tuple(FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:])


@dataclass(frozen=True)
class Picture:
    """A picture file with what is known about it.

    ``boxes`` holds the boxes (x1, y1, x2, y2) of each class in the picture's pixels, None where the source has none.
    """

    name: str
    file: Path
    labels: tuple[int, ...] = ()
    boxes: dict[int, list[Box]] | None = None


@dataclass(frozen=True)
class Source:
    """The pictures and what their labels are called, None where labels are the model's own class indices."""

    pictures: list[Picture]
    categories: tuple[str, ...] | None = None


def find_pictures(images: str, labels: Path | None = None) -> Source:
    """Finds the pictures of a folder or of a torchvision dataset.

    Args:
        images (str): A folder of pictures; a folder with a folder of pictures for each class; or "imagenet:ROOT",
            "voc2007:ROOT" or "voc2012:ROOT" for the validation images of a torchvision dataset that is on disk.
        labels (Path or None): A JSON file with the class index of each picture of a plain folder, by its name.
            Default: None

    Returns:
        *Source*: pictures in the order of their names.

    Raises:
        ValueError: If there is no picture, or if the labels do not fit.
    """
    kind, _, root = images.partition(":")
    if root and kind in ("imagenet", "voc2007", "voc2012"):
        source = _imagenet(Path(root)) if kind == "imagenet" else _voc(Path(root), kind.removeprefix("voc"))
        if labels is not None:
            raise ValueError(f"labels are given for {images}, which has its own; expected a plain folder")
    else:
        source = _folder(Path(images), labels)
    if not source.pictures:
        raise ValueError(f"{images} holds no picture; expected files ending in {', '.join(IMG_EXTENSIONS)}")
    return source


def _folder(root: Path, labels: Path | None) -> Source:
    if not root.is_dir():
        raise ValueError(
            f"{root} is not a folder; expected one of pictures, or imagenet:ROOT, voc2007:ROOT or voc2012:ROOT"
        )
    files = [file for file in sorted(root.rglob("*")) if file.suffix.lower() in IMG_EXTENSIONS]
    names = [file.relative_to(root).as_posix() for file in files]
    if labels is not None:
        known = json.loads(labels.read_text())
        if not isinstance(known, dict) or not all(isinstance(index, int) for index in known.values()):
            raise ValueError(f"{labels} does not hold class indices by picture name; expected a JSON object of these")
        for name in names:
            if name not in known:
                raise ValueError(f"{labels} has no label for {name}.{close_names(name, known)}")
        return Source([Picture(name, file, (known[name],)) for name, file in zip(names, files, strict=True)])
    if not files or any("/" not in name for name in names):
        return Source([Picture(name, file) for name, file in zip(names, files, strict=True)])
    categories, indices = find_classes(root)
    return Source(
        [Picture(name, file, (indices[name.split("/")[0]],)) for name, file in zip(names, files, strict=True)],
        tuple(categories),
    )


def _imagenet(root: Path) -> Source:
    dataset = ImageNet(root, split="val")
    return Source(
        [
            Picture(Path(file).relative_to(dataset.split_folder).as_posix(), Path(file), (label,))
            for file, label in dataset.samples
        ]
    )


def _voc(root: Path, year: str) -> Source:
    dataset = VOCDetection(root, year=year, image_set="val")
    pictures = []
    for index, file in enumerate(dataset.images):
        annotation = dataset.parse_voc_xml(ElementTree.parse(dataset.annotations[index]).getroot())["annotation"]
        boxes: dict[int, list[Box]] = {}
        for thing in annotation["object"]:
            corners = {side: float(value) for side, value in thing["bndbox"].items()}
            # VOC counts pixels from 1 and includes the last one.
            box = (corners["xmin"] - 1, corners["ymin"] - 1, corners["xmax"], corners["ymax"])
            boxes.setdefault(_VOC_CATEGORIES.index(thing["name"]), []).append(box)
        pictures.append(Picture(Path(file).name, Path(file), tuple(sorted(boxes)), boxes))
    return Source(pictures, _VOC_CATEGORIES)


def labels_of_model(source: Source, categories: Sequence[str] | None, classes: int) -> list[tuple[int, ...]]:
    """The model's class indices of each picture's labels.

    Raises:
        ValueError: If a picture has no label, or if the labels are not the model's classes.
    """
    for picture in source.pictures:
        if not picture.labels:
            raise ValueError(
                f"{picture.name} has no label; expected a folder for each class, a labels file, or a dataset with "
                "labels"
            )
    indices = {label: label for picture in source.pictures for label in picture.labels}
    if source.categories is None:
        for label in indices:
            if not 0 <= label < classes:
                raise ValueError(
                    f"A label is {label}; expected an index below {classes}, the model's number of classes"
                )
    elif len(source.categories) != classes:
        known = [name.lower() for name in categories or ()]
        missing = [name for name in source.categories if name.lower() not in known]
        if missing:
            raise ValueError(
                f"The pictures have {len(source.categories)} classes, the model has {classes}, and none of its "
                f"categories is {missing[0]!r}.{close_names(missing[0].lower(), known)}"
            )
        indices = {label: known.index(name.lower()) for label, name in enumerate(source.categories)}
    return [tuple(indices[label] for label in picture.labels) for picture in source.pictures]
