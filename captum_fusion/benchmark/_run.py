"""Explains many pictures and judges the explanations."""

import base64
import hashlib
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args

import torch
from PIL import Image, ImageOps
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms
from torchvision.tv_tensors import BoundingBoxes

from captum_fusion._checks import check_percentile
from captum_fusion._methods import Method, RememberedScoreCam, parse_method
from captum_fusion._models import Classifier, find_layer, last_feature_map, load_classifier
from captum_fusion._names import close_names
from captum_fusion.attr.fusion_cam import LayerFusionCam
from captum_fusion.benchmark._images import Box, Picture, find_pictures, labels_of_model
from captum_fusion.benchmark._progress import Progress
from captum_fusion.benchmark._records import Record, Shard, check_settings, key_of, read_records
from captum_fusion.benchmark._report import report
from captum_fusion.metrics import (
    confidence_drop,
    confidence_increase,
    deletion,
    energy_pointing_game,
    insertion,
    pointing_game,
    saliency_map,
)

Target = Literal["predicted", "label"]
Precision = Literal["float32", "bfloat16", "float16"]
METRICS = ("confidence_drop", "confidence_increase", "insertion", "deletion", "pointing_game", "energy_pointing_game")
_STAGES = ("gradient", "denoised", "region", "combined")
# Large enough to tell maps apart in the report, small enough for a million records.
_THUMBNAIL = (28, 28)


def run(
    images: str | Path,
    output: str | Path,
    models: Sequence[str] = ("efficientnet-lite0",),
    layers: Sequence[str] = (),
    weights: Sequence[str] = (),
    labels: str | Path | None = None,
    methods: Sequence[str] = ("grad-cam", "score-cam", "fusion-cam"),
    metrics: Sequence[str] = METRICS[:4],
    percentiles: Sequence[float] = (10.0,),
    stages: bool = False,
    target: Target = "predicted",
    limit: int | None = None,
    seed: int | None = None,
    steps: int = 100,
    device: str | None = None,
    precision: Precision = "float32",
    batch_size: int = 1,
    strict: bool = False,
    show_progress: bool = False,
) -> Path:
    """Explains pictures with many methods, judges each explanation, and writes a report.

    Each finished explanation is appended to the output folder as one record. A run that was stopped goes on where it
    was when it is started again with the same arguments. Under torchrun, the processes share the pictures, and the
    first one writes the report.

    Args:
        images (str or Path): A folder of pictures, a folder with a folder of pictures for each class, or
            "imagenet:ROOT", "voc2007:ROOT" or "voc2012:ROOT" for a torchvision dataset that is on disk.
        output (str or Path): The folder for records and report; made if it does not exist.
        models (list[str], optional): Classifiers, named as the command ``captum-fusion explain`` names them.
            Default: EfficientNet-Lite0
        layers (list[str], optional): The dotted name of a layer for each model, or one for all. Default: the last layer
            of each model whose output is a feature map
        weights (list[str], optional): For each model a file with a state dict or "none" for seeded random weights, or
            one for all. Default: the default weights of each model
        labels (str or Path, optional): A JSON file with the class index of each picture of a plain folder, by its name.
            Default: None
        methods (list[str], optional): Names of methods; "fusion(gradient,region)" fuses any two, and
            "fusion-cam:raw" chooses a weighting. Default: Grad-CAM, Score-CAM and Fusion-CAM
        metrics (list[str], optional): Functions of ``captum_fusion.metrics``. The pointing games need boxes.
            Default: the four that need none
        percentiles (list[float], optional): Percentiles of the denoising step, in [0, 100), for every method that has
            one. Default: 10
        stages (bool, optional): Whether to judge the stages of each fusion as well. Default: False
        target (str, optional): Which class is explained: the "predicted" one, or each "label" of the picture.
            Default: "predicted"
        limit (int, optional): How many pictures are taken. Default: None, which means all
        seed (int, optional): Takes a random choice of ``limit`` pictures instead of the first ones. Default: None
        steps (int, optional): Steps of insertion and deletion. Default: 100
        device (str, optional): Where to compute. Default: cuda if there is one, else cpu
        precision (str, optional): "float32", or "bfloat16" or "float16" for autocast. Default: "float32"
        batch_size (int, optional): Pictures that are explained together. Default: 1
        strict (bool, optional): Whether a picture that cannot be read, or a method that fails on it, stops the run.
            Default: False, which records the error and goes on
        show_progress (bool, optional): Whether to show progress with the running means. Default: False

    Returns:
        *Path* of the output folder.

    Raises:
        ValueError: If an argument names nothing, if there are no pictures or not the labels that are needed, or if the
            output folder holds records made with other settings.
        OSError: If a record cannot be written; all earlier ones are kept.
    """
    chosen = [parse_method(name) for name in methods]
    for name, given, known in (
        *(("metrics", metric, METRICS) for metric in metrics),
        ("target", target, get_args(Target)),
        ("precision", precision, get_args(Precision)),
    ):
        if given not in known:
            raise ValueError(f"{name} is {given!r}.{close_names(given, known)} Expected {', '.join(known)}")
    for percentile in percentiles:
        check_percentile(percentile)
    for name, number in (("limit", 1 if limit is None else limit), ("steps", steps), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} is {number}; expected at least 1")
    if not chosen or not metrics or not percentiles or not models:
        raise ValueError("Expected at least one of each: models, methods, metrics, percentiles")
    source = find_pictures(str(images), None if labels is None else Path(labels))
    order = list(range(len(source.pictures)))
    if seed is not None:
        order = sorted(torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))[:limit].tolist())
    order = order[:limit]
    if any(metric.endswith("pointing_game") for metric in metrics) and source.pictures[0].boxes is None:
        raise ValueError(
            f"The pointing games need boxes, which {images} has not; expected voc2007:ROOT or voc2012:ROOT"
        )

    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with _processes() as (rank, processes):
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if place.type == "cuda" and place.index is None:
            place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        plans = [
            _plan(name, layer, weight, place, [source.pictures[index] for index in order], target, source)
            for name, layer, weight in zip(
                models, _one_each(layers, models, "layers"), _one_each(weights, models, "weights"), strict=True
            )
        ]
        settings = {
            "images": _hash(
                f"{picture.name} {picture.file.stat().st_size}" for plan in plans for picture, _ in plan.work
            ),
            "models": {plan.classifier.name: [plan.layer, plan.weights_hash] for plan in plans},
            "methods": [method.name for method in chosen],
            "metrics": list(metrics),
            "percentiles": list(percentiles),
            "stages": stages,
            "target": target,
            "steps": steps,
            "device": place.type,
            "precision": precision,
            "batch_size": batch_size,
        }
        if rank == 0:
            check_settings(folder, settings)
        _wait(processes)
        if rank > 0:
            check_settings(folder, settings)
        done = read_records(folder)
        # No process writes before all have read what is done.
        _wait(processes)
        judge = _Judge(chosen, tuple(metrics), tuple(percentiles), stages, steps, precision, strict)
        shard = Shard(folder, rank)
        labels_of = judge.labels()
        total = sum(len(plan.work) for plan in plans)
        with Progress(total, labels_of, done.values()) if show_progress and rank == 0 else nullcontext() as progress:
            for plan in plans:
                batches = [plan.work[start : start + batch_size] for start in range(0, len(plan.work), batch_size)]
                mine = [
                    batch
                    for batch in batches[rank::processes]
                    if any(plan.key(*piece, label) not in done for piece in batch for label in labels_of)
                ]
                for batch, loaded in zip(mine, plan.load(mine), strict=True):
                    for records in judge.records(plan, batch, loaded, done):
                        fresh = [record for record in records if key_of(record) not in done]
                        shard.append(fresh)
                        if progress is not None:
                            progress.add(fresh)
        _wait(processes)
        if rank == 0:
            arguments = settings | {"images": str(images), "limit": limit, "seed": seed, "processes": processes}
            report(
                folder, environment=_environment(place) | {"arguments": arguments, "images_hash": settings["images"]}
            )
        _wait(processes)
    return folder


