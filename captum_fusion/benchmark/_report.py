"""Tables and pictures from the records of a benchmark."""

import base64
import json
import textwrap
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from captum.attr import visualization
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from scipy.stats import false_discovery_control, wilcoxon

from captum_fusion.benchmark._records import read_records, read_settings
from captum_fusion.metrics.means import mean_of

# Each measure's record entry, the factor that papers report it with, and whether more is better.
_MEASURES: dict[str, tuple[str, float, bool]] = {
    "average_drop": ("confidence_drop", 100, False),
    "average_increase": ("confidence_increase", 100, True),
    "insertion": ("insertion", 1, True),
    "deletion": ("deletion", 1, False),
    "overall": ("overall", 1, True),
    "pointing_game": ("pointing_game", 100, True),
    "energy_pointing_game": ("energy_pointing_game", 100, True),
}
_SIGNIFICANT = 0.05
_SHOWN = 6


def report(folder: str | Path, environment: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """Writes the tables and pictures of a benchmark from its records, and shows the table on the terminal.

    - summary.csv: for each model and method the means with their standard errors; what is measured in seconds last
    - summary.md: the same, with the best value of each measure and those that do not differ from it significantly
    - pairs.csv: the paired test of each two methods: Wilcoxon's signed-rank test, adjusted for the number of pairs by
      Benjamini and Yekutieli
    - curves.png, measures.png, explanations.png: insertion and deletion curves, the measures, and the most and least
      faithful explanations

    Args:
        folder (str or Path): The output folder of a benchmark.
        environment (Mapping, optional): What ``run`` knows about the run, for run.json. Default: None, which leaves
            run.json as it is

    Returns:
        *pandas.DataFrame* of summary.csv.

    Raises:
        ValueError: If the folder holds no benchmark or no records.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    found = read_records(folder)
    if not found:
        raise ValueError(f"{folder} holds no records yet")
    if environment is not None:
        (folder / "run.json").write_text(json.dumps(environment, indent=2) + "\n")
    records = pd.DataFrame([found[key] for key in sorted(found)])
    if "error" not in records:
        records["error"] = None
    if {"insertion", "deletion"} <= set(records):
        records["overall"] = records["insertion"] - records["deletion"]
    # In the order in which models and methods were given, each method followed by its variants.
    models = list(settings["models"])
    names = list(settings["methods"])
    order = sorted(
        records["method"].unique(),
        key=lambda label: (
            max((names.index(name) for name in names if label == name or label.startswith(f"{name} ")), default=0),
            len(label),
            label,
        ),
    )
    records["method"] = pd.Categorical(records["method"], order, ordered=True)
    records["model"] = pd.Categorical(records["model"], models, ordered=True)
    records = records.sort_values(["model", "method", "image", "requested"], ignore_index=True)
    measures = [name for name, (column, _, _) in _MEASURES.items() if column in records]

    summary = _summary(records, measures)
    summary.to_csv(folder / "summary.csv", index=False, float_format="%.6g")
    pairs = _pairs(records, measures)
    pairs.to_csv(folder / "pairs.csv", index=False, float_format="%.6g")
    text = _markdown(summary, pairs, measures)
    (folder / "summary.md").write_text(text)
    if measures:  # There are none where nothing but errors was recorded.
        _draw_measures(folder / "measures.png", summary, measures)
        _draw_explanations(folder / "explanations.png", records, measures)
    if {"insertion_curve", "deletion_curve"} & set(records):
        _draw_curves(folder / "curves.png", records)
    _print(summary, measures)
    return summary


def _values(records: pd.DataFrame, measure: str) -> "pd.Series[float]":
    column, scale, _ = _MEASURES[measure]
    return records[column].dropna().astype(float) * scale


def _summary(records: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    rows = []
    for (model, method), group in records.groupby(["model", "method"], observed=True, sort=True):
        row: dict[str, Any] = {
            "model": model,
            "method": method,
            "explanations": int(group["error"].isna().sum()),
            "errors": int(group["error"].notna().sum()),
        }
        for measure in measures:
            mean = mean_of(_values(group, measure).tolist())
            row |= {measure: mean.mean, f"{measure}_standard_error": mean.standard_error}
        seconds = mean_of(group["seconds"].dropna().tolist() if "seconds" in group else [])
        rows.append(row | {"seconds": seconds.mean, "seconds_standard_error": seconds.standard_error})
    return pd.DataFrame(rows)


def _pairs(records: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """For each model, measure and two methods: the mean difference over the pictures that both explained."""
    rows = []
    for model, of_model in records.groupby("model", observed=True):
        for measure in measures:
            values = of_model.assign(value=of_model[_MEASURES[measure][0]].astype(float) * _MEASURES[measure][1])
            table = values.pivot(index=["image", "requested"], columns="method", values="value")
            tested = []
            for first, second in combinations(table.columns, 2):
                both = table[[first, second]].dropna()
                difference = both[first] - both[second]
                if len(difference) == 0:
                    continue
                p_value = wilcoxon(difference).pvalue if difference.any() else 1.0
                tested.append(
                    {
                        "model": model,
                        "measure": measure,
                        "first": first,
                        "second": second,
                        "explanations": len(difference),
                        "mean_difference": difference.mean(),
                        "p_value": p_value,
                    }
                )
            adjusted = false_discovery_control([row["p_value"] for row in tested], method="by") if tested else []
            rows += [row | {"adjusted_p_value": value} for row, value in zip(tested, adjusted, strict=True)]
    columns = ["model", "measure", "first", "second", "explanations", "mean_difference", "p_value", "adjusted_p_value"]
    return pd.DataFrame(rows, columns=columns)


def _as_good(pairs: pd.DataFrame, model: str, measure: str, best: str) -> set[str]:
    """The methods that do not differ significantly from the best one."""
    of_best = pairs[
        (pairs["model"] == model)
        & (pairs["measure"] == measure)
        & ((pairs["first"] == best) | (pairs["second"] == best))
        & (pairs["adjusted_p_value"] >= _SIGNIFICANT)
    ]
    return {*of_best["first"], *of_best["second"]} - {best}


def _cell(mean: float, error: float, measure: str) -> str:
    digits = 1 if _MEASURES[measure][1] == 100 else 3
    if np.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" if np.isnan(error) else f"{mean:.{digits}f} ± {error:.{digits}f}"


def _markdown(summary: pd.DataFrame, pairs: pd.DataFrame, measures: Sequence[str]) -> str:
    lines = []
    for model, rows in summary.groupby("model", observed=True, sort=False):
        lines += [f"## {model}", ""]
        shown = [f"{measure.replace('_', ' ')} {'↑' if _MEASURES[measure][2] else '↓'}" for measure in measures]
        lines += [f"| {' | '.join(['method', 'explanations', 'errors', *shown, 'seconds'])} |"]
        lines += [f"| --- {'| ---: ' * (len(shown) + 3)}|"]
        best, as_good = {}, {}
        for measure in measures:
            means = rows.set_index("method")[measure].dropna()
            if len(means):
                best[measure] = means.idxmax() if _MEASURES[measure][2] else means.idxmin()
                as_good[measure] = _as_good(pairs, model, measure, best[measure])
        for _, row in rows.iterrows():
            cells = []
            for measure in measures:
                cell = _cell(row[measure], row[f"{measure}_standard_error"], measure)
                if best.get(measure) == row["method"]:
                    cell = f"**{cell}**"
                elif row["method"] in as_good.get(measure, set()):
                    cell += " ≈"
                cells.append(cell)
            start = [str(row["method"]), str(row["explanations"]), str(row["errors"])]
            lines.append(f"| {' | '.join([*start, *cells, format(row['seconds'], '.2f')])} |")
        lines.append("")
    lines += [
        "Means with their standard errors; average drop and increase and the pointing games in percent. Bold is the "
        "best mean; ≈ marks those that do not differ from it significantly (Wilcoxon's signed-rank test of the paired "
        f"values, adjusted by Benjamini and Yekutieli, {_SIGNIFICANT:g}). Seconds are those of one explanation.",
        "",
    ]
    return "\n".join(lines)


def _print(summary: pd.DataFrame, measures: Sequence[str]) -> None:
    for model, rows in summary.groupby("model", observed=True, sort=False):
        table = Table("method", "n", "errors", *(name.replace("_", " ") for name in measures), "seconds", title=model)
        for _, row in rows.iterrows():
            cells = [_cell(row[measure], row[f"{measure}_standard_error"], measure) for measure in measures]
            start = [str(row[name]) for name in ("method", "explanations", "errors")]
            table.add_row(*start, *cells, f"{row['seconds']:.2f}")
        Console().print(table)


def _draw_measures(file: Path, summary: pd.DataFrame, measures: Sequence[str]) -> None:
    models = list(summary["model"].unique())
    height = 0.9 + 0.26 * len(summary)
    figure = Figure(figsize=(3.0 * len(measures) + 1.5, height), layout="constrained")
    axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    labels = [
        f"{row['model']} {row['method']}" if len(models) > 1 else str(row["method"]) for _, row in summary.iterrows()
    ]
    for axis, measure in zip(axes, measures, strict=True):
        errors = summary[f"{measure}_standard_error"]
        axis.errorbar(summary[measure], range(len(summary)), xerr=errors, fmt="o", markersize=4, capsize=2)
        axis.grid(axis="x", linewidth=0.4)
        axis.set_title(
            f"{measure.replace('_', ' ')} ({'higher' if _MEASURES[measure][2] else 'lower'} is better)", size=9
        )
        axis.set_yticks(range(len(summary)), labels)
    axes[0].invert_yaxis()
    figure.savefig(file, dpi=110)


def _draw_curves(file: Path, records: pd.DataFrame) -> None:
    curves = [name for name in ("insertion_curve", "deletion_curve") if name in records]
    models = list(records["model"].unique())
    figure = Figure(figsize=(4.6 * len(curves) + 2.4, 3.4 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), len(curves), squeeze=False)
    for line, model in zip(axes, models, strict=True):
        for axis, curve in zip(line, curves, strict=True):
            of_model = records[records["model"] == model]
            for method, group in of_model.groupby("method", observed=True):
                rows = group[curve].dropna().tolist()
                if rows:
                    mean = np.mean(rows, axis=0)
                    axis.plot(np.linspace(0, 1, len(mean)), mean, label=method, linewidth=1.2)
            done = "restored" if curve == "insertion_curve" else "removed"
            axis.set(
                xlabel=f"share of the pixels {done}",
                ylabel="mean probability",
                title=f"{model}: {curve.partition('_')[0]}",
            )
        handles, labels = line[-1].get_legend_handles_labels()
        line[-1].legend(handles, labels, fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(file, dpi=110)


def _draw_explanations(file: Path, records: pd.DataFrame, measures: Sequence[str]) -> None:
    """The explanations with the best and the worst values of the first measure that tells them apart."""
    measure = next(name for name in ("overall", "average_drop", *measures) if name in measures)
    column, _, higher = _MEASURES[measure]
    judged = records.dropna(subset=[column, "map"])
    ranked = judged.sort_values(column, ascending=not higher, kind="stable")
    # Each picture once: by its best and by its worst explanation.
    most, least = ranked.drop_duplicates("image"), ranked[::-1].drop_duplicates("image")
    count = min(_SHOWN, ceil(len(most) / 2))
    groups = (("most", most.head(count)), ("least", least.head(count)))
    figure = Figure(figsize=(2.3 * count, 5.9), layout="constrained")
    for line, (which, rows) in zip(figure.subplots(2, count, squeeze=False), groups, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, (_, row) in zip(line, rows.iterrows(), strict=False):
            values = np.frombuffer(base64.b64decode(row["map"]), dtype=np.uint8).astype(float)
            side = round(len(values) ** 0.5)
            photograph = _photograph(Path(row["file"]))
            shown = np.asarray(
                Image.fromarray(values.reshape(side, side).astype(np.float32)).resize(
                    (224, 224), Image.Resampling.BILINEAR
                )
            )
            caption = "\n".join(
                [
                    f"{which} faithful: {measure.replace('_', ' ')} {row[column]:.2f}",
                    str(row["method"]),
                    *textwrap.wrap(str(row["category"]), 28)[:1],
                ]
            )
            visualization.visualize_image_attr(
                shown[..., None] / 255,
                photograph,
                "blended_heat_map" if shown.any() else "original_image",
                sign="positive",
                cmap="turbo",
                alpha_overlay=0.55,
                outlier_perc=0,
                plt_fig_axis=(figure, axis),
                use_pyplot=False,
            )
            axis.set_title(caption, fontsize=7)
    figure.savefig(file, dpi=110)


def _photograph(file: Path) -> np.ndarray:
    """The picture as the model sees it, or grey where the file is gone."""
    try:
        with Image.open(file) as image:
            fitted = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (224, 224))
    except OSError:
        return np.full((224, 224, 3), 0.5)
    return np.asarray(fitted) / 255
