"""The pictures of a benchmark's report."""

import base64
import textwrap
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from captum_fusion._photograph import open_photograph
from captum_fusion._picture import overlay
from captum_fusion.benchmark._measures import MEASURES
from captum_fusion.benchmark._records import CURVES

_SHOWN = 6
_SIDE = 224
# About the width of a letter in inches.
_LETTER = 0.09


def measures_chart(summary: pd.DataFrame, measures: Sequence[str]) -> Figure:
    """The means of all methods with their standard errors."""
    several = summary["subject"].nunique() > 1
    labels = [f"{row['subject']}: {row['method']}" if several else str(row["method"]) for _, row in summary.iterrows()]
    width = 3.0 * len(measures) + 0.5 + _LETTER * max(map(len, labels))
    figure = Figure(figsize=(width, 0.9 + 0.26 * len(summary)), layout="constrained")
    axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axis, measure in zip(axes, measures, strict=True):
        errors = summary[f"{measure}_standard_error"]
        axis.errorbar(summary[measure], range(len(summary)), xerr=errors, fmt="o", markersize=4, capsize=2)
        axis.grid(axis="x", linewidth=0.4)
        axis.set_title(
            f"{measure.replace('_', ' ')} ({'higher' if MEASURES[measure].higher else 'lower'} is better)", size=9
        )
        axis.set_yticks(range(len(summary)), labels)
    axes[0].invert_yaxis()
    return figure


def curves_chart(records: pd.DataFrame) -> Figure | None:
    """The mean insertion and deletion curves of each model; None where there are none."""
    curves = [name for name in CURVES if name in records]
    if not curves:
        return None
    subjects = list(records["subject"].unique())
    longest = max(map(len, records["label"].cat.categories))
    size = (4.6 * len(curves) + 1 + _LETTER * longest, 3.6 * len(subjects))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(subjects), len(curves), squeeze=False)
    for line, subject in zip(axes, subjects, strict=True):
        for axis, curve in zip(line, curves, strict=True):
            of_subject = records[records["subject"] == subject]
            for method, group in of_subject.groupby("label", observed=True):
                rows = group[curve].dropna().tolist()
                if rows:
                    mean = np.mean(rows, axis=0)
                    axis.plot(np.linspace(0, 1, len(mean)), mean, label=method, linewidth=1.2)
            done = "restored" if curve == "insertion_curve" else "removed"
            axis.set(
                xlabel=f"share of the pixels {done}",
                ylabel="mean probability",
                title=textwrap.fill(f"{subject}: {curve.partition('_')[0]}", 44),
            )
        handles, labels = line[-1].get_legend_handles_labels()
        line[-1].legend(handles, labels, fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def explanations_chart(records: pd.DataFrame, measures: Sequence[str]) -> Figure:
    """The explanations with the best and the worst values of the first measure that tells them apart."""
    measure = next(name for name in ("overall", "average_drop", *measures) if name in measures)
    column, higher = MEASURES[measure].column, MEASURES[measure].higher
    judged = records.dropna(subset=[column, "map"])
    ranked = judged.sort_values(column, ascending=not higher, kind="stable")
    # Each picture once: by its best and by its worst explanation.
    most, least = ranked.drop_duplicates("image"), ranked[::-1].drop_duplicates("image")
    count = max(1, min(_SHOWN, ceil(len(most) / 2)))
    groups = (("most", most.head(count)), ("least", least.head(count)))
    figure = Figure(figsize=(2.3 * count, 5.9), layout="constrained")
    for line, (which, rows) in zip(figure.subplots(2, count, squeeze=False), groups, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, (_, row) in zip(line, rows.iterrows(), strict=False):
            values = np.frombuffer(base64.b64decode(row["map"]), dtype=np.uint8)
            side = round(len(values) ** 0.5)
            shown = Image.fromarray(values.reshape(side, side).astype(np.float32))
            photograph, remark = as_seen(Path(row["file"]), row["frame"])
            overlay(axis, photograph, np.asarray(shown.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)) / 255)
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


def as_seen(file: Path, frame: Sequence[float]) -> tuple[np.ndarray, str]:
    """The part of a picture that the model saw; grey, with a remark, where the file is gone."""
    try:
        image = open_photograph(file).image
    except (OSError, ValueError):
        return np.full((_SIDE, _SIDE, 3), 0.5), "picture gone"
    width, height = image.size
    box = (max(frame[0], 0), max(frame[1], 0), min(frame[2], width), min(frame[3], height))
    return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, box=box)) / 255, ""
