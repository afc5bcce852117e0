"""The sources of images: folders, torchvision's datasets, and files of COCO's form."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from torchvision.datasets import ImageNet, VOCDetection
from torchvision.models.segmentation import FCN_ResNet50_Weights

from captum_fusion._app.images import EXTENSIONS
from captum_fusion._app.messages import close_names, reason, words
from captum_fusion._app.models.classifier import Classifier, imagenet_categories, wordnet_indices
from captum_fusion._app.output_files import identity
from captum_fusion.benchmark._dataset import ROUNDED, Instance, LabelledImage, Outline, Size, Source
from captum_fusion.benchmark._records import PATTERN

# torchvision's VOC categories, without the background.
_VOC_CATEGORIES = tuple(FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:])
_NAMED = 5


def find_source(images: str, labels: Path | None = None, output: Path | None = None) -> Source:
    """Finds the images of a folder or of a dataset, in the order of their names; see ``Settings``.

    Charts in the output folder and in those of other results are left out.

    Raises:
        ValueError: If there is no image, if an annotation cannot be read, or if the labels do not fit.
    """
    kind, _, root = images.partition(":")
    if root and kind in _DATASETS:
        if labels is not None:
            raise ValueError(f"labels are given for {images}, which has its own; expected a plain folder")
        try:
            source = _DATASETS[kind](Path(root))
        except Exception as error:
            text = error if isinstance(error, ValueError) else reason(error)
            raise ValueError(f"images is {images}, which cannot be read: {text}. Expected {_FORMS[kind]}") from error
    else:
        source = _folder(Path(images), labels, output)
    if not source.images:
        left_out = f". {' '.join(source.notes)}" if source.notes else ""
        raise ValueError(f"{images} holds no image; expected files ending in {', '.join(EXTENSIONS)}{left_out}")
    return source


def _left_out(what: str, names: Sequence[str]) -> list[str]:
    """A sentence that counts and names what was left out, if anything."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return [f"Left out: {what} ({len(names)}): {', '.join(names[:_NAMED])}{more}."] if names else []


def _folder(root: Path, labels: Path | None, output: Path | None) -> Source:
    if not root.is_dir():
        raise ValueError(
            f"{root} is not a folder; expected a folder of images, or imagenet:ROOT, voc2007:ROOT, voc2012:ROOT or "
            "coco:FILE"
        )
    results = identity(output) if output is not None and output.exists() else None
    if results == identity(root):
        raise ValueError(f"output is {output}, the folder of the images; expected another folder")
    images: list[Path] = []
    others: list[str] = []
    hidden: list[str] = []
    reports: list[str] = []
    for entry in _walk(root, results, (), hidden, reports):
        file = Path(entry.path)
        if file.suffix.lower() in EXTENSIONS and entry.is_file():
            images.append(file)
        elif labels is None or file != labels:
            others.append(entry.path)
    notes = []
    for what, paths in (
        ("files without an image extension", others),
        ("hidden files and folders", hidden),
        (f"folders with {PATTERN}, results of a benchmark", reports),
    ):
        notes += _left_out(what, [Path(path).relative_to(root).as_posix() for path in paths])
    names = [file.relative_to(root).as_posix() for file in images]
    indices: dict[str, int] = {}
    categories = None
    if labels is not None:
        indices = _labels(labels)
        for name in names:
            if name not in indices:
                raise ValueError(f"{labels} has no label for {name}.{close_names(name, indices)}")
    elif all("/" in name for name in names):
        categories = tuple(sorted({name.split("/")[0] for name in names}))
        indices = {name: categories.index(name.split("/")[0]) for name in names}
    labelled_images = [
        LabelledImage(name, file, (indices[name],) if indices else ()) for name, file in zip(names, images, strict=True)
    ]
    return Source(labelled_images, categories, notes=notes)


def _walk(
    folder: Path | str,
    results: tuple[int, int] | None,
    above: tuple[tuple[int, int], ...],
    hidden: list[str],
    reports: list[str],
) -> Iterator["os.DirEntry[str]"]:
    """The files of a folder and of those in it, also by links; one stat a folder.

    Hidden entries and the results of other benchmarks are put into lists, those of this one are passed over.
    """
    own = identity(folder)
    if own in above:
        raise ValueError(f"{folder} is a link to a folder that holds it; remove the link")
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    if own == results:
        return
    if any(fnmatch(entry.name, PATTERN) for entry in entries):
        reports.append(str(folder))
        return
    for entry in entries:
        # Copies by editors and systems, such as .ipynb_checkpoints.
        if entry.name.startswith("."):
            hidden.append(entry.path)
        elif entry.is_dir():
            yield from _walk(entry.path, results, (*above, own), hidden, reports)
        else:
            yield entry


