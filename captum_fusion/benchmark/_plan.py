"""What is to be done: a model with its pictures, and what its records say that they were made with."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captum_fusion._app.images import open_photograph
from captum_fusion._app.methods import Method
from captum_fusion._app.models.loading import Classifier, Frame, choose_layer, load_classifier
from captum_fusion._app.names import one_line
from captum_fusion._app.options import LOCALIZATION
from captum_fusion._app.settings import Settings
from captum_fusion._engine.captum import ForwardFunc
from captum_fusion._engine.feature_map import FeatureMap
from captum_fusion._engine.state import warn
from captum_fusion.benchmark._dataset import Instance, Picture, Source
from captum_fusion.benchmark._records import Key, Record, hash_of
from captum_fusion.benchmark._sources import classes_of_labels

T = TypeVar("T")

STAGES = ("gradient", "denoised", "region", "combined")


@dataclass(frozen=True)
class Variant:
    """A method with its percentile, and the stages that are judged as well."""

    method: Method
    percentile: float | None
    stages: tuple[str, ...]

    @property
    def parts(self) -> tuple[str | None, ...]:
        """What is judged: the map itself, None, and the stages."""
        return (None, *self.stages)


def variants_of(settings: Settings) -> list[Variant]:
    """Every method with each percentile that it is run with."""
    return [
        Variant(method, percentile, STAGES if settings.stages and method.components else ())
        for method in settings.parsed_methods()
        for percentile in (dict.fromkeys(settings.percentiles) if method.has_percentile else (None,))
    ]


@dataclass(frozen=True)
class WorkItem:
    """A picture and what is requested for it: the likeliest of some classes, or the predicted one of all."""

    picture: Picture
    hash: str
    requested: str = "predicted"
    classes: tuple[int, ...] = ()


class PreprocessedImage(NamedTuple):
    """A picture as the model sees it, where that is in the picture, and what had to be done to the picture."""

    pixels: Tensor
    frame: Frame
    note: str


@dataclass(frozen=True)
class Plan:
    """A model with its pictures.

    ``compiled`` is what ``torch.compile`` made of the model, None where that is not asked; ``label_of`` tells which
    label a class names.
    """

    classifier: Classifier
    compiled: ForwardFunc | None
    weights: str
    weights_hash: str
    layer: FeatureMap
    device: torch.device
    items: list[WorkItem]
    label_of: dict[int, int]

    @property
    def masked_model(self) -> ForwardFunc:
        """What does the masked passes."""
        return self.classifier.model if self.compiled is None else self.compiled

    @property
    def subject(self) -> tuple[str, str, str]:
        """What is explained: the model, its weights and its layer."""
        return self.classifier.name, self.weights, self.layer.name

    def key(self, item: WorkItem, variant: Variant, part: str | None) -> Key:
        """The key of a record."""
        return Key(*self.subject, item.picture.name, item.requested, variant.method.name, variant.percentile, part)

    def keys(self, item: WorkItem, variants: Iterable[Variant]) -> Iterator[Key]:
        """The keys of all records of a picture."""
        for variant in variants:
            for part in variant.parts:
                yield self.key(item, variant, part)

    def instances(self, item: WorkItem, target: int) -> list[Instance]:
        """The objects that a class names in a picture."""
        return [instance for instance in item.picture.instances or () if instance.label == self.label_of.get(target)]

    def load(self, batches: list[list[WorkItem]]) -> Iterator[list[PreprocessedImage | str]]:
        """What the model sees of each batch's pictures, or what is wrong with them; on a GPU read ahead."""
        on_gpu = self.device.type == "cuda"
        dataset = _Pixels(self.classifier, [[item.picture for item in batch] for batch in batches])
        loader = DataLoader(
            dataset, batch_size=None, num_workers=4 if on_gpu else 0, pin_memory=on_gpu, collate_fn=_as_it_is
        )
        return iter(loader)


def _as_it_is(batch: T) -> T:
    return batch


class _Pixels(Dataset[list[PreprocessedImage | str]]):
    def __init__(self, classifier: Classifier, batches: list[list[Picture]]) -> None:
        self.preprocessing = classifier.preprocessing
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[PreprocessedImage | str]:
        return [self._read(picture) for picture in self.batches[index]]

    def _read(self, picture: Picture) -> PreprocessedImage | str:
        try:
            photograph = open_photograph(picture.file)
            pixels = self.preprocessing.crop(photograph.image)
        except Exception as error:
            # Without the file's name, so that equal reasons are counted together.
            text = one_line(error).removeprefix(f"{picture.file} ").removeprefix("cannot be read: ")
            return f"The picture cannot be read: {text.replace(str(picture.file), picture.file.name)}"
        return PreprocessedImage(pixels, self.preprocessing.frame(*photograph.image.size), photograph.note)


def make_plans(
    settings: Settings,
    source: Source,
    pictures: Sequence[Picture],
    hash_of_file: Callable[[Path], str],
    device: torch.device,
) -> list[Plan]:
    """A plan for each model.

    Raises:
        ValueError: If a model or its layer cannot be explained, if labels are not its classes, or if a model is given
            twice.
    """
    hashes = {picture.name: hash_of_file(picture.file) for picture in pictures}
    plans: list[Plan] = []
    for name, weights, layer in settings.subjects():
        plan = _make_plan(settings, source, pictures, hashes, device, (name, weights, layer))
        if plan.subject in [other.subject for other in plans]:
            raise ValueError(f"The model {name} with layer {plan.layer.name} and weights {plan.weights} is given twice")
        plans.append(plan)
    return plans