@dataclass
class _Plan:
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


@dataclass(frozen=True)
class _Judge:
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
        self, plan: _Plan, batch: list[tuple[Picture, int | None]], loaded: list[Tensor | str], done: dict[Any, Record]
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
        plan: _Plan,
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
        plan: _Plan,
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
        plan: _Plan,
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

    def _base(self, plan: _Plan, picture: Picture, requested: int | None, target: int | None, label: str) -> Record:
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


def _plan(
    name: str,
    layer: str | None,
    weights: str | None,
    place: torch.device,
    pictures: list[Picture],
    target: Target,
    source: Any,
) -> _Plan:
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
    weights_hash = _hash(
        f"{key} {hashlib.sha256(value.cpu().numpy().tobytes()).hexdigest()}" for key, value in state.items()
    )
    return _Plan(classifier, layer, place, work, boxes, weights_hash)


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


def _one_each(given: Sequence[str], models: Sequence[str], name: str) -> list[str | None]:
    if len(given) not in (0, 1, len(models)):
        raise ValueError(
            f"{len(given)} {name} were given for {len(models)} models; expected one for each, one, or none"
        )
    return [*given] * (len(models) if len(given) == 1 else 1) if given else [None] * len(models)


def _hash(lines: Any) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _synchronize(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


@contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """The rank of this process and the number of all, as torchrun tells them; one process without it."""
    started = "WORLD_SIZE" in os.environ and not distributed.is_initialized()
    if started:
        distributed.init_process_group("gloo")
    try:
        yield (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    finally:
        if started:
            distributed.destroy_process_group()


def _wait(processes: int) -> None:
    if processes > 1:
        distributed.barrier()


def _environment(place: torch.device) -> dict[str, Any]:
    packages = ("captum-fusion", "captum", "torch", "torchvision", "numpy")
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.machine()
    return {
        "device": f"{place.type} ({name})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }
