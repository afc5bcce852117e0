"""The pictures of one model, and the records of their explanations."""

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms
from torchvision.tv_tensors import BoundingBoxes

from captum_fusion._methods import Method, Precision, RememberedScoreCam, Target
from captum_fusion._models import Classifier, find_layer, last_feature_map, load_classifier
from captum_fusion.attr.fusion_cam import LayerFusionCam
from captum_fusion.benchmark._images import Box, Picture, Source, labels_of_model
from captum_fusion.benchmark._records import Key, Record
from captum_fusion.metrics import (
    confidence_drop,
    confidence_increase,
    deletion,
    energy_pointing_game,
    insertion,
    pointing_game,
    saliency_map,
)

_STAGES = ("gradient", "denoised", "region", "combined")
# Large enough to tell maps apart in the report, small enough for a million records.
_THUMBNAIL = (28, 28)


@dataclass
class Plan:
    """A model with its pictures, each with a target that is requested for it."""

    classifier: Classifier
    layer: str
    place: torch.device
    work: list[tuple[Picture, int | None]]
    boxes: dict[str, dict[int, list[Box]]]
    weights_hash: str

    def key(self, picture: Picture, requested: int | None, method: str) -> tuple[str, str, str, str]:
        """The key of a record."""
        return self.classifier.name, picture.name, _requested(requested), method

    def load(self, batches: list[list[tuple[Picture, int | None]]]) -> Iterator[list[Tensor | str]]:
        """The pixels of each batch's pictures, or what is wrong with them; on a GPU read ahead into pinned memory."""
        on_gpu = self.place.type == "cuda"
        dataset = _Pixels(self.classifier, [[picture for picture, _ in batch] for batch in batches])
        loader = DataLoader(
            dataset, batch_size=None, num_workers=4 if on_gpu else 0, pin_memory=on_gpu, collate_fn=lambda batch: batch
        )
        return iter(loader)


class _Pixels(Dataset[list[Tensor | str]]):
    def __init__(self, classifier: Classifier, batches: list[list[Picture]]) -> None:
        self.crop = classifier.preprocessing.crop
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[Tensor | str]:
        return [self._read(picture) for picture in self.batches[index]]

    def _read(self, picture: Picture) -> Tensor | str:
        try:
            with Image.open(picture.file) as image:
                return self.crop(ImageOps.exif_transpose(image))
        except (OSError, SyntaxError, ValueError) as error:
            return f"The picture cannot be read: {error}"


def make_plan(
    name: str,
    layer: str | None,
    weights: str | None,
    place: torch.device,
    pictures: list[Picture],
    target: Target,
    source: Source,
) -> Plan:
    classifier = load_classifier(name, weights, None, None, None)
    classifier.model.to(place)
    size = classifier.preprocessing.size
    blank = torch.zeros(1, 3, size, size, device=place)
    with torch.no_grad():
        classes = classifier.model(blank).shape[1]
    layer = layer or last_feature_map(classifier.model, blank)
    find_layer(classifier.model, layer)
    work: list[tuple[Picture, int | None]] = [(picture, None) for picture in pictures]
    if target == "label":
        labels = labels_of_model(source, classifier.categories, classes)
        index_of = {picture.name: indices for picture, indices in zip(source.pictures, labels, strict=True)}
        work = [(picture, label) for picture in pictures for label in index_of[picture.name]]
    boxes = {picture.name: _boxes_as_seen(picture, classifier) for picture in pictures if picture.boxes is not None}
    state = classifier.model.state_dict()
    weights_hash = hash_of(
        f"{key} {hashlib.sha256(value.cpu().numpy().tobytes()).hexdigest()}" for key, value in state.items()
    )
    return Plan(classifier, layer, place, work, boxes, weights_hash)


