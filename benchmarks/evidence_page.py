"""Writes the page of the evidence: ten sentences, a picture and tables, from the records of the runs."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.evidence_statistics import CLAIMS, COMPETITORS, MEASURES, OURS, comparisons, differences, interval, read

HERE = Path(__file__).parent
# The measures of the picture.
DRAWN = ("average drop", "average increase", "overall")
COLLECTIONS = {
    "ilsvrc": "ImageNet",
    "voc2012": "VOC",
    "coco128": "COCO",
    "leaves": "rice leaves",
}
COLOURS = {"better": "tab:green", "worse": "tab:red", "inconclusive": "0.6"}


def write(output: Path, results: Path) -> None:
    """Writes comparisons.csv, means.csv, the picture and the page from a folder with a folder for each run."""
    values = read(output)
    compared = comparisons(values).replace({"pictures of": COLLECTIONS})
    means = mean_values(values)
    results.mkdir(parents=True, exist_ok=True)
    compared.to_csv(results / "comparisons.csv", index=False, float_format="%.4g")
    means.to_csv(results / "means.csv", index=False, float_format="%.4g")
    draw(compared).savefig(results / "claims.png", dpi=100)
    parts = {
        "SENTENCES": "\n".join(f"{number}. {text}" for number, text in enumerate(sentences(values, compared), 1)),
        "COMPARISONS": comparisons_table(compared),
        "MEANS": "\n\n".join(means_table(run, rows) for run, rows in means.groupby("run", sort=False)),
        "RUNS": runs_table(output, values),
    }
    page = (HERE / "evidence_page.template").read_text(encoding="utf-8")
    (results / "README.md").write_text(re.sub("<!-- ([A-Z]+) -->", lambda match: parts[match[1]], page))


def sentences(values: pd.DataFrame, compared: pd.DataFrame) -> list[str]:
    """Says what ran, and the verdicts of each claim."""
    pictures = values[values["collection"].isin(CLAIMS[0].runs)].groupby("collection")["picture"].nunique()
    ran = ", ".join(f"{count} pictures of {COLLECTIONS[str(collection)]}" for collection, count in pictures.items())
    lines = [f"{values['model'].nunique()} networks explained {ran}; Fusion-CAM ran as `{OURS}`."]
    for title, rows in compared.groupby("claim", sort=False):
        counts = rows["verdict"].value_counts()
        parts = []
        for verdict in ("better", "worse"):
            decided = rows[rows["verdict"] == verdict]
            where = [
                f"{other} ({_places(each)})" for (_, other), each in decided.groupby(["method", "other"], sort=False)
            ]
            if where:
                parts.append(f"significantly {verdict} than {', '.join(where)}")
        if "inconclusive" in counts:
            parts.append(f"{counts['inconclusive']} of {len(rows)} comparisons are inconclusive")
        lines.append(f"**{str(title)[0].upper()}{str(title)[1:]}**: {'; '.join(parts)}.")
    ignorant = differences(values[values["collection"] == "ilsvrc"], "average drop", OURS, "random-map")
    if len(ignorant):
        lines.append(
            f"**A limit of Average Drop**: on {(ignorant <= 0).mean():.0%} of the pictures of ImageNet the drop of a "
            "random map is at most that of Fusion-CAM."
        )
    return lines


def _places(rows: pd.DataFrame) -> str:
    """Names the collections, and the measures where the claim has several."""
    several = len(next(claim for claim in CLAIMS if claim.title == rows["claim"].iloc[0]).measures) > 1
    measures = rows.groupby("pictures of", sort=False)["measure"].agg(", ".join)
    if not several:
        return ", ".join(measures.index)
    return "; ".join(f"{collection}: {names}" for collection, names in measures.items())


def number(measure: str, value: float, sign: str = "") -> str:
    """Formats a value with as many digits as it is worth."""
    return f"{value:{sign}.{1 if MEASURES[measure].scale == 100 else 3}f}"


def comparisons_table(compared: pd.DataFrame) -> str:
    """Formats a line for each comparison."""
    lines = [
        "| claim | pictures | measure | against | n | difference, 95 % interval | effect | corrected p | verdict |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for _, row in compared.iterrows():
        mean, low, high = (number(row["measure"], row[name], "+") for name in ("difference", "low", "high"))
        cells = [row["claim"], row["pictures of"], row["measure"], row["other"], str(row["pictures"])]
        cells += [f"{mean} ({low} to {high})", f"{row['effect']:+.2f}", f"{row['p corrected']:.2g}", row["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_values(values: pd.DataFrame) -> pd.DataFrame:
    """Computes the means with their 95 % intervals: a row for each run, network, method and measure."""
    rows = []
    for (run, model, method), group in values.groupby(["run", "model", "method"], sort=False):
        for measure in MEASURES:
            known = group[measure].dropna().to_numpy()
            if len(known) > 1:
                low, high = interval(known)
                row = {"run": run, "model": model, "method": method, "measure": measure, "pictures": len(known)}
                rows.append(row | {"mean": known.mean(), "low": low, "high": high})
    return pd.DataFrame(rows, columns=["run", "model", "method", "measure", "pictures", "mean", "low", "high"])


def means_table(run: str, means: pd.DataFrame) -> str:
    """Formats the means of a run, a line for each network and method, the number of pictures where it differs."""
    cells = means.apply(_mean_cell, axis=1, most=means["pictures"].max())
    table = means.assign(cell=cells).pivot_table("cell", ["model", "method"], "measure", "first", sort=False)
    columns = [name for name in MEASURES if name in table]
    arrows = [f"{name} {'↑' if MEASURES[name].higher else '↓'}" for name in columns]
    lines = [f"`{run}`, {means['pictures'].max()} pictures:", "", f"| network | method | {' | '.join(arrows)} |"]
    lines.append(f"| --- | --- | {'---: | ' * len(columns)}".rstrip())
    for (model, method), row in table[columns].fillna("").iterrows():
        lines.append(f"| {model.rpartition(':')[2]} | {method} | {' | '.join(row)} |")
    return "\n".join(lines)


def _mean_cell(row: "pd.Series[float]", most: int) -> str:
    mean, low, high = (number(str(row["measure"]), row[name]) for name in ("mean", "low", "high"))
    fewer = "" if row["pictures"] == most else f", n {row['pictures']}"
    return f"{mean} ({low} to {high}){fewer}"


def draw(compared: pd.DataFrame) -> Figure:
    """Draws the differences from the competitors with their intervals, in colour where they are significant."""
    rows = compared[
        compared["measure"].isin(DRAWN) & compared["other"].isin(COMPETITORS) & (compared["method"] == OURS)
    ]
    collections: Sequence[str] = list(dict.fromkeys(rows["pictures of"]))
    figure = Figure(figsize=(9.5, 0.5 + 1.3 * max(1, len(collections))), layout="constrained")
    grid = figure.subplots(max(1, len(collections)), len(DRAWN), squeeze=False, sharex="col", sharey=True)
    for line, collection in zip(grid, collections, strict=False):
        line[0].set_ylabel(collection, size=8)
        for axis, measure in zip(line, DRAWN, strict=True):
            shown = rows[(rows["pictures of"] == collection) & (rows["measure"] == measure)]
            if shown.empty:
                axis.text(0.5, 0.5, "not measured", size=8, color="0.4", ha="center", transform=axis.transAxes)
            for _, row in shown.iterrows():
                place, colour = COMPETITORS.index(row["other"]), COLOURS[row["verdict"]]
                axis.plot([row["low"], row["high"]], [place, place], color=colour)
                axis.plot(row["difference"], place, "o", color=colour, markersize=4)
            axis.axvline(0, color="black", linewidth=0.6)
            axis.set_yticks(range(len(COMPETITORS)), COMPETITORS, size=8)
            axis.set_ylim(len(COMPETITORS) - 0.4, -0.6)
    for axis, measure in zip(grid[0], DRAWN, strict=True):
        axis.set_title(measure, size=9)
    figure.supxlabel(f"difference of {OURS} from each method, positive where it is better, 95 % interval", size=9)
    return figure


def runs_table(output: Path, values: pd.DataFrame) -> str:
    """Formats the settings of each run, as its records have them."""
    lines = [
        "| run | pictures | networks and layers | tolerance | target | steps | device |",
        "| --- | ---: | --- | ---: | --- | ---: | --- |",
    ]
    counts = values.groupby("run")["picture"].nunique()
    for run in sorted(counts.index):
        files = sorted((output / run).glob("records-*.jsonl"))
        one, *others = (json.loads(line) for file in files for line in file.open("rb"))
        devices = ", ".join(sorted({each["device"] for each in (one, *others)}))
        cells = [f"`{run}`", str(counts[run]), f"{one['model'].rpartition(':')[2]}, `{one['layer']}`"]
        cells += [f"{one['tolerance']:g}", one["target_kind"], str(one["steps"] or "-"), devices]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
