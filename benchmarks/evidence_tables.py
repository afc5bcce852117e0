"""The tables of the evidence's page."""

from collections.abc import Sequence
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.evidence_runs import CONTROLS, FAITHFUL, OURS, PLACED, Row, Runs
from benchmarks.evidence_statistics import Difference, difference, holm, interval
from benchmarks.evidence_variants import NAMES, NARROWER, PUBLISHED, REGION, VARIANTS, WIDER, read
from captum_fusion.benchmark._measures import MEASURES

# Channels of Lite0's activated head that a picture has live on average, and those that are scored within 0.05.
LIVE, SCORED = 690, 90
# Forward passes for a picture beside those of the channels; a backward pass is counted as two.
PASSES = {
    "grad-cam": 3,
    "grad-cam++": 3,
    "x-grad-cam": 3,
    "layer-cam": 3,
    "hi-res-cam": 3,
    "grad-cam-element-wise": 3,
    "eigen-cam": 3,
    "eigen-grad-cam": 3,
    "finer-cam": 3,
    "guided-grad-cam": 6,
    "integrated-gradients": 150,
    "group-cam": 36,
    "score-cam": 2 + LIVE,
    "ablation-cam": 2 + LIVE,
    "union-cam": 8 + LIVE,
    "fusion-cam": 9 + LIVE,
    "score-cam within 0.05": 2 + SCORED,
    "fusion-cam within 0.05": 9 + SCORED,
    "is-cam": 2 + 10 * LIVE,
}
# What the authors report, by the claim and the measure; see the page.
AUTHORS = {
    ("lowest Average Drop", "average_drop"): "19.2, next Union-CAM 26.0",
    ("highest Average Increase", "average_increase"): "28, next Union-CAM 21",
    ("best overall of insertion and deletion", "overall"): "0.468, next Ablation-CAM 0.463",
    ("a percentile of 10 to 20 is best: 10", "average_drop"): "10 to 20",
    ("a percentile of 10 to 20 is best: 20", "average_drop"): "10 to 20",
}


def tables(runs: Runs, output: Path) -> dict[str, str]:
    """Every table of the page, by the name of its place; of those that were measured."""
    claims = runs.claims()
    measures = (*FAITHFUL, "coherency", "adcc", *PLACED, "instances_reached")
    found = {"SUMMARY": summary_table(claims), "CLAIMS": claims_table(claims), "MADE": made_table(runs)}
    found |= {run.upper(): means_table(runs, run, measures) for run in runs.tables}
    if {"imagenet", "tolerance"} <= runs.tables.keys():
        found["CHANGES"] = tolerance_table(runs)
    if "imagenet" in runs.tables:
        found["FOOLED"] = controls_table(runs)
    if "methods" in runs.tables:
        found["COST"] = cost_table(runs)
    if variants(output / VARIANTS):
        found |= {"VARIANTS": variants_table(output / VARIANTS), "COVERAGE": coverage_table(output / VARIANTS)}
    return found


def rounded(measure: str, value: float, sign: str = "") -> str:
    """A value in as many digits as it is worth."""
    return f"{value:{sign}.{1 if MEASURES[measure].scale == 100 else 3}f}"


def with_interval(measure: str, mean: float, low: float, high: float, sign: str = "") -> str:
    return f"{rounded(measure, mean, sign)} ({rounded(measure, low, sign)} to {rounded(measure, high, sign)})"