def _boxes_as_seen(picture: Picture, classifier: Classifier) -> dict[int, list[Box]]:
    """The boxes in the pixels that the model sees; those outside the crop are left out."""
    assert picture.boxes is not None
    with Image.open(picture.file) as image:
        width, height = image.size
    seen: dict[int, list[Box]] = {}
    size, resize = classifier.preprocessing.size, classifier.preprocessing.resize
    for label, boxes in picture.boxes.items():
        values: Any = BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width), dtype=torch.float32)
        values = transforms.clamp_bounding_boxes(transforms.center_crop(transforms.resize(values, [resize]), [size]))
        kept = [box for box in values.tolist() if box[0] < box[2] and box[1] < box[3]]
        if kept:
            seen[label] = [(box[0], box[1], box[2], box[3]) for box in kept]
    return seen


@dataclass(frozen=True)
class Judge:
    """Makes the records of pictures."""

    methods: list[Method]
    metrics: tuple[str, ...]
    percentiles: tuple[float, ...]
    stages: bool
    steps: int
    precision: Precision
    strict: bool

    def variants(self, method: Method) -> list[tuple[str, float]]:
        """The method's label for each percentile that it is run with."""
        if not method.has_percentile or len(self.percentiles) == 1:
            return [(method.name, self.percentiles[0])]
        return [(f"{method.name} {percentile:g}%", percentile) for percentile in self.percentiles]

    def stage_labels(self, method: Method, label: str) -> list[str]:
        """The labels of the stages that are judged as well."""
        return [f"{label} {stage}" for stage in _STAGES] if self.stages and method.components else []

    def labels(self) -> list[str]:
        """The labels of all methods, in order."""
        variants = [(method, label) for method in self.methods for label, _ in self.variants(method)]
        return [part for method, label in variants for part in (label, *self.stage_labels(method, label))]

    def records(
        self,
        plan: Plan,
        batch: list[tuple[Picture, int | None]],
        loaded: list[Tensor | str],
        done: Mapping[Key, Record],
    ) -> Iterator[list[Record]]:
        """The records of a batch, method by method, as soon as they are known."""
        broken = [(piece, pixels) for piece, pixels in zip(batch, loaded, strict=True) if isinstance(pixels, str)]
        for (picture, requested), error in broken:
            if self.strict:
                raise ValueError(f"{picture.name}: {error}")
            yield [self._base(plan, picture, requested, requested, label) | {"error": error} for label in self.labels()]
        whole = [(piece, pixels) for piece, pixels in zip(batch, loaded, strict=True) if isinstance(pixels, Tensor)]
        if not whole:
            return
        pieces = [piece for piece, _ in whole]
        network = plan.classifier.model
        pixels = torch.cat([part for _, part in whole]).to(plan.place, non_blocking=True)
        inputs = plan.classifier.preprocessing.normalize(pixels)
        with self._autocast(plan.place), torch.no_grad():
            predicted = network(inputs).argmax(dim=1).tolist()
        targets = [
            index if requested is None else requested for (_, requested), index in zip(pieces, predicted, strict=True)
        ]
        score_cam = RememberedScoreCam(network, find_layer(network, plan.layer))
        for method in self.methods:
            for label, percentile in self.variants(method):
                labels = [label, *self.stage_labels(method, label)]
                if all(plan.key(*piece, part) in done for piece in pieces for part in labels):
                    continue
                yield self._attempt(plan, method, labels, percentile, pieces, inputs, targets, score_cam)

    def _attempt(
        self,
        plan: Plan,
        method: Method,
        labels: list[str],
        percentile: float,
        pieces: list[tuple[Picture, int | None]],
        inputs: Tensor,
        targets: list[int],
        score_cam: RememberedScoreCam,
    ) -> list[Record]:
        """The records of a method; where it fails, one by one, so that one picture's failure is not the others'."""
        try:
            return self._explain(plan, method, labels, percentile, pieces, inputs, targets, score_cam)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            if self.strict:
                raise
            if len(pieces) == 1:
                message = {"error": f"{type(error).__name__}: {error}"}
                return [self._base(plan, *pieces[0], targets[0], label) | message for label in labels]
        parts = [slice(index, index + 1) for index in range(len(pieces))]
        return [
            record
            for part in parts
            for record in self._attempt(
                plan, method, labels, percentile, pieces[part], inputs[part], targets[part], score_cam
            )
        ]

    def _explain(
        self,
        plan: Plan,
        method: Method,
        labels: list[str],
        percentile: float,
        pieces: list[tuple[Picture, int | None]],
        inputs: Tensor,
        targets: list[int],
        score_cam: RememberedScoreCam,
    ) -> list[Record]:
        network = plan.classifier.model
        attribution = method.build(network, find_layer(network, plan.layer), score_cam)
        options: dict[str, Any] = {"percentile": percentile} if method.has_percentile else {}
        if isinstance(attribution, LayerFusionCam):
            options |= {"weighting": method.weighting, "return_stages": True}
        saved = score_cam.saved
        _synchronize(plan.place)
        start = perf_counter()
        with self._autocast(plan.place):
            result: Any = attribution.attribute(inputs, target=targets, **options)
        _synchronize(plan.place)
        seconds = (perf_counter() - start + score_cam.saved - saved) / len(pieces)
        maps: list[Tensor] = [result]
        if isinstance(attribution, LayerFusionCam):
            attributions, stages = result
            maps = [attributions, *(getattr(stages, stage) for stage in _STAGES)][: len(labels)]
        records: list[Record] = []
        for label, values in zip(labels, maps, strict=True):
            judged = self._judge(plan, pieces, inputs, targets, values)
            thumbnails = (saliency_map(values, _THUMBNAIL) * 255).round().byte().cpu()
            for index, piece in enumerate(pieces):
                records.append(
                    self._base(plan, *piece, targets[index], label)
                    | {name: numbers[index] for name, numbers in judged.items()}
                    | {"map": base64.b64encode(thumbnails[index].numpy().tobytes()).decode(), "seconds": seconds}
                )
        return records

    def _judge(
        self,
        plan: Plan,
        pieces: list[tuple[Picture, int | None]],
        inputs: Tensor,
        targets: list[int],
        attributions: Tensor,
    ) -> dict[str, list[Any]]:
        network = plan.classifier.model
        values: dict[str, list[Any]] = {}
        with self._autocast(plan.place):
            for name, metric in (("confidence_drop", confidence_drop), ("confidence_increase", confidence_increase)):
                if name in self.metrics:
                    values[name] = metric(network, inputs, attributions, target=targets).tolist()
            for name, curve in (("insertion", insertion), ("deletion", deletion)):
                if name in self.metrics:
                    area, _, probabilities = curve(
                        network, inputs, attributions, target=targets, steps=self.steps, return_curve=True
                    )
                    values[name] = area.tolist()
                    values[f"{name}_curve"] = [[round(p, 5) for p in row] for row in probabilities.tolist()]
        if any(name.endswith("pointing_game") for name in self.metrics):
            size = tuple(inputs.shape[2:])
            regions = [
                torch.tensor(plan.boxes[picture.name].get(target, [])).reshape(-1, 4)
                for (picture, _), target in zip(pieces, targets, strict=True)
            ]
            for name, game in (("pointing_game", pointing_game), ("energy_pointing_game", energy_pointing_game)):
                if name in self.metrics:
                    shares = game(attributions, regions, size).tolist()
                    values[name] = [None if share != share else share for share in shares]
        return values

    def _base(self, plan: Plan, picture: Picture, requested: int | None, target: int | None, label: str) -> Record:
        return {
            "model": plan.classifier.name,
            "layer": plan.layer,
            "image": picture.name,
            "file": str(picture.file),
            "requested": _requested(requested),
            "target": target,
            "category": None if target is None else plan.classifier.category(target),
            "method": label,
        }

    def _autocast(self, place: torch.device) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(place.type, torch.bfloat16 if self.precision == "bfloat16" else torch.float16)


def _requested(requested: int | None) -> str:
    return "predicted" if requested is None else str(requested)


def _synchronize(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


def hash_of(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