def _labels(file: Path) -> dict[str, int]:
    try:
        # A tuple of pairs for an object, which may hold a name twice.
        pairs = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=tuple)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    # A truth value is an int to Python.
    if not isinstance(pairs, tuple) or not all(type(index) is int for _, index in pairs):
        raise ValueError(f"{file} does not hold class indices by image name; expected a JSON object of these")
    labels = dict(pairs)
    for name, index in pairs:
        if index != labels[name]:
            raise ValueError(f"{file} has the labels {index} and {labels[name]} for {name}; expected one")
    return labels


def _imagenet(root: Path) -> Source:
    dataset = ImageNet(root, split="val")
    indices = wordnet_indices()
    for name in dataset.wnids:
        if name not in indices:
            raise ValueError(f"The folder val/{name} is none of ImageNet's {len(indices)} classes; remove it")
    return Source(
        [
            # The dataset's own labels count the folders that are there, which may be some of the classes.
            LabelledImage(
                Path(file).relative_to(dataset.split_folder).as_posix(), Path(file), (indices[dataset.wnids[label]],)
            )
            for file, label in dataset.samples
        ],
        classes=len(imagenet_categories()),
    )


def _voc(root: Path, year: str) -> Source:
    dataset = VOCDetection(root, year=year, image_set="val")
    labelled_images, missing = [], []
    for image, annotation in zip(dataset.images, dataset.annotations, strict=True):
        file = Path(image)
        if not file.is_file():
            missing.append(file.name)
            continue
        try:
            tree = ElementTree.parse(annotation).getroot()
            instances = tuple(_voc_instance(element) for element in tree.iter("object"))
            size = _size([float(tree.findtext(f"size/{side}") or 0) for side in ("width", "height")])
        except (ElementTree.ParseError, ValueError) as error:
            raise ValueError(f"{annotation}: {error}") from error
        labels = tuple(sorted({instance.label for instance in instances}))
        labelled_images.append(LabelledImage(file.name, file, labels, instances, size))
    notes = _left_out("annotated images that are missing", missing)
    return Source(labelled_images, _VOC_CATEGORIES, of_objects=True, notes=notes)


