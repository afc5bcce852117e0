"""Reads the records of the evidence's runs, and compares Fusion-CAM with other methods by paired tests.

The unit of every test is a picture. Networks that explain the same pictures are no independent evidence: a picture's
difference is the mean over the networks, and photographs of one leaf are one picture. All comparisons are corrected
together, by Holm.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, rankdata, wilcoxon

OURS = "fusion-cam:raw"
COMPETITORS = ("grad-cam", "grad-cam++", "group-cam", "score-cam", "union-cam")
CONTROLS = ("random-map", "centred-gaussian")
PERCENTILES = (0, 5, 10, 15, 20, 30, 50)
SIGNIFICANT = 0.05
# Differences below this are rounding.
_DECIMALS = 5
_KEY = ["model", "image", "method", "percentile", "stage"]


class Measure(NamedTuple):
    """A measure: its entry in the records, the factor that papers report it with, and whether higher is better."""

    column: str
    scale: int
    higher: bool


MEASURES = {
    "average drop": Measure("confidence_drop", 100, False),
    "average increase": Measure("confidence_increase", 100, True),
    "insertion": Measure("insertion", 1, True),
    "deletion": Measure("deletion", 1, False),
    "overall": Measure("overall", 1, True),
    "coherency": Measure("coherency", 100, True),
    "complexity": Measure("complexity", 100, False),
    "ADCC": Measure("adcc", 100, True),
    "pointing game": Measure("pointing_game", 100, True),
    "energy inside boxes": Measure("energy_pointing_game", 100, True),
    "pointing game, outlines": Measure("mask_pointing_game", 100, True),
    "energy inside outlines": Measure("mask_energy_pointing_game", 100, True),
    "instances reached": Measure("instances_reached", 100, True),
}
LOCALIZATION = ("pointing game", "energy inside boxes", "pointing game, outlines", "energy inside outlines")


class Claim(NamedTuple):
    """A claim: a method is better than others in some measures, in each collection of the runs with this prefix."""

    title: str
    method: str
    others: Sequence[str]
    measures: Sequence[str]
    runs: Sequence[str] = ("ilsvrc", "voc2012", "coco128", "leaves")


CLAIMS = (
    Claim("lowest Average Drop", OURS, COMPETITORS, ["average drop"]),
    Claim("highest Average Increase", OURS, COMPETITORS, ["average increase"]),
    Claim("best overall of insertion and deletion", OURS, COMPETITORS, ["overall"]),
    Claim("best localization", OURS, COMPETITORS, [*LOCALIZATION, "instances reached"]),
    Claim("each stage improves on its input", f"{OURS} denoised", ["grad-cam"], ["average drop", "overall"]),
    Claim("each stage improves on its input", f"{OURS} combined", ["score-cam"], ["average drop", "overall"]),
    Claim("each stage improves on its input", OURS, [f"{OURS} combined"], ["average drop", "overall"]),
    Claim(
        "a percentile of 10 is best",
        f"{OURS} 10%",
        [f"{OURS} {each}%" for each in PERCENTILES if each != 10],
        ["average drop"],
        ["percentiles"],
    ),
    Claim("better than maps that ignore the model", OURS, CONTROLS, ["average drop", "overall", *LOCALIZATION]),
    Claim("a tolerance of 0.05 changes nothing", OURS, [f"{OURS} exact"], ["average drop", "overall"], ["exact"]),
)


def read(output: Path) -> pd.DataFrame:
    """Reads the values of all runs: columns run, collection, model, picture, method and each measure, in its unit."""
    tables = [_read(folder) for folder in sorted(output.iterdir()) if any(folder.glob("records-*.jsonl"))]
    if not tables:
        raise SystemExit(f"{output} holds no records")
    values = pd.concat(tables, ignore_index=True)
    exact = values[values["run"] == "exact"]
    near = values[(values["run"] == "ilsvrc-lite0") & values["image"].isin(exact["image"])].assign(run="exact")
    exact = exact.assign(method=exact["method"] + " exact")
    values = pd.concat([values[values["run"] != "exact"], exact, near], ignore_index=True)
    groups = output / "groups.json"
    leaves = json.loads(groups.read_text(encoding="utf-8")) if groups.exists() else {}
    # Photographs of one leaf are one picture.
    values["picture"] = [leaves.get(image, image) for image in values["image"]]
    values["collection"] = values["run"].str.partition("-")[0]
    for name, (column, scale, _) in MEASURES.items():
        values[name] = values[column].astype(float) * scale if column in values else np.nan
    keys = ["run", "collection", "model", "picture", "method"]
    return values.groupby(keys, sort=False)[list(MEASURES)].mean().dropna(how="all").reset_index()


def _read(folder: Path) -> pd.DataFrame:
    """Reads the records of a run, one row for each key; a row of its method for each stage that is a method itself."""
    lines = [json.loads(line) for file in sorted(folder.glob("records-*.jsonl")) for line in file.open("rb")]
    table = pd.DataFrame([line for line in lines if "error" not in line]).drop(columns="map")
    # What was measured first stays; later records add new measures.
    table = table.groupby(_KEY, sort=False, dropna=False).first().reset_index().assign(run=folder.name)
    table["method"] = table["method"].where(table["stage"] != "gradient", "grad-cam")
    table["method"] = table["method"].where(table["stage"] != "region", "score-cam")
    stages = [f" {stage}" if stage in ("denoised", "combined") else "" for stage in table["stage"]]
    several = table.groupby("method")["percentile"].transform("nunique") > 1
    percentiles = [f" {each:g}%" if shown else "" for each, shown in zip(table["percentile"], several, strict=True)]
    table["method"] = ["".join(parts) for parts in zip(table["method"], percentiles, stages, strict=True)]
    if "deletion" in table:
        table["overall"] = table["insertion"] - table["deletion"]
    if "instances" in table:
        table.loc[table["instances"] < 2, "instances_reached"] = np.nan
    return table.drop_duplicates(["model", "image", "method"])


def differences(values: pd.DataFrame, measure: str, method: str, other: str) -> "pd.Series[float]":
    """Computes each picture's mean difference over the networks, positive where the method is better."""
    pairs = values[values["method"].isin([method, other])]
    table = pairs.pivot_table(index="picture", columns=["model", "method"], values=measure)
    models = [model for model in table.columns.unique("model") if {method, other} <= set(table[model])]
    sign = 1 if MEASURES[measure].higher else -1
    each = pd.DataFrame({model: sign * (table[model][method] - table[model][other]) for model in models})
    return each.dropna().mean(axis=1).round(_DECIMALS)


