r"""Measures the claims of the Fusion-CAM paper on four collections of pictures, and against a known truth.

Each run is one call of the benchmark, which resumes where it was interrupted; a finished run takes seconds. Then the
page in benchmarks/results/evidence/ is written. From the root of the checkout:

    python -m benchmarks.evidence OUTPUT --ilsvrc FOLDER --voc2012 FOLDER --coco128 FOLDER --leaves FOLDER \
        --weights FOLDER

OUTPUT takes the records. benchmarks/evidence_pictures.py says what the first three folders hold, --leaves is the output
of benchmarks/leaves.py, and --weights holds the state dicts of benchmarks/networks.py: without it MobileNetV2 and
SqueezeNet are left out. A collection without a folder is left out, and so are runs that --only does not name. Without
any folder, only the truth of generated pictures is measured, in ten minutes.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision.models import get_model

from benchmarks import truth
from benchmarks.evidence_page import HERE, write
from benchmarks.evidence_pictures import COLLECTIONS, convert
from benchmarks.evidence_statistics import COMPETITORS, CONTROLS, OURS, PERCENTILES
from benchmarks.networks import lite
from captum_fusion.benchmark import Settings, run

LITE = "efficientnet-lite0"
NETWORKS = {"mobilenet_v2": "mobilenet_v2.pt", "squeezenet": "squeezenet1_0.pt"}
LEAVES = {
    "vgg": "benchmarks.leaves:vgg",
    "resnet": "benchmarks.leaves:resnet",
    "mobilenet_v2": "mobilenet_v2",
    LITE: LITE,
    "vgg16": "benchmarks.networks:vgg16",
}
FAITHFUL = ("confidence_drop", "confidence_increase", "insertion", "deletion", "complexity")
# Without curves, in a tenth of the passes.
MASKED = ("confidence_drop", "confidence_increase", "complexity")
BOXES = ("pointing_game", "energy_pointing_game")
OUTLINES = ("mask_pointing_game", "mask_energy_pointing_game", "instances_reached")
COMPARED = (*COMPETITORS, OURS, *CONTROLS)
FAMILY = (
    *("x-grad-cam", "layer-cam", "hi-res-cam", "grad-cam-element-wise", "eigen-cam", "eigen-grad-cam", "finer-cam"),
    *("seg-eigen-cam", "kpca-cam", "fem", "shapley-cam", "full-grad", "winsor-cam"),
)
COSTLY = ("ablation-cam", "is-cam", "ss-cam", "rise")
OTHER_WEIGHTINGS = ("fusion-cam:normalized", "fusion-cam:released")
NEAR = {"tolerance": 0.05}
# About the masked passes of a map; LIVE are those of Score-CAM, whose channels the fusions share.
LIVE = 650
ROWS = {
    "group-cam": 33,
    "ablation-cam": LIVE,
    "is-cam": 10 * LIVE,
    "ss-cam": 35 * LIVE,
    "rise": 4000,
    "score-cam": LIVE,
}


class Run(NamedTuple):
    """A call of the benchmark: its name, the folder that it needs, its network, and the other settings."""

    name: str
    collection: str
    model: str
    weights: str | None
    settings: dict[str, Any]


def runs(folders: dict[str, Path], weights: Path | None) -> Iterator[Run]:
    """Lists the runs of the collections that have a folder."""
    compared: dict[str, Any] = NEAR | {"methods": COMPARED, "stages": True, "metrics": (*FAITHFUL, *BOXES)}
    if "ilsvrc" in folders:
        chosen = {"limit": 200, "seed": 0}
        yield Run("ilsvrc-lite0", "ilsvrc", LITE, None, compared | chosen)
        if weights is not None:
            for name, file in NETWORKS.items():
                model, state = f"benchmarks.networks:{name}", str(weights / file)
                yield Run(f"ilsvrc-{name}", "ilsvrc", model, state, compared | chosen)
        fewer = {"limit": 50, "seed": 0}
        fusions = {"methods": (OURS,), "percentiles": PERCENTILES, "metrics": MASKED}
        yield Run("percentiles", "ilsvrc", LITE, None, NEAR | fewer | fusions)
        yield Run("exact", "ilsvrc", LITE, None, fewer | {"methods": ("score-cam", OURS), "metrics": FAITHFUL})
        everything = {"methods": (*COMPARED, *FAMILY, *COSTLY, *OTHER_WEIGHTINGS), "metrics": (*FAITHFUL, "adcc")}
        yield Run("family", "ilsvrc", LITE, None, NEAR | {"limit": 25, "seed": 0} | everything)
    objects = {"target": "best-label"}
    if "voc2012" in folders:
        yield Run("voc2012-lite0", "voc2012", LITE, None, compared | objects)
    if "coco128" in folders:
        metrics = {"metrics": (*FAITHFUL, *BOXES, *OUTLINES)}
        yield Run("coco128-lite0", "coco128", LITE, None, compared | objects | metrics)
    if "leaves" in folders:
        for name, model in LEAVES.items():
            trained = folders["leaves"] / f"{name}.pt"
            if trained.exists():
                settings = compared | {"metrics": MASKED, "labels_by_order": True}
                yield Run(f"leaves-{name}", "leaves", model, str(trained), settings)


def settings_of(each: Run, images: str, output: Path, limit: int | None, device: str | None = None) -> Settings:
    """Builds the settings of a run."""
    # Compilation pays for many pictures on a CPU.
    compiles = limit is None and device in (None, "cpu")
    settings: dict[str, Any] = {"steps": 10, "batch_size": 13, "compile": compiles, "device": device} | each.settings
    if limit is not None:
        settings["limit"] = min(limit, settings.get("limit", limit))
    if each.weights is not None:
        settings["weights"] = [each.weights]
    return Settings(images=images, output=output / each.name, models=[each.model], **settings)


def pending_rows(settings: Settings, pictures: int) -> int:
    """Estimates the rows that a run still has to score."""
    files, pictures = Path(settings.output).glob("records-*.jsonl"), min(pictures, settings.limit or pictures)
    lines = [json.loads(line) for file in files for line in file.open("rb")]
    done = {(line["image"], line["method"], line["percentile"], line["stage"]) for line in lines if "error" not in line}
    share = 1 / 8 if settings.tolerance else 1.0
    judged = 1 + (settings.steps + 1) * len({"insertion", "deletion"} & set(settings.metrics))
    # ADCC explains once more.
    rows, repeats = 0.0, 2 if "adcc" in settings.metrics else 1
    for method in settings.methods:
        fusion = method.startswith("fusion-cam")
        variants = len(settings.percentiles) if fusion else 1
        stages = 3 if fusion and settings.stages else 1
        left = pictures - len({image for image, name, _, stage in done if name == method and stage is None})
        tolerated = share if method in ("score-cam", "is-cam", "ss-cam") else 1.0
        rows += left * variants * (ROWS.get(method, 4) * tolerated * repeats + judged * stages)
    return round(max(0.0, rows))


@cache
def rows_per_second(model: str) -> float:
    """Measures how many rows a network scores in a second, not compiled."""
    module, _, name = model.rpartition(":")
    network: nn.Module = (
        getattr(import_module(module), name)() if module else lite() if name == LITE else get_model(name)
    )
    inputs = torch.rand(8, 3, 224, 224).to(memory_format=torch.channels_last)
    seconds = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            network.eval()(inputs)
            seconds.append(time.perf_counter() - start)
    return len(inputs) / min(seconds)


def leaf_groups(folder: Path) -> dict[str, str]:
    """Reads for each test photograph the leaf that it shows a part of."""
    photographs = json.loads((folder / "split.json").read_text(encoding="utf-8"))["photographs"]
    tested = [each for each in photographs if each["part"] == "test"]
    return {f"{each['disease']}/{each['photograph']}": f"{each['disease']} {each['group']}" for each in tested}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    for name in (*COLLECTIONS, "leaves", "weights"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--only", nargs="+", help="names of runs, as --dry-run lists them")
    parser.add_argument("--device", help="the device to compute on, as for the command")
    parser.add_argument("--limit", type=int, help="at most so many pictures a run")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "evidence", help="where the page goes")
    parser.add_argument("--dry-run", action="store_true", help="print the estimated time and stop")
    given = parser.parse_args(arguments)
    folders = {name: folder for name in (*COLLECTIONS, "leaves") if (folder := getattr(given, name)) is not None}
    images, counts = {}, {}
    for name, folder in folders.items():
        if name == "leaves":
            images[name], counts[name] = str(folder / "test"), len(leaf_groups(folder))
        else:
            file = convert(name, folder, given.output / "pictures")
            images[name], counts[name] = f"coco:{file}", len(json.loads(file.read_text())["images"])
    planned = [each for each in runs(folders, given.weights) if each.name in (given.only or [each.name])]
    total = 0.0
    for each in planned:
        settings = settings_of(each, images[each.collection], given.output, given.limit, given.device)
        rows, speed = pending_rows(settings, counts[each.collection]), rows_per_second(each.model)
        total += rows / speed
        sys.stdout.write(f"{each.name}: {rows} rows, {timedelta(seconds=round(rows / speed))} at {speed:.0f} rows/s\n")
    sys.stdout.write(f"In all about {timedelta(seconds=round(total))}, less where compilation pays\n")
    if given.dry_run:
        return 0
    if not given.only or "truth" in given.only:
        truth.main([str(given.output / "truth"), "--results", str(given.results.parent)])
    if not planned:
        return 0
    if "leaves" in folders:
        (given.output / "groups.json").write_text(json.dumps(leaf_groups(folders["leaves"])))
    for each in planned:
        run(
            settings_of(each, images[each.collection], given.output, given.limit, given.device),
            show_progress=sys.stdout.isatty(),
        )
    write(given.output, given.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