def _voc_instance(element: ElementTree.Element) -> Instance:
    name = element.findtext("name")
    if name not in _VOC_CATEGORIES:
        raise ValueError(f"The object's name is {name!r}; expected one of VOC's categories")
    texts = [element.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x1, y1, x2, y2 = (float(str(text)) for text in texts)
    except ValueError:
        raise ValueError(f"The box of the {name} is {texts}; expected numbers xmin, ymin, xmax, ymax") from None
    # VOC counts pixels from 1 and includes the last one.
    return Instance(_VOC_CATEGORIES.index(name), (x1 - 1, y1 - 1, x2, y2))


def _coco(file: Path) -> Source:
    """Reads an annotation file of COCO's form, instances_val2017.json for example.

    Its images lie beside it or, as COCO has them, in the folder val2017 beside the file's own folder.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    fields = {"images": ("id", "file_name"), "categories": ("id", "name"), "annotations": ("image_id", "category_id")}
    for part, names in fields.items():
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise ValueError(f"It has no list {part!r}; expected one, as in COCO's own files")
        for number, entry in enumerate(content[part]):
            lacking = [name for name in names if not isinstance(entry, dict) or name not in entry]
            if lacking:
                raise ValueError(f"Number {number} of its {part} has no {lacking[0]!r}; expected {' and '.join(names)}")
    for part, field in (("images", "id"), ("images", "file_name"), ("categories", "id")):
        for value, count in Counter(entry[field] for entry in content[part]).most_common(1):
            if count > 1:
                raise ValueError(f"{count} of its {part} have the {field} {value!r}; expected each {field} once")
    categories = sorted(content["categories"], key=lambda category: int(category["id"]))
    labels = {category["id"]: label for label, category in enumerate(categories)}
    instances: dict[Any, list[Instance]] = {image["id"]: [] for image in content["images"]}
    strays = []
    for number, annotation in enumerate(content["annotations"]):
        name = f"annotation {annotation.get('id', f'number {number}')}"
        if annotation["image_id"] not in instances:
            strays.append(name)
            continue
        try:
            instances[annotation["image_id"]].append(_coco_instance(annotation, labels))
        except (TypeError, ValueError) as error:
            raise ValueError(f"The {name}: {error}") from error
    folders = (file.parent, file.parent.parent / file.stem.removeprefix("instances_"))
    labelled_images, missing = [], []
    for image in sorted(content["images"], key=lambda image: str(image["file_name"])):
        name = str(image["file_name"])
        candidates = [folder / name for folder in folders if (folder / name).is_file()]
        if not candidates:
            missing.append(name)
            continue
        objects = tuple(instances[image["id"]])
        size = [image.get("width"), image.get("height")]
        if size != [None, None] and not _are_numbers(size):
            raise ValueError(f"The image {name}: its width and height are {size}; expected numbers")
        image_labels = tuple(sorted({instance.label for instance in objects}))
        labelled_images.append(LabelledImage(name, candidates[0], image_labels, objects, _size(size)))
    _check_boxes(labelled_images)
    if missing and not labelled_images:
        raise ValueError(f"No image is in {folders[0]} or in {folders[1]}; the first of the missing is {missing[0]}")
    notes = _left_out("annotated images that are missing", missing)
    notes += _left_out("annotations of images that are not listed", strays)
    return Source(labelled_images, tuple(category["name"] for category in categories), of_objects=True, notes=notes)


def _coco_instance(annotation: Mapping[str, Any], labels: Mapping[Any, int]) -> Instance:
    if annotation["category_id"] not in labels:
        raise ValueError(f"its category_id is {annotation['category_id']!r}; expected one of {list(labels)}")
    box: Any = annotation.get("bbox")
    if not _are_numbers(box) or len(box) != 4 or min(box[2:]) < 0:
        raise ValueError(f"its bbox is {box!r}; expected x, y, width and height")
    x, y, width, height = box
    outline = None
    shape = annotation.get("segmentation")
    if isinstance(shape, dict):
        runs: Any = shape.get("counts")
        size: Any = shape.get("size")
        if isinstance(runs, str):
            raise ValueError("it has compressed run lengths; expected polygons or a list of numbers")
        if not _are_numbers(runs) or not _are_numbers(size) or sum(runs) != size[0] * size[-1]:
            raise ValueError(
                f"its run lengths do not add up to its size {size!r}; expected counts, and height and width"
            )
        outline = Outline(runs=runs, size=(size[0], size[1]))
    elif shape:
        for polygon in shape:
            if not _are_numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
                raise ValueError(f"its polygon is {str(polygon)[:60]}; expected x and y of at least three corners")
        outline = Outline(polygons=shape)
    return Instance(
        labels[annotation["category_id"]], (x, y, x + width, y + height), outline, bool(annotation.get("iscrowd"))
    )


def _check_boxes(images: Sequence[LabelledImage]) -> None:
    """Refuses boxes that are no x, y, width and height in pixels, by their polygons if they have some."""
    # Boxes in shares of an image whose sides are 1 are scaled with these.
    sides = [
        side for image in images if image.size != (1, 1) for instance in image.instances or () for side in instance.box
    ]
    if sides and max(map(abs, sides)) <= ROUNDED and any(side % 1 for side in sides):
        raise ValueError("Each bbox is in the first two pixels of its image; expected pixels, not shares of the image")
    outlined = 0
    corners = []
    for image in images:
        for instance in image.instances or ():
            x1, y1, x2, y2 = instance.box
            # Boxes that only hold a place are empty.
            if not (instance.outline and instance.outline.polygons and x1 < x2 and y1 < y2):
                continue
            outlined += 1
            xs, ys = ([side for polygon in instance.outline.polygons for side in polygon[axis::2]] for axis in (0, 1))
            start, end = (min(xs), min(ys)), (max(xs), max(ys))
            text = f"bbox of {image.name} is {x1:g}, {y1:g}, {x2 - x1:g}, {y2 - y1:g}"
            text += f", and its polygons reach from {start[0]:g}, {start[1]:g} to {end[0]:g}, {end[1]:g}"
            if max(start[0] - x2, start[1] - y2, x1 - end[0], y1 - end[1]) > ROUNDED:
                raise ValueError(f"A {text}; expected both in the pixels of the image")
            if _are_close((x1, y1, x2 - x1, y2 - y1), (*start, *end)) and not _are_close((x2, y2), end):
                corners.append(text)
    # One box may be larger than its outline by just these pixels, as that of a partly hidden object.
    if 2 * len(corners) > outlined:
        raise ValueError(f"A {corners[0]}, as in {len(corners)} of {outlined}; expected x, y, width and height")


def _are_close(first: Sequence[float], second: Sequence[float]) -> bool:
    return all(abs(a - b) <= ROUNDED for a, b in zip(first, second, strict=True))


def _size(sides: Sequence[Any]) -> Size | None:
    """The size of an image, None where the annotation gives none."""
    return (round(sides[0]), round(sides[1])) if all(sides) else None


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)


_FORMS = {
    "imagenet": "a ROOT with torchvision's folder val and its meta.bin, or with ImageNet's two archives",
    "voc2007": "a ROOT with the folder VOCdevkit/VOC2007",
    "voc2012": "a ROOT with the folder VOCdevkit/VOC2012",
    "coco": "a FILE of annotations in COCO's form",
}
_DATASETS: dict[str, Callable[[Path], Source]] = {
    "imagenet": _imagenet,
    "voc2007": partial(_voc, year="2007"),
    "voc2012": partial(_voc, year="2012"),
    "coco": _coco,
}


def imagenet_classes() -> dict[str, tuple[int, ...]]:
    """The ImageNet classes that name each category of COCO or VOC, which may be none."""
    classes = {}
    for line in files("captum_fusion.benchmark").joinpath("coco_classes.txt").read_text(encoding="utf-8").splitlines():
        names, _, ranges = line.partition("#")[0].partition(":")
        indices = [[int(end) for end in part.split("-")] for part in ranges.split()]
        for name in filter(None, map(str.strip, names.split("/"))):
            classes[name] = tuple(index for ends in indices for index in range(ends[0], ends[-1] + 1))
    return classes


def classes_of_labels(
    source: Source, classifier: Classifier, classes: int, by_order: bool
) -> dict[int, tuple[int, ...]]:
    """The model's class indices for each label, by its name, or by its order where names do not match.

    For an ImageNet classifier, a category of COCO or VOC has all classes that name it, which may be none.

    Raises:
        ValueError: If a label is none of the model's classes.
    """
    labels = {label for image in source.images for label in image.labels}
    if source.categories is None:
        if source.classes not in (None, classes):
            raise ValueError(
                f"The labels are for {source.classes} classes; expected a model with as many classes, not {classes}"
            )
        for label in labels:
            if not 0 <= label < classes:
                raise ValueError(
                    f"A label is {label}; expected an index below {classes}, the model's number of classes"
                )
        return {label: (label,) for label in labels}
    by_name = imagenet_classes()
    if source.of_objects and classifier.categories == imagenet_categories() and by_name.keys() >= {*source.categories}:
        return {label: by_name[name] for label, name in enumerate(source.categories)}
    names, own = [words(name) for name in source.categories], [words(name) for name in classifier.categories or ()]
    # Names win over the indices that they may look like.
    if all(own.count(name) == 1 for name in names):
        return {label: (own.index(names[label]),) for label in sorted(labels)}
    numbers = [int(name) for name in names if name.isdecimal()]
    if len(numbers) == len(names) == classes and numbers != list(range(classes)):
        if by_order:
            return {label: (label,) for label in labels}
        label = next(label for label, number in enumerate(numbers) if number != label)
        raise ValueError(
            f"The folder {names[label]} may mean the model's class {numbers[label]} or, in the order of the folders, "
            f"{label}; rename it to index:{numbers[label]} or pass labels_by_order"
        )
    try:
        return {label: (classifier.target(source.categories[label], classes),) for label in sorted(labels)}
    except ValueError as error:
        if by_order and len(source.categories) == classes:
            return {label: (label,) for label in labels}
        counts = f"; the model has {classes} classes, the images have {len(source.categories)}" if by_order else ""
        named = "classes named by the model's class indices, WordNet ids or category names"
        expected = (
            f"{len(source.categories)} {named}"
            if by_order
            else f"{named}, or labels_by_order if the model's classes are in the order of these names"
        )
        raise ValueError(f"The images' classes are not the model's: {error}{counts}. Expected {expected}") from error
