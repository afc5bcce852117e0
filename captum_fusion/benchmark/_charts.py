"""The charts of a benchmark's report."""

import base64
import textwrap
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from captum_fusion._app.drawing import overlay
from captum_fusion._app.images import open_photograph
from captum_fusion._app.methods import CONTROLS
from captum_fusion._app.settings import MEASURES
from captum_fusion.benchmark._records import CURVES
from captum_fusion.benchmark._statistics import interval, significance_marks

_EXAMPLES = 6
_SIDE = 224
# About the width of a letter in inches.
_LETTER = 0.09
_BESIDE: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "va": "center"}


def measures_chart(records: pd.DataFrame, measures: Sequence[str], pairs: pd.DataFrame) -> Figure:
    """The difference of each method from the best one in each measure, over the images that both explained.

    Red methods are significantly worse by the same tests as in the tables.
    """
    subjects = list(records["subject"].unique())
    labels = {subject: _labels(records, subject) for subject in subjects}
    longest = max(len(label) for names in labels.values() for label in names)
    heights = [0.7 + 0.26 * len(labels[subject]) for subject in subjects]
    figure = Figure(
        figsize=(2.6 * len(measures) + 0.3 + _LETTER * longest, sum(heights) + 0.5), layout="constrained", dpi=120
    )
    grid = figure.subplots(len(subjects), len(measures), squeeze=False, height_ratios=heights, sharex="col")
    for line, subject in zip(grid, subjects, strict=True):
        for axis, name in zip(line, measures, strict=True):
            measure = MEASURES[name]
            values = _values(records, subject, measure.column).astype(float) * measure.scale
            tests = pairs[(pairs["subject"] == subject) & (pairs["measure"] == name)]
            marks = significance_marks(values.mean(), tests, measure.higher)
            best = next((label for label, mark in marks.items() if mark == "best"), None)
            for position, label in enumerate(labels[subject]):
                if label == best:
                    axis.plot(0, position, "D", color="black", markersize=5)
                    axis.annotate(f"{values[best].mean():.3g}", (0, position), (6, 0), **_BESIDE)
                elif label in values and len(both := (values[label] - values[best]).dropna()):
                    mean, half = interval(both.to_numpy())
                    color = "tab:red" if marks[label] == "worse" else "0.6"
                    axis.errorbar(mean, position, xerr=half, fmt="o", markersize=4, capsize=2, color=color)
            axis.axvline(0, color="black", linewidth=0.6)
            axis.grid(axis="x", linewidth=0.4)
            direction = f"{'higher' if measure.higher else 'lower'} is better"
            axis.set_title(f"{name.replace('_', ' ')}\n{direction}", size=9)
            axis.set_ylim(len(labels[subject]) - 0.4, -0.6)
            axis.set_yticks(range(len(labels[subject])), labels[subject] if axis is line[0] else [])
        if len(subjects) > 1:
            line[0].set_title(f"{subject}\n{line[0].get_title()}", size=9, loc="left")
    figure.supxlabel(
        "paired difference from the best one (black, with its mean) and its 95 % interval; red: significantly worse",
        size=9,
    )
    return figure


