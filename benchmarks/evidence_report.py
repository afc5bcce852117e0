"""The page of the evidence: the claims with their verdicts, tables, and pictures of differences with intervals."""

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.evidence_statistics import SIGNIFICANT, Difference, difference, holm, interval, verdict
from benchmarks.evidence_variants import NARROWER, PUBLISHED, REGION, VARIANTS, WIDER
from captum_fusion._files import write_whole
from captum_fusion._picture import rendered
from captum_fusion.benchmark._measures import MEASURES
from captum_fusion.benchmark._records import read_records
from captum_fusion.benchmark._report import _table

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "evidence"
# Which pictures of the leaves show parts of one leaf: a name for each, by the picture's own.
GROUPS = "groups.json"
OURS = "fusion-cam"
COMPETITORS = ("grad-cam", "grad-cam++", "group-cam", "score-cam", "union-cam")
CONTROLS = ("random-map", "centred-gaussian")
FAITHFUL = ("average_drop", "average_increase", "insertion", "deletion", "overall", "complexity")
PLACED = ("pointing_game", "energy_pointing_game", "mask_pointing_game", "mask_energy_pointing_game")
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


SETTINGS = (
    Setting("imagenet", "ImageNet, Lite0"),
    Setting("lite1", "ImageNet, Lite1"),
    Setting("lite2", "ImageNet, Lite2"),
    Setting("coco", "COCO, Lite0"),
    Setting("leaves-vgg", "leaves, VGG"),
    Setting("leaves-resnet18", "leaves, ResNet18"),
    Setting("leaves-mobilenet_v2", "leaves, MobileNetV2"),
    Setting("leaves-efficientnet-lite0", "leaves, Lite0"),
)


class Row(NamedTuple):
    """A claim in a setting: Fusion-CAM against others, differences positive where it is better."""

    claim: str
    setting: str
    run: str
    measure: str
    mean: float
    low: float
    high: float
    found: dict[str, Difference]

    @property
    def verdict(self) -> str:
        """Whether it is better than all of them."""
        return verdict(list(self.found.values()))


class Runs:
    """The records of the runs that there are."""

    def __init__(self, output: Path) -> None:
        self.tables = {
            folder.name: _table(records)
            for folder in sorted(output.iterdir())
            if folder.is_dir() and (records := read_records(folder))
        }
        groups = output / GROUPS
        # Photographs of parts of one leaf are no two pictures.
        self.groups: dict[str, str] = json.loads(groups.read_text(encoding="utf-8")) if groups.exists() else {}
        if "coco" in self.tables:
            several = self.tables["coco"]["instances"] > 1
            self.tables["coco-several"] = self.tables["coco"][several]

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
        return Row(claim, setting.shown, setting.run, measure, float(values.mean()), *interval(values), found)


def claims(runs: Runs) -> list[Row]:
    """The paper's claims in every setting that there is."""

    def rows() -> Iterator[Row | None]:
        for claim, measure in (
            ("lowest Average Drop", "average_drop"),
            ("highest Average Increase", "average_increase"),
            ("best overall of insertion and deletion", "overall"),
        ):
            for setting in SETTINGS:
                yield runs.row(claim, setting, measure, COMPETITORS)
        for measure in PLACED:
            yield runs.row("good localization", Setting("coco", "COCO, Lite0"), measure, COMPETITORS)
        yield runs.row(
            "reaches several instances", Setting("coco-several", "COCO, Lite0"), "instances_reached", COMPETITORS
        )
        for name, after, before in STEPS:
            for measure in ("average_drop", "overall"):
                for setting in SETTINGS:
                    yield runs.row(f"every stage contributes: {name}", setting, measure, (before,), after)
        others = [f"{OURS} {percentile}%" for percentile in (0, 5, 30, 50)]
        for measure in ("average_drop", "overall"):
            setting = Setting("percentiles", "ImageNet, Lite0")
            yield runs.row("a percentile of 10 to 20 is best", setting, measure, others, f"{OURS} 10%")

    return [row for row in rows() if row is not None]


