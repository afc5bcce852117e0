"""Runs a benchmark: explains images with many methods and evaluates the explanations."""

import os
import platform
import warnings
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from captum_fusion._app.console import Output
from captum_fusion._app.models.loading import find_device
from captum_fusion._app.settings import LOCALIZATION, Settings
from captum_fusion.benchmark._dataset import LabelledImage, Source
from captum_fusion.benchmark._distributed import ProcessGroup, process_group
from captum_fusion.benchmark._evaluation import Evaluator
from captum_fusion.benchmark._plan import Plan, check_records, make_plan
from captum_fusion.benchmark._progress import ProgressReport
from captum_fusion.benchmark._records import CURVES, Hashes, RecordWriter, hash_of, locked, read_records, repair
from captum_fusion.benchmark._report import FILES, write_report
from captum_fusion.benchmark._sources import find_source


class NothingExplainedError(RuntimeError):
    """Raised if no explanation could be computed; the records and the report hold the reasons."""


def run(settings: Settings, show_progress: bool = False) -> Path:
    """Explains images with many methods, evaluates each explanation, and writes a report.

    Each explanation is one record in the output folder. Another run with the same folder computes only missing records:
    it resumes an interrupted run, retries failures, and adds images, models, methods, percentiles or metrics. Settings
    that would change the meaning of existing records are refused. Under torchrun, the processes share the images, and
    rank 0 writes the report.

    Args:
        settings (Settings): The images, models, methods, metrics and the output folder.
        show_progress (bool, optional): Whether to show the progress on standard error, and the tables at the end.
            Default: False

    Returns:
        *Path* of the output folder. It holds the records, summary.csv, summary.md, pairs.csv, measures.png, curves.png,
        explanations.png, and run.json with the settings and versions. See ``report``.

    Raises:
        ValueError: If a name is unknown, if there are no images or required labels, if the output folder holds records
            with other settings, or if another run writes to it.
        OSError: If a record cannot be written; all earlier records are kept.
        NothingExplainedError: If nothing could be explained.

    Examples::

        >>> settings = Settings(images="pictures", output="results", methods=["grad-cam", "fusion-cam"])
        >>> run(settings)  # doctest: +SKIP
    """
    settings.check()
    settings = settings.resolved()
    folder = Path(settings.output)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output is {folder}, a file; expected a folder")
    source = find_source(str(settings.images), None if settings.labels is None else Path(settings.labels), folder)
    images = chosen(settings, source)
    if settings.localized and source.images[0].instances is None:
        raise ValueError(
            f"The pointing games and instances_reached need boxes or outlines of objects, which {settings.images} does "
            "not have; expected voc2007:ROOT, voc2012:ROOT or coco:FILE"
        )
    masks = [metric for metric in settings.metrics if LOCALIZATION.get(metric) == "mask"]
    if masks and not any(each.outline for image in images for each in image.instances or ()):
        raise ValueError(
            f"{masks[0]} needs outlines of objects, which {settings.images} does not have; expected coco:FILE with a "
            "segmentation of each object"
        )
    device = find_device(settings.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    # Whatever is wrong with a model is found before there is an output folder.
    plans = [make_plan(settings, source, images, device, arguments) for arguments in settings.each()]
    with ExitStack() as stack:
        group = stack.enter_context(process_group())
        hashes = group.broadcast_from_rank0(partial(_enter, folder, images, stack))
        plans = [
            replace(plan, items=[replace(item, image_hash=hashes[item.image.name]) for item in plan.items])
            for plan in plans
        ]
        # The maps and curves of a large run fill the memory, and only the report needs them.
        done: Any = {
            key: {name: value for name, value in record.items() if name not in ("map", *CURVES)}
            for key, record in read_records(folder).items()
        }
        check_records(folder, settings, plans, done)
        evaluator = Evaluator(settings, done)
        for plan in plans:
            evaluator.check_unchanged(plan)
        writer = RecordWriter(folder, group.rank)
        # No process writes before all have read the records.
        group.wait()
        progress = None
        if show_progress and group.rank == 0:
            missing = [list(plan.keys(item, evaluator.pending(plan, item))) for plan in plans for item in plan.items]
            pending = {keys[0].item: set(keys) for keys in missing if keys}
            progress = stack.enter_context(
                ProgressReport(folder, len(missing), pending, done, settings.metrics, writer.file)
            )
        try:
            for plan in plans:
                _work(plan, evaluator, writer, group, progress)
        except KeyboardInterrupt:
            warnings.warn(f"Interrupted; {folder} keeps the finished records: run again to resume", stacklevel=2)
            raise
        group.wait()
        if group.rank > 0:
            return folder
        notes = list(dict.fromkeys([*source.notes, *(note for plan in plans for note in plan.notes)]))
        report = write_report(folder, {**_environment(settings, plans), "notes": notes})
    if show_progress:
        report.show(Output())
    if not report.explained:
        raise NothingExplainedError(f"Nothing could be explained: {report.reasons()}. See {folder / 'summary.md'}")
    return folder


def chosen(settings: Settings, source: Source) -> list[LabelledImage]:
    """The images that the limit and the seed choose, in order."""
    order = list(range(len(source.images)))
    if settings.seed is not None:
        generator = torch.Generator().manual_seed(settings.seed)
        order = sorted(torch.randperm(len(order), generator=generator)[: settings.limit].tolist())
    return [source.images[index] for index in order[: settings.limit]]


def _enter(folder: Path, images: list[LabelledImage], stack: ExitStack) -> dict[str, str]:
    """Locks and repairs the output folder, and returns the hash of each image, by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder, but the report writes a file of this name; remove it")
    stack.enter_context(locked(folder))
    repair(folder)
    cache = Hashes(folder)
    hashes = {image.name: cache.of(image.file) for image in images}
    cache.save()
    return hashes


def _work(
    plan: Plan, evaluator: Evaluator, writer: RecordWriter, group: ProcessGroup, progress: ProgressReport | None
) -> None:
    """Computes this process's share of the missing records."""
    size = evaluator.settings.batch_size
    items = [item for item in plan.items if evaluator.pending(plan, item)]
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    share = batches[group.rank :: group.size]
    for batch, loaded in zip(share, plan.load(share), strict=True):
        for records in evaluator.records(plan, batch, loaded):
            writer.append(records)
            if progress:
                progress.add(records)


def _environment(settings: Settings, plans: list[Plan]) -> dict[str, Any]:
    packages = ("captum-fusion", "captum", "torch", "torchvision", "numpy")
    device = plans[0].device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "arguments": {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()
        },
        "layers": [plan.layer.name for plan in plans],
        "images_hash": hash_of(os.fsencode(f"{item.image.name} {item.image_hash}") for item in plans[0].items),
    }
