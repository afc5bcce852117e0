"""The records of the runs of the evidence, paired and compared, and the paper's claims as questions to them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.evidence_statistics import Difference, difference, holm, interval, verdict
from captum_fusion.benchmark._measures import MEASURES
from captum_fusion.benchmark._records import read_records
from captum_fusion.benchmark._report import _table

# Which pictures of the leaves show parts of one leaf: a name for each, by the picture's own.
GROUPS = "groups.json"
OURS = "fusion-cam"
COMPETITORS = ("grad-cam", "grad-cam++", "group-cam", "score-cam", "union-cam")
CONTROLS = ("random-map", "centred-gaussian")
FAITHFUL = ("average_drop", "average_increase", "insertion", "deletion", "overall", "complexity")
PLACED = ("pointing_game", "energy_pointing_game", "mask_pointing_game", "mask_energy_pointing_game")
PERCENTILES = (0, 5, 10, 15, 20, 30, 50)
# A stage and what it is made from: that it contributes means that it is better.
STEPS = (
    ("denoised", f"{OURS} denoised", f"{OURS} gradient"),
    ("combined", f"{OURS} combined", f"{OURS} region"),
    ("fused", OURS, f"{OURS} combined"),
    ("fused, against the region map alone", OURS, f"{OURS} region"),
)


class Setting(NamedTuple):
    """A run, and what it is called in the tables."""

    run: str
    shown: str


IMAGENET = Setting("imagenet", "Lite0 on ImageNet")
COCO = Setting("coco", "Lite0 on COCO")
SETTINGS = (
    IMAGENET,
    Setting("lite1", "Lite1 on ImageNet"),
    Setting("lite2", "Lite2 on ImageNet"),
    COCO,
    Setting("leaves-vgg", "VGG on leaves"),
    Setting("leaves-resnet", "ResNet on leaves"),
    Setting("leaves-mobilenet_v2", "MobileNetV2 on leaves"),
    Setting("leaves-efficientnet-lite0", "Lite0 on leaves"),
)


class Row(NamedTuple):
    """A claim in a setting: Fusion-CAM against others, differences positive where it is better."""

    claim: str
    setting: Setting
    measure: str
    mean: float
    low: float
    high: float
    found: dict[str, Difference]

    @property
    def verdict(self) -> str:
        """Whether it is better than all of them."""
        return verdict(list(self.found.values()))

    @property
    def closest(self) -> tuple[str, Difference]:
        """The comparison that it wins by least or loses by most."""
        return min(self.found.items(), key=lambda item: item[1].mean)


class Runs:
    """The records of the runs that there are."""

    def __init__(self, output: Path) -> None:
        folders = [folder for folder in sorted(output.iterdir()) if folder.is_dir()]
        self.tables = {folder.name: _table(records) for folder in folders if (records := read_records(folder))}
        self.made: dict[str, dict[str, Any]] = {
            folder.name: json.loads((folder / "run.json").read_text(encoding="utf-8"))
            for folder in folders
            if (folder / "run.json").exists()
        }
        groups = output / GROUPS
        # Photographs of parts of one leaf are no two pictures.
        self.groups: dict[str, str] = json.loads(groups.read_text(encoding="utf-8")) if groups.exists() else {}
        if "coco" in self.tables:
            several = self.tables["coco"]["instances"] > 1
            self.tables["coco-several"] = self.tables["coco"][several]
        if {"imagenet", "family"} <= self.tables.keys():
            family, imagenet = self.tables["family"], self.tables["imagenet"]
            same = imagenet[imagenet["image"].isin(family["image"]) & imagenet["stage"].isna()]
            near = self.tables.get("tolerance", pd.DataFrame({"label": []}))
            near = near.assign(label=near["label"].astype(str) + " within 0.05")
            self.tables["methods"] = pd.concat([same, family, near], ignore_index=True)

    def values(self, run: str, measure: str) -> pd.DataFrame:
        """A measure, in the unit in which it is reported, of each picture, a row, by each method, a column."""
        records, asked = self.tables.get(run), MEASURES[measure]
        if records is None or asked.column not in records:
            return pd.DataFrame()
        known = records.dropna(subset=[asked.column])
        table = known.pivot(index=["image", "requested"], columns="label", values=asked.column).astype(float)
        # A method's own map is that of the stage.
        stages = {"grad-cam": f"{OURS} gradient", "score-cam": f"{OURS} region"}
        table.columns = [str(column) for column in table.columns]
        for method, stage in stages.items():
            if stage in table:
                table[method] = table.get(method, table[stage]).fillna(table[stage])
        pictures = [self.groups.get(image, image) for image in table.index.get_level_values("image")]
        return table.groupby(pictures).mean() * asked.scale

    def compare(self, run: str, measure: str, first: str, others: Sequence[str]) -> dict[str, Difference]:
        """The differences of a method from others, corrected for their number; of those that there are."""
        values, higher = self.values(run, measure), MEASURES[measure].higher
        found = {}
        for other in others:
            if first in values and other in values and first != other:
                both = values[[first, other]].dropna()
                if len(both) > 1:
                    found[other] = difference(both[first].to_numpy(), both[other].to_numpy(), higher)
        return holm(found)

    def row(self, claim: str, setting: Setting, measure: str, others: Sequence[str], first: str = OURS) -> Row | None:
        """A claim in a setting, if it was measured."""
        found = self.compare(setting.run, measure, first, others)
        if not found:
            return None
        values = self.values(setting.run, measure)[first].dropna().to_numpy()
        return Row(claim, setting, measure, float(values.mean()), *interval(values), found)

    def claims(self) -> list[Row]:
        """The paper's claims in every setting that there is."""
        return [row for row in self._claims() if row is not None]

    def _claims(self) -> Iterator[Row | None]:
        for claim, measure in (
            ("lowest Average Drop", "average_drop"),
            ("highest Average Increase", "average_increase"),
            ("best overall of insertion and deletion", "overall"),
        ):
            for setting in SETTINGS:
                yield self.row(claim, setting, measure, COMPETITORS)
        for measure in PLACED:
            yield self.row("good localization", COCO, measure, COMPETITORS)
        several = Setting("coco-several", COCO.shown)
        yield self.row("reaches several instances", several, "instances_reached", COMPETITORS)
        for name, after, before in STEPS:
            for measure in ("average_drop", "overall"):
                for setting in SETTINGS:
                    yield self.row(f"every stage contributes: {name}", setting, measure, (before,), after)
        others = [f"{OURS} {percentile}%" for percentile in PERCENTILES if not 10 <= percentile <= 20]
        for best in (10, 20):
            claim = f"a percentile of 10 to 20 is best: {best}"
            yield self.row(claim, Setting("percentiles", IMAGENET.shown), "average_drop", others, f"{OURS} {best}%")