def interval(values: Any) -> tuple[float, float]:
    """Computes the 95 % interval of a mean by the bias-corrected and accelerated bootstrap."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    result = bootstrap((values,), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(0))
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def paired_test(values: Any) -> dict[str, Any]:
    """Tests paired differences by Wilcoxon's signed-rank test; the effect is the matched-pairs rank correlation."""
    low, high = interval(values)
    moved = values[values != 0]
    ranks = rankdata(abs(moved))
    effect = float((ranks * np.sign(moved)).sum() / ranks.sum()) if len(moved) else 0.0
    p_value = float(wilcoxon(moved).pvalue) if len(moved) else 1.0
    size = {"pictures": len(values), "difference": float(values.mean()), "low": low, "high": high}
    return size | {"effect": effect, "p": p_value}


def holm(p_values: "pd.Series[float]") -> "pd.Series[float]":
    """Corrects p values for their number by Holm."""
    order = p_values.sort_values()
    factors = np.arange(len(order), 0, -1)
    return (order * factors).cummax().clip(upper=1).reindex(p_values.index)


def comparisons(values: pd.DataFrame) -> pd.DataFrame:
    """Compares the method of each claim with the others in each collection."""
    table = pd.DataFrame(_comparisons(values))
    table["p corrected"] = holm(table["p"])
    decided = np.where(table["difference"] > 0, "better", "worse")
    table["verdict"] = np.where(table["p corrected"] < SIGNIFICANT, decided, "inconclusive")
    return table


def _comparisons(values: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for claim in CLAIMS:
        for collection in claim.runs:
            rows = values[values["collection"] == collection]
            for measure in claim.measures:
                for other in claim.others:
                    if not {claim.method, other} <= set(rows.dropna(subset=measure)["method"]):
                        continue
                    paired = differences(rows, measure, claim.method, other)
                    if len(paired) > 1:
                        names = {"claim": claim.title, "pictures of": collection, "measure": measure}
                        names |= {"method": claim.method, "other": other}
                        yield names | paired_test(paired.to_numpy())