def curves_chart(records: pd.DataFrame) -> Figure | None:
    """The difference of each method's insertion and deletion curves from the best ones; None without curves."""
    curves = [name for name in CURVES if name in records]
    if not curves:
        return None
    subjects = list(records["subject"].unique())
    rows = [(subject, label) for subject in subjects for label in _labels(records, subject)]
    longest = max(len(label) for _, label in rows)
    figure = Figure(
        figsize=(3.4 * len(curves) + 0.4 + _LETTER * longest, 0.55 * len(rows) + 0.9), layout="constrained", dpi=120
    )
    grid = figure.subplots(len(rows), len(curves), squeeze=False, sharex=True)
    for column, curve in enumerate(curves):
        area, higher = curve.partition("_")[0], MEASURES[curve.partition("_")[0]].higher
        farthest = 0.0
        for row, (subject, label) in enumerate(rows):
            axis = grid[row][column]
            areas, lines = _values(records, subject, area), _values(records, subject, curve)
            means = areas.astype(float).mean()
            best = means.idxmax() if higher else means.idxmin()
            both = lines[[label, best]].dropna() if label in lines else lines[:0]
            if label != best and len(both):
                mean, half = interval(np.stack(both[label].to_numpy()) - np.stack(both[best].to_numpy()))
                share = np.linspace(0, 1, len(mean))
                axis.fill_between(share, mean - half, mean + half, alpha=0.3, linewidth=0)
                axis.plot(share, mean, linewidth=1.2)
                if label not in CONTROLS:
                    farthest = max(farthest, float((np.abs(mean) + np.nan_to_num(half)).max()))
            axis.axhline(0, color="black", linewidth=0.6)
            axis.tick_params(labelsize=6)
            if label == best:
                axis.annotate(f"best, area {means[best]:.3f}", (0.5, 0), (0, 4), **_BESIDE | {"ha": "center"})
            if column == 0:
                name = f"{subject}\n{label}" if len(subjects) > 1 else label
                axis.set_ylabel(name, rotation=0, ha="right", va="center", size=8)
            if row == 0:
                axis.set_title(f"{area}: {'higher' if higher else 'lower'} is better", size=9)
        # One scale, but for the controls, which are so far off that they would flatten the others.
        for row, (_, label) in enumerate(rows):
            if label not in CONTROLS and farthest:
                grid[row][column].set_ylim(-1.1 * farthest, 1.1 * farthest)
        grid[-1][column].set_xlabel(f"share of the pixels {'restored' if higher else 'removed'}", size=9)
    figure.supxlabel("probability less that of the best one, paired, and its 95 % interval", size=9)
    return figure


def _labels(records: pd.DataFrame, subject: str) -> list[str]:
    """The rows of a subject, in their order."""
    labels = set(records.loc[records["subject"] == subject, "label"])
    return [label for label in records["label"].cat.categories if label in labels]


def _values(records: pd.DataFrame, subject: str, column: str) -> pd.DataFrame:
    """The values of a column: a row for each image, a column for each method."""
    of_subject = records[records["subject"] == subject].dropna(subset=[column])
    return of_subject.pivot(index=["image", "requested"], columns="label", values=column)


def explanations_chart(records: pd.DataFrame, measures: Sequence[str]) -> Figure:
    """The explanations with the best and the worst values of the first measure."""
    measure = next(name for name in ("overall", "average_drop", *measures) if name in measures)
    column, higher = MEASURES[measure].column, MEASURES[measure].higher
    judged = records.dropna(subset=[column, "map"])
    # By chance, a control's map may be the best of an image; it explains nothing.
    explained = judged[~judged["label"].isin(CONTROLS)]
    ranked = (explained if len(explained) else judged).sort_values(column, ascending=not higher, kind="stable")
    # Each image once: by its best and by its worst explanation.
    most, least = ranked.drop_duplicates("image"), ranked[::-1].drop_duplicates("image")
    count = max(1, min(_EXAMPLES, ceil(len(most) / 2)))
    groups = (("most", most.head(count)), ("least", least.head(count)))
    figure = Figure(figsize=(2.3 * count, 5.9), layout="constrained")
    for line, (which, rows) in zip(figure.subplots(2, count, squeeze=False), groups, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, (_, row) in zip(line, rows.iterrows(), strict=False):
            values = np.frombuffer(base64.b64decode(row["map"]), dtype=np.uint8)
            side = round(len(values) ** 0.5)
            small = Image.fromarray(values.reshape(side, side).astype(np.float32))
            photograph, remark = crop_seen(Path(row["file"]), row["frame"])
            overlay(axis, photograph, np.asarray(small.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)) / 255)
            remarks = [remark] if remark else []
            remarks += ["empty map"] if row.get("empty") is True else []
            caption = "\n".join(
                [
                    f"{which} faithful: {measure.replace('_', ' ')} {row[column]:.2f}",
                    ", ".join([str(row["label"]), *remarks]),
                    *textwrap.wrap(str(row["category"]), 28)[:1],
                    *(textwrap.wrap(str(row["subject"]), 28) if records["subject"].nunique() > 1 else []),
                ]
            )
            axis.set_title(caption, fontsize=7)
    return figure


def crop_seen(file: Path, frame: Sequence[float]) -> tuple[np.ndarray, str]:
    """The part of an image that the model saw; grey, with a remark, where the file is missing."""
    try:
        image = open_photograph(file).image
    except (OSError, ValueError):
        return np.full((_SIDE, _SIDE, 3), 0.5), "image missing"
    width, height = image.size
    box = (max(frame[0], 0), max(frame[1], 0), min(frame[2], width), min(frame[3], height))
    return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, box=box)) / 255, ""
