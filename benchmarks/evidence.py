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
from benchmarks.evidence_report import GROUPS, write
from benchmarks.evidence_variants import VARIANTS, measure
from captum_fusion._files import write_whole
from captum_fusion._models import load_classifier
from captum_fusion.benchmark import Settings, run
from captum_fusion.benchmark._images import find_pictures
from captum_fusion.benchmark._plan import variants_of
from captum_fusion.benchmark._records import read_records

LITE = "efficientnet-lite0"
FAITHFUL = ("confidence_drop", "confidence_increase", "insertion", "deletion", "complexity")
PLACED = ("pointing_game", "energy_pointing_game", "mask_pointing_game", "mask_energy_pointing_game")
# The methods of the paper's comparison and the controls, and what else is of the family.
COMPARED = (
    "grad-cam",
    "score-cam",
    "union-cam",
    "fusion-cam",
    "random-map",
    "centred-gaussian",
    "grad-cam++",
    "group-cam",
)
FAMILY = ("x-grad-cam", "layer-cam", "hi-res-cam", "grad-cam-element-wise", "eigen-cam", "eigen-grad-cam", "finer-cam")
# The rows that a method has scored for one picture, beside Score-CAM's live channels, which fusions share; the passes
# of Integrated Gradients with their backward passes.
ROWS = {"group-cam": 33, "union-cam": 3, "fusion-cam": 4, "integrated-gradients": 150}
LIVE = 650
# Rows of Score-CAM at a tolerance of 0.05, as a share.
SHARE = 1 / 8


@dataclass(frozen=True)
class Run:
    """One call of the benchmark: which pictures it needs, and what it is asked."""

    name: str
    needs: str
    asked: dict[str, Any] = field(default_factory=dict)

    def settings(self, images: str, output: Path, leaves: Path | None) -> Settings:
        """What the benchmark is asked."""
        asked = {"metrics": FAITHFUL, "steps": 10, "batch_size": 13, "compile": True} | self.asked
        if self.needs == "leaves":
            assert leaves is not None
            file = leaves / f"{asked['models'][0].rpartition(':')[2]}.pt"
            asked |= {"weights": [str(file)], "labels_by_order": True}
        return Settings(images=images, output=output / self.name, **asked)


# A seeded choice of half of the photographs, for what takes long or decides little.
HALF = {"limit": 50, "seed": 0}
NEAR = {"tolerance": 0.05}
RUNS = (
    Run("imagenet", "imagenet", {"methods": (*COMPARED, "fusion-cam:raw", "fusion-cam:released"), "stages": True}),
    Run("tolerance", "imagenet", HALF | NEAR | {"methods": ("score-cam", "union-cam", "fusion-cam")}),
    Run("percentiles", "imagenet", HALF | {"methods": ("fusion-cam",), "percentiles": (0, 5, 10, 15, 20, 30, 50)}),
    Run("adcc", "imagenet", HALF | NEAR | {"methods": COMPARED, "metrics": ("adcc",)}),
    Run("family", "imagenet", HALF | {"methods": (*FAMILY, "guided-grad-cam", "integrated-gradients")}),
    Run(
        "coco",
        "coco",
        NEAR
        | {"metrics": (*FAITHFUL, *PLACED, "instances_reached"), "target": "best-label"}
        | {"methods": COMPARED, "stages": True},
    ),
    *(
        Run(f"lite{number}", "imagenet", NEAR | {"models": [f"efficientnet-lite{number}"], "methods": COMPARED})
        for number in (1, 2)
    ),
    *(
        Run(
            f"leaves-{model.rpartition(':')[2]}",
            "leaves",
            NEAR | {"models": [model], "methods": COMPARED, "stages": True},
        )
        for model in (LITE, "resnet18", "mobilenet_v2", "benchmarks.leaves:vgg")
    ),
)


def rows(settings: Settings) -> int:
    """About how many rows a run still has to score, for all pictures."""
    if not Path(settings.output).is_dir():
        done = {}
    else:
        done = {key: record for key, record in read_records(Path(settings.output)).items() if "error" not in record}
    curves = len({"insertion", "deletion"} & set(settings.metrics))
    judged = 1 + curves * (settings.steps + 1)
    live = LIVE * (SHARE if settings.tolerance else 1)
    pictures = [picture.name for picture in find_pictures(str(settings.images)).pictures][: settings.limit]
    total = 0.0
    missing = 0
    seen: dict[str, set[tuple[Any, ...]]] = {}
    for key in done:
        seen.setdefault(key.image, set()).add((key.method, key.percentile, key.stage))
    for picture in pictures:
        score_cam = False
        for variant in variants_of(settings):
            name = variant.method.name.partition(":")[0]
            if all((variant.method.name, variant.percentile, part) in seen.get(picture, ()) for part in variant.parts):
                continue
            missing += 1
            again = live if "adcc" in settings.metrics and name in ("score-cam", "union-cam", "fusion-cam") else 0
            # The gradient and the region map are judged where they are methods of their own.
            total += ROWS.get(name, 1) + again + judged * max(1, len(variant.parts) - 2)
            score_cam |= name in ("score-cam", "union-cam", "fusion-cam")
        total += live * score_cam
    return round(total)


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
    parser.add_argument("--only", nargs="+", choices=sorted({each.name for each in RUNS}))
    parser.add_argument("--dry-run", action="store_true", help="tell how long it takes, and no more")
    given = parser.parse_args(arguments)
    images = {
        "imagenet": str(given.imagenet) if given.imagenet else None,
        "coco": f"coco:{convert(given.coco, given.output / 'pictures')}" if given.coco else None,
        "leaves": str(given.leaves / "test") if given.leaves else None,
    }
    asked = [
        each.settings(str(images[each.needs]), given.output, given.leaves)
        for each in RUNS
        if images[each.needs] and each.name in (given.only or [each.name])
    ]
    if not asked:
        parser.error("there is nothing to run; give --imagenet, --coco or --leaves")
    total = 0.0
    for settings in asked:
        ((model, weights, _),) = settings.subjects()
        left = rows(settings)
        speed = rows_per_second(model, weights)
        total += left / speed
        name = Path(settings.output).name
        sys.stdout.write(f"{name}: {left} rows, {timedelta(seconds=round(left / speed))} at {speed:.0f} rows/s\n")
    sys.stdout.write(f"In all {timedelta(seconds=round(total))}, less where compiling pays\n")
    if given.dry_run:
        return 0
    if given.leaves:
        write_whole(given.output / GROUPS, json.dumps(leaf_groups(given.leaves)))
    for settings in asked:
        run(settings, show_progress=sys.stdout.isatty())
    if given.imagenet and not given.only:
        measure(str(given.imagenet), given.output / VARIANTS)
    write(given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
