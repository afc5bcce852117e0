"""Measures the claims of the Fusion-CAM paper: pictures of three kinds, trained networks, methods, controls.

Each run is one call of the benchmark; a run that was interrupted goes on where it was, and one that is done takes
seconds. Before anything runs, the rows that each run still has to score are counted, the networks' speed is measured,
and the time is told. Then benchmarks/results/evidence/ is written anew. From the root of the checkout:

    python -m benchmarks.evidence OUTPUT --imagenet FOLDER --coco FOLDER --leaves FOLDER

OUTPUT takes the records. --imagenet is a folder of photographs, --coco one of COCO128 as benchmarks/evidence_coco.py
reads it, --leaves what benchmarks/leaves.py wrote. What is not given is left out, and so is what --only does not name.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence_coco import convert
from benchmarks.evidence_report import RESULTS, write
from benchmarks.evidence_runs import GROUPS, PERCENTILES
from benchmarks.evidence_variants import STEPS, VARIANTS, measure, missing
from captum_fusion._app.models.loading import load_classifier
from captum_fusion._app.output_files import write_whole
from captum_fusion.benchmark import Settings, run
from captum_fusion.benchmark._plan import variants_of
from captum_fusion.benchmark._records import read_records
from captum_fusion.benchmark._run import chosen
from captum_fusion.benchmark._sources import find_pictures

LITE = "efficientnet-lite0"
FAITHFUL = ("confidence_drop", "confidence_increase", "insertion", "deletion", "complexity")
# Without curves, in a tenth of the passes.
MASKED = ("confidence_drop", "confidence_increase", "complexity")
PLACED = ("pointing_game", "energy_pointing_game", "mask_pointing_game", "mask_energy_pointing_game")
# The methods of the paper's comparison and the controls, and what else is of the family.
CORE = ("grad-cam", "score-cam", "union-cam", "fusion-cam")
COMPARED = (*CORE, "random-map", "centred-gaussian", "grad-cam++", "group-cam")
FAMILY = (
    "x-grad-cam",
    "layer-cam",
    "hi-res-cam",
    "grad-cam-element-wise",
    "eigen-cam",
    "eigen-grad-cam",
    "finer-cam",
    "guided-grad-cam",
)
# The rows that a method has scored for one picture, beside Score-CAM's live channels, which fusions share; the passes
# of Integrated Gradients with their backward passes.
LIVE = 650
# Rows of Score-CAM within a tolerance, as a share.
SHARE = 1 / 8
ROWS = {
    "group-cam": 33,
    "union-cam": 3,
    "fusion-cam": 4,
    "integrated-gradients": 150,
    "ablation-cam": LIVE,
    "is-cam": 10 * LIVE * SHARE,
}


@dataclass(frozen=True)
class Run:
    """One call of the benchmark: which pictures it needs, and what it is asked."""

    name: str
    needs: str
    asked: dict[str, Any] = field(default_factory=dict)

    def settings(self, images: str, output: Path, leaves: Path | None, limit: int | None) -> Settings:
        """What the benchmark is asked."""
        asked: dict[str, Any] = {"metrics": FAITHFUL, "steps": 10, "batch_size": 13, "compile": True} | self.asked
        if limit is not None:
            asked["limit"] = min(limit, asked.get("limit", limit))
        if self.needs == "leaves":
            assert leaves is not None
            file = leaves / f"{asked['models'][0].rpartition(':')[2]}.pt"
            asked |= {"weights": [str(file)], "labels_by_order": True}
        return Settings(images=images, output=output / self.name, **asked)


# Seeded choices of the photographs, for what takes long or decides little.
HALF = {"limit": 50, "seed": 0}
QUARTER = {"limit": 25, "seed": 0}
EIGHTH = {"limit": 13, "seed": 0}
FEW = {"limit": 8, "seed": 0}
NEAR = {"tolerance": 0.05}
RUNS = (
    Run("imagenet", "imagenet", {"methods": COMPARED, "stages": True}),
    Run("imagenet", "imagenet", {"methods": ("fusion-cam:raw", "fusion-cam:released")}),
    Run("tolerance", "imagenet", HALF | NEAR | {"methods": ("score-cam", "fusion-cam")}),
    Run(
        "percentiles",
        "imagenet",
        HALF | {"methods": ("fusion-cam",), "percentiles": PERCENTILES, "metrics": MASKED},
    ),
    Run("family", "imagenet", HALF | {"methods": FAMILY}),
    Run("dear", "imagenet", FEW | {"methods": ("ablation-cam", "integrated-gradients")}),
    Run("adcc", "imagenet", EIGHTH | NEAR | {"methods": (*CORE, "centred-gaussian"), "metrics": ("adcc",)}),
    Run(
        "coco",
        "coco",
        NEAR
        | {"metrics": (*FAITHFUL, *PLACED, "instances_reached"), "target": "best-label"}
        | {"methods": COMPARED, "stages": True},
    ),
    *(
        Run(
            f"lite{number}",
            "imagenet",
            QUARTER
            | NEAR
            | {"models": [f"efficientnet-lite{number}"], "metrics": MASKED}
            | {"methods": (*CORE, "grad-cam++", "group-cam")},
        )
        for number in (1, 2)
    ),
    *(
        Run(
            f"leaves-{model.rpartition(':')[2]}",
            "leaves",
            NEAR | {"models": [model], "methods": COMPARED, "stages": True, "metrics": MASKED},
        )
        for model in ("benchmarks.leaves:vgg", "benchmarks.leaves:resnet", "mobilenet_v2", LITE)
    ),
)


def rows(settings: Settings) -> int:
    """About how many rows a run still has to score, for all pictures."""
    folder = Path(settings.output)
    records = read_records(folder) if folder.is_dir() else {}
    curves = len({"insertion", "deletion"} & set(settings.metrics))
    judged = 1 + curves * (settings.steps + 1)
    live = LIVE * (SHARE if settings.tolerance else 1)
    total = 0.0
    seen: dict[str, set[tuple[Any, ...]]] = {}
    for key, record in records.items():
        if "error" not in record:
            seen.setdefault(key.image, set()).add((key.method, key.percentile, key.stage))
    pictures = [picture.name for picture in chosen(settings, find_pictures(str(settings.images)))]
    if settings.target == "best-label" and (folder / "run.json").exists():
        # A finished run has passed over the pictures without an object that the network knows.
        pictures = [picture for picture in pictures if picture in seen]
    for picture in pictures:
        score_cam = False
        for variant in variants_of(settings):
            name = variant.method.name.partition(":")[0]
            if all((variant.method.name, variant.percentile, part) in seen.get(picture, ()) for part in variant.parts):
                continue
            again = live if "adcc" in settings.metrics and name in ("score-cam", "union-cam", "fusion-cam") else 0
            # The gradient and the region map are judged where they are methods of their own.
            total += ROWS.get(name, 1) + again + judged * max(1, len(variant.parts) - 2)
            score_cam |= name in ("score-cam", "union-cam", "fusion-cam")
        total += live * score_cam
    return round(total)


def variant_rows(images: str, file: Path, limit: int | None) -> int:
    """About how many rows the variants still have to score."""
    # Score-CAM and the contributions of three fusions, and what judges each map, two of them without curves.
    left = [len(names) for _, names in missing(images, file, limit)]
    return round(len(left) * (LIVE * SHARE + 12) + sum(left) * (1 + 2 * (STEPS + 1)))


@cache
def rows_per_second(model: str, weights: str | None) -> float:
    """How many rows a network scores in a second, not compiled."""
    classifier = load_classifier(model, weights)
    size = classifier.preprocessing.size
    inputs = torch.rand(8, 3, size, size).to(memory_format=torch.channels_last)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        classifier.scores(inputs)
        seconds.append(time.perf_counter() - start)
    return len(inputs) / min(seconds)


def leaf_groups(folder: Path) -> dict[str, str]:
    """For each test photograph the parts of one leaf that it belongs to."""
    photographs = json.loads((folder / "split.json").read_text(encoding="utf-8"))["photographs"]
    return {
        f"{each['disease']}/{each['photograph']}": f"{each['disease']} {each['group']}"
        for each in photographs
        if each["part"] == "test"
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    for name in ("imagenet", "coco", "leaves"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--only", nargs="+", choices=sorted({each.name for each in RUNS} | {"variants"}))
    parser.add_argument("--limit", type=int, help="of each run, at most so many pictures")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the page goes. Default: the committed one")
    parser.add_argument("--dry-run", action="store_true", help="tell how long it takes, and no more")
    given = parser.parse_args(arguments)
    images = {
        "imagenet": str(given.imagenet) if given.imagenet else None,
        "coco": f"coco:{convert(given.coco, given.output / 'pictures')}" if given.coco else None,
        "leaves": str(given.leaves / "test") if given.leaves else None,
    }
    asked = [
        each.settings(str(images[each.needs]), given.output, given.leaves, given.limit)
        for each in RUNS
        if images[each.needs] and each.name in (given.only or [each.name])
    ]
    with_variants = given.imagenet and (not given.only or "variants" in given.only)
    if not asked and not with_variants:
        parser.error("there is nothing to run; give --imagenet, --coco or --leaves")
    left = [(Path(settings.output).name, rows(settings), settings.subjects()[0][:2]) for settings in asked]
    if with_variants:
        left.append(("variants", variant_rows(str(given.imagenet), given.output / VARIANTS, given.limit), (LITE, None)))
    total = 0.0
    for name, count, subject in left:
        speed = rows_per_second(*subject)
        total += count / speed
        sys.stdout.write(f"{name}: {count} rows, {timedelta(seconds=round(count / speed))} at {speed:.0f} rows/s\n")
    sys.stdout.write(f"In all {timedelta(seconds=round(total))}, less where compiling pays\n")
    if given.dry_run:
        return 0
    if given.leaves:
        write_whole(given.output / GROUPS, json.dumps(leaf_groups(given.leaves)))
    for settings in asked:
        run(settings, show_progress=sys.stdout.isatty())
    if with_variants:
        measure(str(given.imagenet), given.output / VARIANTS, given.limit)
    write(given.output, given.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