def _make_plan(
    settings: Settings,
    source: Source,
    pictures: Sequence[Picture],
    hashes: Mapping[str, str],
    device: torch.device,
    subject: tuple[str, str | None, str | None],
) -> Plan:
    name, weights, layer = subject
    classifier = load_classifier(name, weights, activation=settings.activation)
    classifier.model.to(device)
    size = classifier.preprocessing.size
    # Two rows, so that a model that returns one row for any batch is found before the first picture.
    blank = classifier.preprocessing.normalize(torch.full((2, 3, size, size), 0.5, device=device))
    classes = classifier.scores(blank).shape[1]
    chosen = choose_layer(classifier.model, blank, layer, settings.grid)
    label_of: dict[int, int] = {}
    items = [WorkItem(picture, hashes[picture.name]) for picture in pictures]
    if settings.target != "predicted" or any(metric in LOCALIZATION for metric in settings.metrics):
        classes_of = classes_of_labels(source, classifier, classes, settings.labels_by_order)
        label_of = {index: label for label, indices in classes_of.items() for index in indices}
        if settings.target != "predicted":
            items = _labelled(settings, pictures, hashes, classes_of)
    state = classifier.model.state_dict()
    weights_hash = hash_of(
        part
        for key, value in state.items()
        if isinstance(value, Tensor)
        for part in (key.encode(), value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    )
    # Its masked rows come in one shape, and its weights do not change.
    compiled = torch.compile(classifier.model, options={"freezing": True}) if settings.compile else None
    return Plan(classifier, compiled, weights or "default", weights_hash, chosen, device, items, label_of)


def _labelled(
    settings: Settings,
    pictures: Sequence[Picture],
    hashes: Mapping[str, str],
    classes_of: Mapping[int, tuple[int, ...]],
) -> list[WorkItem]:
    """The pieces of pictures with their labels; pictures whose objects no class names are left out, and counted."""
    items: list[WorkItem] = []
    unnamed = []
    for picture in pictures:
        if not picture.labels and picture.instances is None:
            raise ValueError(
                f"{picture.name} has no label; expected a folder for each class, a labels file, or a dataset with "
                "labels"
            )
        named = [classes_of[label] for label in picture.labels if classes_of[label]]
        if not named:
            unnamed.append(picture.name)
        elif settings.target == "best-label":
            items.append(WorkItem(picture, hashes[picture.name], "best-label", tuple(chain.from_iterable(named))))
        else:
            items += [
                WorkItem(picture, hashes[picture.name], "|".join(map(str, indices)), indices) for indices in named
            ]
    if unnamed:
        left_out = f"{len(unnamed)} of {len(pictures)} pictures, such as {unnamed[0]}, show nothing that a class names"
        if not items:
            raise ValueError(f"{left_out}; expected pictures of what the model classifies")
        warn(f"{left_out}; they are left out")
    return items


def provenance(settings: Settings, plan: Plan, item: WorkItem) -> Record:
    """What the values of a record depend on besides its key."""
    curves = {"insertion", "deletion"} & set(settings.metrics)
    return {
        "weights_hash": plan.weights_hash,
        "image_hash": item.hash,
        "target_kind": settings.target,
        "steps": settings.steps if curves else None,
        "tolerance": settings.tolerance,
        "precision": settings.precision,
        "activation": settings.activation,
        "grid": None if settings.grid is None else list(settings.grid),
        "device": plan.device.type,
        "batch_size": settings.batch_size,
        "compile": settings.compile,
    }


def check_records(folder: Path, settings: Settings, plans: Sequence[Plan], done: Mapping[Key, Record]) -> None:
    """Refuses to add to records whose meaning that would change.

    Raises:
        ValueError: If the folder's records were made in another way, naming the argument; if a picture, a label or a
            model's weights have changed since; or if they are of pictures that this run leaves out.
    """
    other = "expected the same, or another output folder"
    hashes = {plan.subject: plan.weights_hash for plan in plans}
    items = {plan.subject: {(item.picture.name, item.requested): item for item in plan.items} for plan in plans}
    images = {item.picture.name: item.hash for plan in plans for item in plan.items}
    left_out: dict[str, None] = {}
    given = provenance(settings, plans[0], plans[0].items[0])
    for key, record in done.items():
        if "error" in record:
            continue  # It is done again.
        if key[:3] in hashes and record.get("weights_hash") != hashes[key[:3]]:
            raise ValueError(
                f"The weights {key.weights} of {key.model} have changed since {folder} was written; {other}"
            )
        for field, argument in _ARGUMENTS.items():
            kept, asked = record.get(field), given[field]
            if kept != asked and not (field == "steps" and None in (kept, asked)):
                raise ValueError(f"{folder} holds records made with {argument} = {kept!r}, not {asked!r}; {other}")
        if key.image not in images:
            left_out[key.image] = None
        elif record.get("image_hash") != images[key.image]:
            raise ValueError(f"The picture {key.image} has changed since {folder} was written; {other}")
        elif key[:3] in items and (key.image, key.requested) not in items[key[:3]]:
            raise ValueError(
                f"The labels have changed: {folder} holds records of {key.image} with the label {key.requested}; "
                f"{other}"
            )
    if left_out:
        raise ValueError(
            f"{folder} holds records of {len(left_out)} pictures that this run leaves out, such as "
            f"{next(iter(left_out))}; expected images, limit and seed that take these as well, or another output folder"
        )


_ARGUMENTS = {
    "target_kind": "target",
    "steps": "steps",
    "tolerance": "tolerance",
    "precision": "precision",
    "activation": "activation",
    "grid": "grid",
    "device": "device",
    "batch_size": "batch_size",
    "compile": "compile",
}
