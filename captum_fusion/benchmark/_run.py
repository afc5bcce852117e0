"""Explains many pictures and judges the explanations."""

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from torch import distributed

from captum_fusion._checks import check_percentile
from captum_fusion._methods import METRICS, Precision, Target, parse_method
from captum_fusion._names import close_names
from captum_fusion.benchmark._images import find_pictures
from captum_fusion.benchmark._judge import Judge, hash_of, make_plan
from captum_fusion.benchmark._progress import Progress
from captum_fusion.benchmark._records import Shard, check_settings, key_of, read_records
from captum_fusion.benchmark._report import report


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
            make_plan(name, layer, weight, place, [source.pictures[index] for index in order], target, source)
            for name, layer, weight in zip(
                models, _one_each(layers, models, "layers"), _one_each(weights, models, "weights"), strict=True
            )
        ]
        settings = {
            "images": hash_of(
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
        judge = Judge(chosen, tuple(metrics), tuple(percentiles), stages, steps, precision, strict)
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


def _one_each(given: Sequence[str], models: Sequence[str], name: str) -> list[str | None]:
    if len(given) not in (0, 1, len(models)):
        raise ValueError(
            f"{len(given)} {name} were given for {len(models)} models; expected one for each, one, or none"
        )
    return [*given] * (len(models) if len(given) == 1 else 1) if given else [None] * len(models)


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