def summary_table(rows: Sequence[Row]) -> str:
    """A line for each claim and measure: what is said, what was found, and in which settings it holds."""
    lines = [
        "| claim, measure | authors | here, 95 % interval | advantage over the closest | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (claim, measure), group in groupby(rows, key=lambda row: (row.claim, row.measure)):
        same = list(group)
        name, closest = same[0].closest
        verdicts = [
            f"**{known}**: {', '.join(row.setting.shown for row in same if row.verdict == known)}"
            for known in ("holds", "cannot be told", "does not hold")
            if any(row.verdict == known for row in same)
        ]
        advantage = with_interval(measure, closest.mean, closest.low, closest.high, "+")
        lines.append(
            f"| {claim}, {measure.replace('_', ' ')} | {AUTHORS.get((claim, measure), '')} | "
            f"{with_interval(measure, same[0].mean, same[0].low, same[0].high)} | {name}: {advantage} | "
            f"{'<br>'.join(verdicts)} |"
        )
    return "\n".join(lines)


def claims_table(rows: Sequence[Row]) -> str:
    """The claims as Markdown, a line for each setting."""
    lines = [
        "| claim | setting | measure | Fusion-CAM, 95 % interval | least advantage over | by, 95 % interval | effect | "
        "p | verdict | run |",
        "| --- | --- | --- | ---: | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        name, closest = row.closest
        pictures = "leaves" if row.setting.run.startswith("leaves") else "pictures"
        lines.append(
            f"| {row.claim} | {row.setting.shown}, {closest.pictures} {pictures} | {row.measure.replace('_', ' ')} | "
            f"{with_interval(row.measure, row.mean, row.low, row.high)} | {name} | "
            f"{with_interval(row.measure, closest.mean, closest.low, closest.high, '+')} | {closest.effect:+.2f} | "
            f"{closest.p_value:.2g} | {row.verdict} | `{row.setting.run.removesuffix('-several')}` |"
        )
    return "\n".join(lines)


def controls_table(runs: Runs) -> str:
    """What each measure makes of maps that know nothing, and for how many pictures it does not see the difference."""
    lines = [
        f"| measure | {OURS} | " + " | ".join(f"{name} | as good, % of pictures" for name in CONTROLS) + " |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    asked = [("imagenet", measure) for measure in FAITHFUL[:5]] + [("coco", measure) for measure in PLACED]
    for run, measure in [*asked, ("coco-several", "instances_reached")]:
        values = runs.values(run, measure)
        if not {OURS, *CONTROLS} <= set(values):
            continue
        values = values[[OURS, *CONTROLS]].dropna()
        cells = [rounded(measure, values[OURS].mean())]
        for name in CONTROLS:
            advantage = (values[OURS] - values[name]) * (1 if MEASURES[measure].higher else -1)
            cells += [rounded(measure, values[name].mean()), f"{100 * (advantage <= 0).mean():.0f}"]
        lines.append(f"| {measure.replace('_', ' ')}, {run.partition('-')[0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cost_table(runs: Runs) -> str:
    """What a map costs and what it is worth, the cheap ones first."""
    measures = ("average_drop", "average_increase", "insertion", "deletion", "overall")
    values = {measure: runs.values("methods", measure) for measure in measures}
    named = sorted((cost, name) for name, cost in PASSES.items() if name in values["average_drop"])
    arrows = [f"{measure.replace('_', ' ')} {'↑' if MEASURES[measure].higher else '↓'}" for measure in measures]
    lines = [f"| method | passes | {' | '.join(arrows)} |", f"| --- | {'---: | ' * (len(measures) + 1)}"]
    for cost, name in named:
        means = [rounded(measure, values[measure][name].mean()) for measure in measures]
        lines.append(f"| {name} | {cost} | {' | '.join(means)} |")
    return "\n".join(lines)


def made_table(runs: Runs) -> str:
    """What each run was made with."""
    lines = [
        "| run | pictures | network, weights | layer | tolerance | target | steps | hash of the pictures |",
        "| --- | ---: | --- | --- | ---: | --- | ---: | --- |",
    ]
    for run, made in runs.made.items():
        records, asked = runs.tables[run], made["arguments"]
        first = records.iloc[0]
        lines.append(
            f"| `{run}` | {records['image'].nunique()} | {first['model']}, {first['weights_hash']} | "
            f"{first['layer']} | {asked['tolerance']:g} | {asked['target']} | {asked['steps']} | "
            f"{made['images_hash']} |"
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
            values = table[method].dropna().to_numpy() if method in table else np.empty(0)
            count = max(count, len(values))
            cells.append(with_interval(name, values.mean(), *interval(values)) if len(values) > 1 else "")
        lines.append(f"| {method} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tolerance_table(runs: Runs) -> str:
    """What a tolerance of 0.05 changes, over the pictures that were explained both ways."""
    lines = [
        "| method | n | measure | exact | tolerance 0.05 | change, 95 % interval |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for method in ("score-cam", OURS):
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


def variants(file: Path, measure: str = "confidence_drop") -> dict[str, np.ndarray]:
    """A measure of each variant, of the pictures in order of which all was measured."""
    lines = [line for _, line in sorted(read(file).items()) if set(NAMES) <= line.keys()]
    scale = 1 if measure == "overall" else 100
    known = [name for name in NAMES if lines and measure in lines[0][name]]
    return {name: scale * np.array([line[name][measure] for line in lines]) for name in known}


def coverage_table(file: Path) -> str:
    """Fusion-CAM against Score-CAM as they are, and where one has the coverage of the other."""
    drops = variants(file)
    table = ["| Fusion-CAM | Score-CAM | n | average drop | | advantage | effect | p |"]
    table += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    pairs = {("as it is", "as it is"): (PUBLISHED, REGION)}
    pairs |= {("as it is", "as wide as Fusion-CAM"): (PUBLISHED, WIDER)}
    pairs |= {("as narrow as Score-CAM", "as it is"): (NARROWER, REGION)}
    found = holm({" ".join(shown): difference(*(drops[name] for name in pair), False) for shown, pair in pairs.items()})
    for shown, (first, second) in pairs.items():
        each = found[" ".join(shown)]
        cells = [*shown, str(len(drops[first])), f"{drops[first].mean():.1f}", f"{drops[second].mean():.1f}"]
        cells += [
            f"{each.mean:+.1f} ({each.low:+.1f} to {each.high:+.1f})",
            f"{each.effect:+.2f}",
            f"{each.p_value:.2g}",
        ]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def variants_table(file: Path) -> str:
    """Variants of the fusion: chosen on one half of the pictures, judged on the other."""
    covered, drops, overall = (variants(file, measure) for measure in ("complexity", "confidence_drop", "overall"))
    table = [
        "| map | coverage | average drop | advantage, even half | odd half | overall | advantage, even | odd |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    others = [name for name in overall if name != PUBLISHED]
    for name in overall:
        cells = [f"{covered[name].mean():.1f}"]
        for measure, values, higher in (("average_drop", drops, False), ("overall", overall, True)):
            cells.append(rounded(measure, values[name].mean()))
            for half in (slice(0, None, 2), slice(1, None, 2)):
                published = values[PUBLISHED][half]
                found = holm({other: difference(values[other][half], published, higher) for other in others})
                cells.append(_told(measure, found[name]) if name in found else "")
        table.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(table)


def _told(measure: str, each: Difference) -> str:
    return f"{with_interval(measure, each.mean, each.low, each.high, '+')}, p {each.p_value:.2g}"


def comparisons(runs: Runs) -> pd.DataFrame:
    """Fusion-CAM against every other row of every run, in every measure."""
    lines = []
    for run in runs.tables:
        for measure in MEASURES:
            values = runs.values(run, measure)
            for other, each in runs.compare(run, measure, OURS, list(values.columns)).items():
                lines.append({"run": run, "measure": measure, "against": other} | each._asdict())
    return pd.DataFrame(lines)