def claims_table(rows: Sequence[Row]) -> str:
    """The claims as Markdown."""
    lines = [
        "| claim | setting | measure | Fusion-CAM, 95 % interval | least advantage over | by, 95 % interval | effect | "
        "p | verdict | run |",
        "| --- | --- | --- | ---: | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        name, least = min(row.found.items(), key=lambda item: item[1].mean)
        digits = 1 if MEASURES[row.measure].scale == 100 else 3
        lines.append(
            f"| {row.claim} | {row.setting}, {least.pictures} pictures | {row.measure.replace('_', ' ')} | "
            f"{row.mean:.{digits}f} ({row.low:.{digits}f} to {row.high:.{digits}f}) | {name} | "
            f"{least.mean:+.{digits}f} ({least.low:+.{digits}f} to {least.high:+.{digits}f}) | {least.effect:+.2f} | "
            f"{least.p_value:.2g} | {row.verdict} | `{row.run}` |"
        )
    return "\n".join(lines)


def means_table(runs: Runs, run: str, measures: Sequence[str]) -> str:
    """The means of a run with their intervals, methods in the order of the run."""
    tables = {name: runs.values(run, name) for name in measures}
    tables = {name: table for name, table in tables.items() if len(table)}
    methods = list(dict.fromkeys(chain.from_iterable(table.columns for table in tables.values())))
    arrows = [f"{name.replace('_', ' ')} {'↑' if MEASURES[name].higher else '↓'}" for name in tables]
    lines = [f"| method | n | {' | '.join(arrows)} |", f"| --- | {'---: | ' * (len(tables) + 1)}"]
    for method in methods:
        cells = []
        count = 0
        for name, table in tables.items():
            digits = 1 if MEASURES[name].scale == 100 else 3
            values = table[method].dropna().to_numpy() if method in table else np.empty(0)
            count = max(count, len(values))
            low, high = interval(values) if len(values) > 1 else (np.nan, np.nan)
            cells.append(f"{values.mean():.{digits}f} ({low:.{digits}f} to {high:.{digits}f})" if len(values) else "")
        lines.append(f"| {method} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def forest(axis: Axes, found: Sequence[tuple[str, Difference]], title: str) -> None:
    """Differences with their intervals, one above the other; red where they are told from none."""
    for place, (_, each) in enumerate(found):
        colour = "0.6" if each.p_value >= SIGNIFICANT else "tab:red" if each.mean < 0 else "tab:green"
        axis.plot([each.low, each.high], [place, place], color=colour, linewidth=1.6)
        axis.plot(each.mean, place, "o", color=colour, markersize=4)
    axis.axvline(0, color="black", linewidth=0.6)
    axis.grid(axis="x", linewidth=0.4)
    axis.set_yticks(range(len(found)), [name for name, _ in found], size=8)
    axis.set_ylim(len(found) - 0.4, -0.6)
    axis.set_title(title, size=9)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.tick_params(axis="x", labelsize=8)


def claims_chart(runs: Runs) -> Figure:
    """Fusion-CAM against each method of the comparison, in every setting."""
    measures = ("average_drop", "average_increase", "overall")
    settings = [setting for setting in SETTINGS if runs.compare(setting.run, "average_drop", OURS, COMPETITORS)]
    figure = Figure(figsize=(9.5, 1.45 * len(settings) + 0.6), layout="constrained", dpi=110)
    grid = figure.subplots(len(settings), len(measures), squeeze=False, sharex="col", sharey=True)
    for place, (line, setting) in enumerate(zip(grid, settings, strict=True)):
        for axis, measure in zip(line, measures, strict=True):
            found = runs.compare(setting.run, measure, OURS, COMPETITORS)
            title = "" if place else measure.replace("_", " ")
            forest(axis, [(name, found[name]) for name in COMPETITORS if name in found], title)
        line[0].set_ylabel(setting.shown.replace(", ", "\n"), size=8)
    figure.supxlabel("advantage of Fusion-CAM over each method, paired, with its 95 % interval", size=9)
    return figure


def stages_chart(runs: Runs) -> Figure:
    """What each stage adds, in every setting."""
    measures = ("average_drop", "average_increase", "insertion", "deletion")
    settings = [
        setting for setting in SETTINGS if runs.compare(setting.run, "average_drop", OURS, [f"{OURS} combined"])
    ]
    figure = Figure(figsize=(10.5, 1.3 * len(settings) + 0.6), layout="constrained", dpi=110)
    grid = figure.subplots(len(settings), len(measures), squeeze=False, sharex="col", sharey=True)
    for place, (line, setting) in enumerate(zip(grid, settings, strict=True)):
        for axis, measure in zip(line, measures, strict=True):
            found = {name: runs.compare(setting.run, measure, after, (before,)) for name, after, before in STEPS}
            shown = [
                (f"{name.partition(',')[0]} - {before.removeprefix(OURS).strip()}", found[name][before])
                for name, _, before in STEPS
                if before in found[name]
            ]
            forest(axis, shown, "" if place else measure.replace("_", " "))
        line[0].set_ylabel(setting.shown.replace(", ", "\n"), size=8)
    figure.supxlabel("what each step adds, paired, positive where it is better, with its 95 % interval", size=9)
    return figure


def advantages_chart(runs: Runs, run: str, measures: Sequence[str], others: Sequence[str], label: str) -> Figure:
    """Fusion-CAM against others in one run."""
    known = [measure for measure in measures if runs.compare(run, measure, OURS, others)]
    figure = Figure(figsize=(2.5 * len(known) + 1.4, 0.25 * len(others) + 1.1), layout="constrained", dpi=110)
    for axis, measure in zip(figure.subplots(1, len(known), sharey=True, squeeze=False)[0], known, strict=True):
        found = runs.compare(run, measure, OURS, others)
        forest(axis, list(found.items()), measure.replace("_", " "))
    figure.supxlabel(label, size=9)
    return figure


def percentiles_chart(runs: Runs) -> Figure:
    """Each percentile against 10."""
    measures = ("average_drop", "average_increase", "insertion", "deletion")
    others = [f"{OURS} {percentile}%" for percentile in (0, 5, 15, 20, 30, 50)]
    figure = Figure(figsize=(10.5, 2.2), layout="constrained", dpi=110)
    for axis, measure in zip(figure.subplots(1, len(measures), sharey=True), measures, strict=True):
        found = runs.compare("percentiles", measure, f"{OURS} 10%", others)
        turned = [
            (name.removeprefix(OURS), each._replace(mean=-each.mean, low=-each.high, high=-each.low))
            for name, each in found.items()
        ]
        forest(axis, turned, measure.replace("_", " "))
    figure.supxlabel("advantage over the 10th percentile, paired, with its 95 % interval", size=9)
    return figure


def tolerance_table(runs: Runs) -> str:
    """What a tolerance of 0.05 changes, over the pictures that were explained both ways."""
    lines = [
        "| method | n | measure | exact | tolerance 0.05 | change, 95 % interval |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for method in ("score-cam", "union-cam", OURS):
        for measure in FAITHFUL[:5]:
            exact, near = (runs.values(run, measure).get(method) for run in ("imagenet", "tolerance"))
            if exact is None or near is None:
                continue
            both = pd.concat([exact, near], axis=1, keys=["exact", "near"]).dropna()
            change = (both["near"] - both["exact"]).to_numpy()
            digits = 2 if MEASURES[measure].scale == 100 else 4
            means = f"{both['exact'].mean():.{digits}f} | {both['near'].mean():.{digits}f}"
            low, high = (f"{bound:+.{digits}f}" for bound in interval(change))
            changed = f"{change.mean():+.{digits}f} ({low} to {high})"
            lines.append(f"| {method} | {len(both)} | {measure.replace('_', ' ')} | {means} | {changed} |")
    return "\n".join(lines)


def variants(file: Path) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The lines of the variants' file, in the order of the pictures, and the drop of each variant in percent."""
    lines = sorted((json.loads(line) for line in file.open(encoding="utf-8")), key=lambda line: str(line["image"]))
    names = [name for name in lines[0] if name != "image"]
    return lines, {name: 100 * np.array([line[name]["confidence_drop"] for line in lines]) for name in names}


def coverage_table(file: Path) -> str:
    """Fusion-CAM against Score-CAM as they are, and where one has the coverage of the other."""
    lines, drops = variants(file)
    table = ["| Fusion-CAM | Score-CAM | n | average drop | | advantage | effect | p |"]
    table += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    pairs = {("as it is", "as it is"): (PUBLISHED, REGION)}
    pairs |= {("as it is", "as wide as Fusion-CAM"): (PUBLISHED, WIDER)}
    pairs |= {("as narrow as Score-CAM", "as it is"): (NARROWER, REGION)}
    found = holm({" ".join(shown): difference(*(drops[name] for name in pair), False) for shown, pair in pairs.items()})
    for shown, (first, second) in pairs.items():
        each = found[" ".join(shown)]
        cells = [*shown, str(len(lines)), f"{drops[first].mean():.1f}", f"{drops[second].mean():.1f}"]
        cells += [
            f"{each.mean:+.1f} ({each.low:+.1f} to {each.high:+.1f})",
            f"{each.effect:+.2f}",
            f"{each.p_value:.2g}",
        ]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def variants_table(file: Path) -> str:
    """Variants of the fusion: chosen on one half of the pictures, judged on the other."""
    lines, drops = variants(file)
    names = [name for name in drops if name not in (WIDER, NARROWER)]
    published = drops[PUBLISHED][1::2]
    found = holm({name: difference(drops[name][1::2], published, higher=False) for name in names if name != PUBLISHED})
    table = [
        "| map | coverage | average drop, even half | odd half | advantage over Fusion-CAM, odd | p | overall, odd |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        covered = 100 * np.mean([line[name]["complexity"] for line in lines])
        overall = np.mean([line[name]["overall"] for line in lines[1::2]])
        cells = [f"{covered:.1f}", f"{drops[name][::2].mean():.1f}", f"{drops[name][1::2].mean():.1f}"]
        each = found.get(name)
        cells += (
            [f"{each.mean:+.1f} ({each.low:+.1f} to {each.high:+.1f})", f"{each.p_value:.2g}"] if each else ["", ""]
        )
        table.append(f"| {' | '.join([name, *cells, f'{overall:.3f}'])} |")
    return "\n".join(table)


def comparisons(runs: Runs) -> pd.DataFrame:
    """Fusion-CAM against every other row of every run, in every measure."""
    lines = []
    for run in runs.tables:
        for measure in MEASURES:
            values = runs.values(run, measure)
            for other, each in runs.compare(run, measure, OURS, list(values.columns)).items():
                lines.append({"run": run, "measure": measure, "against": other} | each._asdict())
    return pd.DataFrame(lines)


def write(output: Path) -> None:
    """Writes the tables and pictures, and the page, from the records of the runs."""
    runs = Runs(output)
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = claims(runs)
    write_whole(RESULTS / "comparisons.csv", comparisons(runs).to_csv(index=False, float_format="%.5g"))
    charts = {"claims": claims_chart(runs), "stages": stages_chart(runs)}
    if runs.compare("coco", "pointing_game", OURS, COMPETITORS):
        others = (*COMPETITORS, *CONTROLS)
        label = "advantage of Fusion-CAM over each method, paired, with its 95 % interval"
        charts["localization"] = advantages_chart(runs, "coco", (*PLACED, "instances_reached"), others, label)
    if runs.compare("imagenet", "average_drop", OURS, CONTROLS):
        label = "advantage of Fusion-CAM over maps that know nothing, paired, with its 95 % interval"
        charts["controls"] = advantages_chart(runs, "imagenet", FAITHFUL, CONTROLS, label)
    if runs.compare("percentiles", "average_drop", f"{OURS} 10%", [f"{OURS} 20%"]):
        charts["percentiles"] = percentiles_chart(runs)
    for name, chart in charts.items():
        write_whole(RESULTS / f"{name}.png", rendered(chart, ".png"))
    tables = {"CLAIMS": claims_table(rows), "TOLERANCE": tolerance_table(runs)}
    for run in runs.tables:
        measures = (*FAITHFUL, "adcc", "coherency", *PLACED, "instances_reached", "road")
        tables[run.upper()] = means_table(runs, run, measures)
    if (output / VARIANTS).exists():
        tables["VARIANTS"] = variants_table(output / VARIANTS)
        tables["COVERAGE"] = coverage_table(output / VARIANTS)
    page = (HERE / "evidence_page.md").read_text(encoding="utf-8")
    for name, table in tables.items():
        page = page.replace(f"<!-- {name} -->", table)
    write_whole(RESULTS / "README.md", page)
