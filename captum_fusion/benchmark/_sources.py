"""Where a benchmark's pictures come from: folders, torchvision's datasets, and files of COCO's form."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from torchvision.datasets import ImageNet, VOCDetection
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models.segmentation import FCN_ResNet50_Weights

from captum_fusion._app.models.loading import Classifier, imagenet_categories
from captum_fusion._app.names import close_names, reason
from captum_fusion.benchmark._coco import coco
from captum_fusion.benchmark._dataset import Box, Instance, Picture, Source
from captum_fusion.benchmark._objects import imagenet_classes
from captum_fusion.benchmark._records import SHARDS

# torchvision's VOC categories, without the background.
_VOC_CATEGORIES = tuple(FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:])


def find_pictures(images: str, labels: Path | None = None, output: Path | None = None) -> Source:
    """Finds the pictures of a folder or of a torchvision dataset.

    Args:
        images (str): A folder of pictures; a folder with a folder of pictures for each class; "imagenet:ROOT",
            "voc2007:ROOT" or "voc2012:ROOT" for the validation images of a torchvision dataset that is on disk; or
            "coco:FILE" for an annotation file of COCO's form.
        labels (Path or None): A JSON file with the class index of each picture of a plain folder, by its name.
            Default: None
        output (Path or None): The folder of the results, whose charts are no pictures to explain; nor are those of
            other results in the folder. Default: None

    Returns:
        *Source*: pictures in the order of their names.

    Raises:
        ValueError: If there is no picture, or if the labels do not fit.
    """
    kind, _, root = images.partition(":")
    if root and kind in _DATASETS:
        if labels is not None:
            raise ValueError(f"labels are given for {images}, which has its own; expected a plain folder")
        try:
            source = _DATASETS[kind](Path(root))
        except Exception as error:
            raise ValueError(f"images is {images}, which cannot be read: {reason(error)}") from error
    else:
        source = _folder(Path(images), labels, output)
    if not source.pictures:
        raise ValueError(f"{images} holds no picture; expected files ending in {', '.join(IMG_EXTENSIONS)}")
    return source


def _folder(root: Path, labels: Path | None, output: Path | None) -> Source:
    if not root.is_dir():
        raise ValueError(
            f"{root} is not a folder; expected one of pictures, or imagenet:ROOT, voc2007:ROOT, voc2012:ROOT or "
            "coco:FILE"
        )
    if output is not None and output.resolve() == root.resolve():
        raise ValueError(f"output is {output}, the folder of the pictures itself; expected another folder")
    results = {writer.parent for writer in root.rglob(SHARDS)} | ({output.resolve()} if output else set())
    files = [
        file
        for file in sorted(root.rglob("*"))
        if file.suffix.lower() in IMG_EXTENSIONS
        and file.is_file()
        and not any(parent in results or parent.resolve() in results for parent in file.parents)
    ]
    names = [file.relative_to(root).as_posix() for file in files]
    pairs = list(zip(names, files, strict=True))
    if labels is not None:
        known = _labels(labels)
        for name in names:
            if name not in known:
                raise ValueError(f"{labels} has no label for {name}.{close_names(name, known)}")
        return Source([Picture(name, file, (known[name],)) for name, file in pairs])
    if not files or any("/" not in name for name in names):
        return Source([Picture(name, file) for name, file in pairs])
    categories = sorted({name.split("/")[0] for name in names})
    indices = {category: index for index, category in enumerate(categories)}
    return Source([Picture(name, file, (indices[name.split("/")[0]],)) for name, file in pairs], tuple(categories))


def _labels(file: Path) -> dict[str, int]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    # A truth value is an int to Python.
    if not isinstance(known, dict) or not all(type(index) is int for index in known.values()):
        raise ValueError(f"{file} does not hold class indices by picture name; expected a JSON object of these")
    return known


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
        try:
            annotation = dataset.parse_voc_xml(ElementTree.parse(dataset.annotations[index]).getroot())["annotation"]
            instances = []
            for thing in annotation["object"]:
                corners = {side: float(value) for side, value in thing["bndbox"].items()}
                # VOC counts pixels from 1 and includes the last one.
                box: Box = (corners["xmin"] - 1, corners["ymin"] - 1, corners["xmax"], corners["ymax"])
                instances.append(Instance(_VOC_CATEGORIES.index(thing["name"]), box))
        except Exception as error:
            raise ValueError(f"{dataset.annotations[index]}: {reason(error)}") from error
        labels = tuple(sorted({instance.label for instance in instances}))
        pictures.append(Picture(Path(file).name, Path(file), labels, tuple(instances)))
    return Source(pictures, _VOC_CATEGORIES, of_objects=True)


_DATASETS: dict[str, Callable[[Path], Source]] = {
    "imagenet": _imagenet,
    "voc2007": partial(_voc, year="2007"),
    "voc2012": partial(_voc, year="2012"),
    "coco": coco,
}


def classes_of_labels(
    source: Source, classifier: Classifier, classes: int, by_order: bool
) -> dict[int, tuple[int, ...]]:
    """The model's class indices for each label: by its name, or by its order where names do not tell and that is asked.

    For an ImageNet classifier, a category of COCO or VOC has all classes that name it, which may be none.

    Raises:
        ValueError: If a label is none of the model's classes.
    """
    labels = {label for picture in source.pictures for label in picture.labels}
    if source.categories is None:
        for label in labels:
            if not 0 <= label < classes:
                raise ValueError(
                    f"A label is {label}; expected an index below {classes}, the model's number of classes"
                )
        return {label: (label,) for label in labels}
    if source.of_objects and classifier.categories == imagenet_categories():
        named = imagenet_classes(source.categories)
        if named is not None:
            return dict(enumerate(named))
    try:
        return {label: (classifier.target(source.categories[label], classes),) for label in sorted(labels)}
    except ValueError as error:
        if by_order and len(source.categories) == classes:
            return {label: (label,) for label in labels}
        hint = (
            f"{len(source.categories)} classes, named by the model's class indices, WordNet ids or category names"
            if by_order
            else "classes named by the model's class indices, WordNet ids or category names, or labels_by_order where "
            "the model's classes are in the order of these names"
        )
        wanted = f"; the model has {classes} classes, the pictures have {len(source.categories)}" if by_order else ""
        raise ValueError(f"The pictures' classes are not the model's: {error}{wanted}. Expected {hint}") from error
