"""Explains many pictures and judges the explanations."""

import os
import platform
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from captum_fusion._app.console import Output
from captum_fusion._app.models.loading import find_device
from captum_fusion._app.options import LOCALIZATION
from captum_fusion._app.settings import Settings
from captum_fusion.benchmark._dataset import Picture, Source
from captum_fusion.benchmark._distributed import ProcessGroup, process_group
from captum_fusion.benchmark._evaluation import Evaluator
from captum_fusion.benchmark._plan import Plan, check_records, make_plans
from captum_fusion.benchmark._progress import Progress
from captum_fusion.benchmark._records import CURVES, Hashes, RecordWriter, hash_of, locked, read_records, repair
from captum_fusion.benchmark._report import FILES, write_report
from captum_fusion.benchmark._sources import find_pictures


class NothingExplainedError(RuntimeError):
    """Not one explanation could be made; the records and the report say why."""


def run(settings: Settings, show_progress: bool = False) -> Path:
    """Explains pictures with many methods, judges each explanation, and writes a report.

    Each finished explanation is appended to the output folder as one record. Run again with the same folder, it does
    what is missing: it goes on where it was stopped, tries again what failed, and adds pictures, models, methods,
    percentiles or metrics. What would change the meaning of records that are there is refused. Under torchrun, the
    processes share the pictures, and the first one writes the report.

    Args:
        settings (Settings): What is asked: pictures, models, methods, metrics and the output folder.
        show_progress (bool, optional): Whether to show progress with the running means, and the tables at the end.
            Default: False

    Returns:
        *Path* of the output folder.

    Raises:
        ValueError: If an argument names nothing, if there are no pictures or not the labels that are needed, if the
            output folder holds records made in another way, or if another run writes to it.
        OSError: If a record cannot be written; all earlier ones are kept.
        NothingExplainedError: If nothing could be explained; records and report are there and say why.

    Examples::

        >>> settings = Settings(images="pictures", output="results", methods=["grad-cam", "fusion-cam"])
        >>> run(settings)  # doctest: +SKIP
    """
    settings.check()
    folder = Path(settings.output)
    source = find_pictures(str(settings.images), None if settings.labels is None else Path(settings.labels), folder)
    pictures = chosen(settings, source)
    if any(metric in LOCALIZATION for metric in settings.metrics) and source.pictures[0].instances is None:
        raise ValueError(
            f"The pointing games and instances_reached need boxes or outlines of objects, which {settings.images} has "
            "not; expected voc2007:ROOT, voc2012:ROOT or coco:FILE"
        )
    device = find_device(settings.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    with ExitStack() as stack:
        group = stack.enter_context(process_group())
        hashes = group.broadcast_from_rank0(partial(_enter, folder, pictures, stack))
        plans = make_plans(settings, source, pictures, hashes.__getitem__, device)
        # The maps and curves of a large run fill the memory, and only the report needs them.
        bulky = {"map", *CURVES}
        done = {
            key: {name: value for name, value in record.items() if name not in bulky}
            for key, record in read_records(folder).items()
        }
        check_records(folder, settings, plans, done)
        evaluator = Evaluator(settings, done)
        writer = RecordWriter(folder, group.rank)
        # No process writes before all have read what is done.
        group.wait()
        progress: AbstractContextManager[Any] = nullcontext()
        if show_progress and group.rank == 0:
            total = sum(len(plan.items) for plan in plans)
            pending = {
                keys[0].item: set(keys)
                for plan in plans
                for item in plan.items
                if (keys := list(plan.keys(item, evaluator.pending(plan, item))))
            }
            progress = Progress(folder, total, pending, done)
        with progress:
            for plan in plans:
                _work(plan, evaluator, writer, group)
            group.wait()
        if group.rank > 0:
            return folder
        report = write_report(folder, environment=_environment(settings, plans))
    if show_progress:
        report.show(Output())
    if not report.explained:
        raise NothingExplainedError(f"Nothing could be explained: {report.reasons()}. See {folder / 'summary.md'}")
    return folder


def chosen(settings: Settings, source: Source) -> list[Picture]:
    """The pictures that are taken, in order."""
    order = list(range(len(source.pictures)))
    if settings.seed is not None:
        generator = torch.Generator().manual_seed(settings.seed)
        order = sorted(torch.randperm(len(order), generator=generator)[: settings.limit].tolist())
    return [source.pictures[index] for index in order[: settings.limit]]


def _enter(folder: Path, pictures: list[Picture], stack: ExitStack) -> dict[Path, str]:
    """Makes the output folder this run's own and puts it in order; returns the hashes of the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder; the report is to be written there")
    stack.enter_context(locked(folder))
    repair(folder)
    hashes = Hashes(folder)
    found = {picture.file: hashes.of(picture.file) for picture in pictures}
    hashes.save()
    return found


def _work(plan: Plan, evaluator: Evaluator, writer: RecordWriter, group: ProcessGroup) -> None:
    """Does this process's share of what is missing."""
    size = evaluator.settings.batch_size
    items = [item for item in plan.items if evaluator.pending(plan, item)]
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    mine = batches[group.rank :: group.size]
    for batch, loaded in zip(mine, plan.load(mine), strict=True):
        for records in evaluator.records(plan, batch, loaded):
            writer.append(records)


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
        "images_hash": hash_of(f"{item.picture.name} {item.hash}".encode() for item in plans[0].items),
    }
