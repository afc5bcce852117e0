"""The work of a benchmark: models with their images, and the provenance of their records."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Conv2d
from torch.utils.data import DataLoader

from captum_fusion import FeatureMap
from captum_fusion._app.images import open_photograph
from captum_fusion._app.messages import one_line
from captum_fusion._app.methods import Method
from captum_fusion._app.models.classifier import Classifier
from captum_fusion._app.models.layer import choose_layer
from captum_fusion._app.models.loading import load_classifier
from captum_fusion._app.models.preprocessing import Frame, Preprocessing
from captum_fusion._app.settings import Settings
from captum_fusion.benchmark._dataset import Instance, LabelledImage, Placement, Source, place
from captum_fusion.benchmark._records import Key, Record, hash_of
from captum_fusion.benchmark._sources import classes_of_labels

STAGES = ("gradient", "denoised", "region", "combined")


@dataclass(frozen=True)
class Variant:
    """A method with its percentile, and the stages that are evaluated as well."""

    method: Method
    percentile: float | None
    stages: tuple[str, ...]

    @property
    def parts(self) -> tuple[str | None, ...]:
        """The map itself, None, and the stages."""
        return (None, *self.stages)

    def map_id(self, stage: str | None) -> tuple[str, float | None, str | None]:
        """Identifies a map; methods that share a stage share its identity."""
        gradient, region = self.method.components or ("", "")
        if stage in ("gradient", "region"):
            return gradient if stage == "gradient" else region, None, None
        return gradient if stage == "denoised" else self.method.name, self.percentile, stage


def variants_of(settings: Settings) -> list[Variant]:
    """Every method with each of its percentiles."""
    return [
        Variant(method, percentile, STAGES if settings.stages and method.components else ())
        for method in settings.parsed_methods()
        for percentile in (dict.fromkeys(settings.percentiles) if method.has_percentile else (None,))
    ]


@dataclass(frozen=True)
class WorkItem:
    """An image and the requested target: the most probable of some classes, or the predicted one of all."""

    image: LabelledImage
    image_hash: str = ""
    """The hash of its file; it is read last, when all else has been checked."""
    objects_hash: str | None = None
    """None where no metric needs the objects."""
    requested: str = "predicted"
    classes: tuple[int, ...] = ()


class PreprocessedImage(NamedTuple):
    """A preprocessed image, the frame that was cropped, and the placement of its objects."""

    pixels: Tensor
    frame: Frame
    note: str
    placement: Placement | None


@dataclass(frozen=True)
class Plan:
    """A model with its images."""

    classifier: Classifier
    masked_model: Callable[..., Any]
    """The model that runs the masked passes: compiled where that was asked for."""
    weights: str
    weights_hash: str
    model_hash: str
    """The hash of the preprocessing and the category names."""
    layer: FeatureMap
    device: torch.device
    items: list[WorkItem]
    classes_of: Mapping[int, tuple[int, ...]]
    """The classes that each label names, where targets or objects need them."""
    notes: list[str]
    """The images that were left out."""

    @property
    def subject(self) -> tuple[str, str, str]:
        """The model, its weights and its layer."""
        return self.classifier.name, self.weights, self.layer.name

    def key(self, item: WorkItem, variant: Variant, part: str | None) -> Key:
        """The key of a record."""
        return Key(*self.subject, item.image.name, item.requested, variant.method.name, variant.percentile, part)

    def keys(self, item: WorkItem, variants: Iterable[Variant]) -> Iterator[Key]:
        """The keys of all records of an image."""
        for variant in variants:
            for part in variant.parts:
                yield self.key(item, variant, part)

    def instances(self, item: WorkItem, target: int) -> list[Instance]:
        """The objects in an image that a class names."""
        return [each for each in item.image.instances or () if target in self.classes_of[each.label]]

    def load(self, batches: list[list[WorkItem]]) -> Iterator[list[PreprocessedImage | str]]:
        """The preprocessed images of each batch, or the reasons why they cannot be read; on a GPU read ahead."""
        on_gpu = self.device.type == "cuda"
        read = partial(_read_batch, self.classifier.preprocessing)
        return iter(
            DataLoader(batches, None, num_workers=4 if on_gpu else 0, pin_memory=on_gpu, collate_fn=read)  # type: ignore[arg-type]
        )


def _read_batch(preprocessing: Preprocessing, items: Sequence[WorkItem]) -> list[PreprocessedImage | str]:
    return [_read(preprocessing, item) for item in items]


def _read(preprocessing: Preprocessing, item: WorkItem) -> PreprocessedImage | str:
    image = item.image
    try:
        photograph = open_photograph(image.file)
        pixels = preprocessing.crop(photograph.image)
        frame = preprocessing.frame(*photograph.image.size)
        placement = None if item.objects_hash is None else place(image, frame, preprocessing.size)
    except Exception as error:
        # Without the file's name, so that equal reasons are counted together.
        text = one_line(error).removeprefix(f"{image.file} ").removeprefix("cannot be read: ")
        return f"The image cannot be read: {text.replace(str(image.file), image.file.name)}"
    notes = [photograph.note, placement.note if placement else ""]
    return PreprocessedImage(pixels, frame, "; ".join(filter(None, notes)), placement)


def make_plan(
    settings: Settings,
    source: Source,
    images: Sequence[LabelledImage],
    device: torch.device,
    arguments: dict[str, Any],
) -> Plan:
    """The plan of a model, its weights and its layer, for some images, whose files are not read yet.

    Raises:
        ValueError: If the model or its layer cannot be explained, or if labels are not its classes.
    """
    layer, weights = arguments["layer"], arguments["weights"]
    loading = {name: value for name, value in arguments.items() if name not in ("layer", "grid", "device", "precision")}
    classifier = load_classifier(**loading)
    classifier.model.to(device)
    size = classifier.preprocessing.size
    if settings.steps > size**2 and {"insertion", "deletion"} & set(settings.metrics):
        raise ValueError(f"steps is {settings.steps}; expected at most {size**2}, the number of pixels of the input")
    if settings.protocol:
        squashed = replace(classifier.preprocessing, resize=size, squash=True)
        classifier = replace(classifier, preprocessing=squashed)
        convolutions = [name for name, module in classifier.model.named_modules() if isinstance(module, Conv2d)]
        layer = layer or next(reversed(convolutions), None)
    # Two rows, so that a model that returns one row for any batch is found before the first image.
    blank = classifier.preprocessing.blank(device)
    classes = classifier.scores(blank).shape[1]
    feature_map = choose_layer(classifier.model, blank, layer, settings.grid)
    items = [
        WorkItem(each, objects_hash=_objects_hash(each, source) if settings.localized else None) for each in images
    ]
    classes_of: dict[int, tuple[int, ...]] = {}
    notes: list[str] = []
    if settings.target != "predicted" or settings.localized:
        classes_of = classes_of_labels(source, classifier, classes, settings.labels_by_order)
        if settings.target != "predicted":
            items, notes = _labelled(settings.target, items, classes_of)
    weights_hash = hash_of(
        part
        for key, value in classifier.model.state_dict().items()
        if isinstance(value, Tensor)
        for part in (key.encode(), value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    )
    model_hash = hash_of([repr((classifier.preprocessing, classifier.categories)).encode()])
    # Its masked rows come in one shape, and its weights do not change.
    model = torch.compile(classifier.model, options={"freezing": True}) if settings.compile else classifier.model
    hashes = weights_hash, model_hash
    return Plan(classifier, model, weights or "default", *hashes, feature_map, device, items, classes_of, notes)


def _objects_hash(image: LabelledImage, source: Source) -> str:
    names = [source.categories[label] for label in image.labels] if source.categories else []
    return hash_of([repr((image.size, image.instances, names)).encode()])


def _labelled(
    target: str, items: Sequence[WorkItem], classes_of: Mapping[int, tuple[int, ...]]
) -> tuple[list[WorkItem], list[str]]:
    """The items of images with their labels, and a note of those with no object that a class names."""
    labelled: list[WorkItem] = []
    unnamed = []
    for item in items:
        image = item.image
        if not image.labels and image.instances is None:
            raise ValueError(
                f"{image.name} has no label; expected a folder for each class and no image outside these, a labels "
                "file, or a dataset with labels"
            )
        # Two labels may name one class, as couch and sofa do.
        named = list(dict.fromkeys(classes_of[label] for label in image.labels if classes_of[label]))
        if not named:
            unnamed.append(image.name)
            continue
        best = target == "best-label"
        for indices in [tuple(chain.from_iterable(named))] if best else named:
            requested = "|".join(map(str, indices))
            labelled.append(replace(item, requested=f"best-label {requested}" if best else requested, classes=indices))
    if not unnamed:
        return labelled, []
    note = f"{len(unnamed)} of {len(items)} images, such as {unnamed[0]}, show no object of the model's classes"
    if not labelled:
        raise ValueError(f"{note}; expected images of the model's classes")
    return labelled, [f"{note}; they are left out."]


def provenance(settings: Settings, plan: Plan, item: WorkItem, method: Method) -> Record:
    """Collects the settings that the values of a record depend on, besides its key."""
    return {
        "version": version("captum-fusion"),
        "weights_hash": plan.weights_hash,
        "model_hash": plan.model_hash,
        "image_hash": item.image_hash,
        "objects_hash": item.objects_hash,
        "target_kind": settings.target,
        "steps": settings.steps if {"insertion", "deletion"} & set(settings.metrics) else None,
        "protocol": settings.protocol,
        "weighting": method.weighting,
        "tolerance": settings.tolerance,
        "precision": settings.precision,
        "activation": plan.classifier.activation,
        "grid": None if settings.grid is None else list(settings.grid),
        "device": plan.device.type,
        "batch_size": settings.batch_size,
        "compile": settings.compile,
    }


# The messages of fields that are no arguments.
_CHANGED = {
    "weights_hash": "The weights {weights} of {model} have",
    "model_hash": "The preprocessing or the category names of {model} have",
    "image_hash": "The image {image} has",
    "objects_hash": "The boxes, outlines or categories of {image} have",
}


def check_records(folder: Path, settings: Settings, plans: Sequence[Plan], done: Mapping[Key, Record]) -> None:
    """Refuses records that this run cannot extend.

    Raises:
        ValueError: If a model is given twice; if a record was made in another way, naming the argument; if an image,
            its objects, a label or a model has changed since; or if this run leaves out images of the records.
    """
    other = "expected the same, or another output folder"
    by_subject = {plan.subject: plan for plan in plans}
    if len(by_subject) < len(plans):
        name, weights, layer = Counter(plan.subject for plan in plans).most_common(1)[0][0]
        raise ValueError(f"The model {name} with layer {layer} and weights {weights} is listed twice; remove one")
    requested = {(*plan.subject, item.image.name, item.requested) for plan in plans for item in plan.items}
    by_image = {item.image.name: item for plan in plans for item in plan.items}
    methods = {method.name: method for method in settings.parsed_methods()}
    left_out = list(dict.fromkeys(key.image for key in done if key.image not in by_image))
    for key, record in done.items():
        if "error" in record or key.image not in by_image:
            continue  # Errors are tried again.
        # Records of other models and methods need to agree in the rest only.
        plan, method = by_subject.get(key.subject), methods.get(key.method)
        anything = (plan or plans[0], by_image[key.image], method or next(iter(methods.values())))
        for field, value in provenance(settings, *anything).items():
            recorded = record.get(field)
            optional = field in ("steps", "objects_hash") and None in (recorded, value)
            foreign = (not plan and field in ("weights_hash", "model_hash")) or (not method and field == "weighting")
            if recorded == value or optional or foreign:
                continue
            if field not in record:
                raise ValueError(f"{folder} was written by a release that did not record {field}; {other}")
            if field == "version":
                raise ValueError(f"{folder} was written by captum-fusion {recorded}, and this is {value}; {other}")
            if field in _CHANGED:
                subject = _CHANGED[field].format(**key._asdict())
                raise ValueError(f"{subject} changed since {folder} was written; {other}")
            name = field.removesuffix("_kind")
            raise ValueError(f"{folder} holds records with {name} = {recorded!r}, not {value!r}; {other}")
        if plan and key.item not in requested:
            raise ValueError(
                f"The labels have changed: {folder} holds records of {key.image} with the label {key.requested}; "
                f"{other}"
            )
    if left_out:
        raise ValueError(
            f"{folder} holds records of {len(left_out)} images that this run leaves out, such as {left_out[0]}; "
            "choose images, limit and seed that include them, or another output folder"
        )
