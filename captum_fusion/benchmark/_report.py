"""Tables and pictures from the records of a benchmark."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from captum_fusion._app.atomic_files import write_whole
from captum_fusion._app.drawing import rendered
from captum_fusion.benchmark._charts import curves_chart, explanations_chart, measures_chart
from captum_fusion.benchmark._measures import MEASURES
from captum_fusion.benchmark._plan import STAGES
from captum_fusion.benchmark._records import Key, Record, key_of, read_records, with_several_percentiles
from captum_fusion.benchmark._statistics import SIGNIFICANT, on_different_pictures, pairwise_tests, significance_marks
from captum_fusion.metrics.means import mean_of

FILES = ("run.json", "summary.csv", "summary.md", "pairs.csv", "measures.png", "curves.png", "explanations.png")
_SIGNS = {"best": "**{}**", "equal": "{} ≈", "untested": "{} ?", "worse": "{}"}
_REASONS = 10


def report(folder: str | Path) -> pd.DataFrame:
    """Writes the tables and pictures of a benchmark from its records.

    - summary.csv: for each model and method the means with their standard errors; what is measured in seconds last
    - summary.md: the same, with the best value of each measure, those that do not differ from it significantly, and
      what went wrong
    - pairs.csv: the paired test of each two methods: Wilcoxon's signed-rank test (exact up to 50 pictures), adjusted
      for the number of pairs by Benjamini and Yekutieli, with the matched-pairs rank-biserial correlation as the effect
      size: 1 where the first method's value is the higher one for every picture, -1 where the second one's is
    - measures.png: how far each method is from the best one, over the pictures that both explained
    - curves.png: the same along the insertion and deletion curves
    - explanations.png: the most and least faithful explanations

    Args:
        folder (str or Path): The output folder of a benchmark.

    Returns:
        *pandas.DataFrame* of summary.csv.

    Raises:
        ValueError: If the folder holds no records.
    """
    return write_report(Path(folder)).summary.drop(columns="subject")


@dataclass(frozen=True)
class Report:
    """What a benchmark found."""

    summary: pd.DataFrame
    pairs: pd.DataFrame
    measures: list[str]
    errors: list[tuple[int, str, str]]
    """How often something went wrong, what, and with which picture for example; the most frequent first."""
    notes: list[str]

    @property
    def explained(self) -> int:
        """How many explanations there are."""
        return int(self.summary["explanations"].sum())

    def reasons(self) -> str:
        """What went wrong, in a line."""
        return "; ".join(f"{count} x {text}" for count, text, _ in self.errors[:_REASONS])

    def markdown(self) -> str:
        """The content of summary.md."""
        lines = []
        for subject, rows in self.summary.groupby("subject", observed=True, sort=False):
            shown = [f"{name.replace('_', ' ')} {'↑' if MEASURES[name].higher else '↓'}" for name in self.measures]
            lines += [f"## {subject}", "", f"| {' | '.join(['method', 'explanations', 'errors', *shown, 'seconds'])} |"]
            lines += [f"| --- {'| ---: ' * (len(shown) + 3)}|"]
            marks = self._marks(str(subject), rows)
            for _, row in rows.iterrows():
                cells = []
                for measure in self.measures:
                    cell = _cell(row, measure)
                    cells.append(_SIGNS[marks[measure][row["method"]]].format(cell) if cell else "")
                start = [str(row[name]) for name in ("method", "explanations", "errors")]
                lines.append(f"| {' | '.join([*start, *cells, _seconds(row)])} |")
            lines.append("")
        lines += [
            "Means with their standard errors; average drop and increase and the pointing games in percent. Bold is "
            "the best mean; ≈ marks those that do not differ from it significantly (Wilcoxon's signed-rank test of the "
            f"paired values, adjusted by Benjamini and Yekutieli, {SIGNIFICANT:g}); ? marks those that have no picture "
            "in common with it. Seconds are those of one explanation.",
            "",
        ]
        lines += [part for note in self.notes for part in (note, "")]
        if self.errors:
            lines += ["## Errors", "", "| times | what | for example |", "| ---: | --- | --- |"]
            lines += [
                f"| {count} | {text.replace('|', chr(92) + '|')} | {example} |"
                for count, text, example in self.errors[:_REASONS]
            ]
            if len(self.errors) > _REASONS:
                lines.append(f"| {sum(count for count, _, _ in self.errors[_REASONS:])} | others, see the records | |")
            lines.append("")
        return "\n".join(lines)

    def _marks(self, subject: str, rows: pd.DataFrame) -> dict[str, dict[str, str]]:
        of_subject = self.pairs[self.pairs["subject"] == subject]
        return {
            measure: significance_marks(
                rows.set_index("method")[measure],
                of_subject[of_subject["measure"] == measure],
                MEASURES[measure].higher,
            )
            for measure in self.measures
        }

    def show(self, console: Console) -> None:
        """Prints the tables, in as many parts as the width needs, with every name whole."""
        lines = []
        for subject, rows in self.summary.groupby("subject", observed=True, sort=False):
            columns = {"n": [str(row["explanations"]) for _, row in rows.iterrows()]}
            if rows["errors"].any():
                columns["errors"] = [str(row["errors"]) for _, row in rows.iterrows()]
            for name in self.measures:
                arrow = "↑" if MEASURES[name].higher else "↓"
                columns[f"{MEASURES[name].short} {arrow}"] = [_cell(row, name) for _, row in rows.iterrows()]
            columns["seconds"] = [_seconds(row) for _, row in rows.iterrows()]
            lines += [str(subject), *_parts([str(method) for method in rows["method"]], columns, console.width)]
        if self.measures:
            lines.append(", ".join(f"{MEASURES[name].short} {name.replace('_', ' ')}" for name in self.measures))
        lines += self.notes
        lines += [f"{count} x {text} ({example})" for count, text, example in self.errors[:_REASONS]]
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _parts(methods: Sequence[str], columns: Mapping[str, Sequence[str]], width: int) -> list[str]:
    """The lines of a table, in parts that are no wider than this but for one column each."""
    first = max(map(len, ["method", *methods]))
    start = [name.ljust(first) for name in ("method", *methods)]
    done: list[str] = []
    part = start
    for name, cells in columns.items():
        column = max(map(len, [name, *cells]))
        if part is not start and len(part[0]) + 2 + column > width:
            done += [*part, ""]
            part = start
        part = [f"{line}  {cell.rjust(column)}" for line, cell in zip(part, [name, *cells], strict=True)]
    return [*done, *part, ""]


def write_report(folder: Path, environment: Mapping[str, Any] | None = None) -> Report:
    """Writes everything that ``report`` tells of, and run.json where the environment is given."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    found = read_records(folder)
    if not found:
        raise ValueError(f"{folder} holds no benchmark: there are no records")
    if environment is not None:
        write_whole(folder / "run.json", json.dumps(environment, indent=2) + "\n")
    records = _table(found)
    measures = [
        name
        for name, measure in MEASURES.items()
        if measure.column in records and records[measure.column].notna().any()
    ]
    result = Report(_summary(records, measures), _pairs(records, measures), measures, _errors(records), _notes(records))
    public = result.summary.drop(columns="subject")
    write_whole(folder / "summary.csv", public.to_csv(index=False, float_format="%.6g"))
    write_whole(folder / "pairs.csv", result.pairs.drop(columns="subject").to_csv(index=False, float_format="%.6g"))
    write_whole(folder / "summary.md", result.markdown())
    if measures:  # There are none where nothing but errors was recorded.
        write_whole(folder / "measures.png", rendered(measures_chart(records, measures), ".png"))
        write_whole(folder / "explanations.png", rendered(explanations_chart(records, measures), ".png"))
    curves = curves_chart(records)
    if curves is not None:
        write_whole(folder / "curves.png", rendered(curves, ".png"))
    return result


def _table(found: Mapping[Key, Record]) -> pd.DataFrame:
    """The records with the names of their rows, in the order in which models and methods came, stage by stage.

    A stage that several methods share is there once.
    """
    several = with_several_percentiles(found)
    bases = list(dict.fromkeys(key.base for key in found))
    stages = [*STAGES, None]
    order: dict[str, tuple[int, int]] = {}
    subjects: dict[str, None] = {}
    rows = []
    for key, record in found.items():
        subject = f"{key.model}, {key.layer}{'' if key.weights == 'default' else f', weights {key.weights}'}"
        subjects[subject] = None
        order[key.label(several)] = (bases.index(key.base), stages.index(key.stage))
        rows.append(record | {"subject": subject, "label": key.label(several)})
    records = pd.DataFrame(rows)
    for name in ("error", "note", "empty", "seconds"):
        if name not in records:
            records[name] = None
    if {"insertion", "deletion"} <= set(records):
        records["overall"] = records["insertion"] - records["deletion"]
    records = records.sort_values("error", key=pd.Series.notna, kind="stable")
    records = records.drop_duplicates(["subject", "label", "image", "requested"])
    records["label"] = pd.Categorical(records["label"], sorted(order, key=order.__getitem__), ordered=True)
    records["subject"] = pd.Categorical(records["subject"], list(subjects), ordered=True)
    return records.sort_values(["subject", "label", "image", "requested"], ignore_index=True)


def _summary(records: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    rows = []
    for (subject, label), group in records.groupby(["subject", "label"], observed=True, sort=True):
        key = key_of(group.iloc[0])
        row: dict[str, Any] = {
            "subject": str(subject),
            "model": key.model,
            "weights": key.weights,
            "layer": key.layer,
            "method": str(label),
            "explanations": int(group["error"].isna().sum()),
            "errors": int(group["error"].notna().sum()),
        }
        for name in measures:
            mean = mean_of((group[MEASURES[name].column].dropna().astype(float) * MEASURES[name].scale).tolist())
            row |= {name: mean.mean, f"{name}_standard_error": mean.standard_error}
        seconds = mean_of(group["seconds"].dropna().astype(float).tolist())
        rows.append(row | {"seconds": seconds.mean, "seconds_standard_error": seconds.standard_error})
    return pd.DataFrame(rows)


def _pairs(records: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    tables = []
    for subject, of_subject in records.groupby("subject", observed=True):
        values = {
            name: of_subject.assign(value=of_subject[MEASURES[name].column].astype(float) * MEASURES[name].scale).pivot(
                index=["image", "requested"], columns="label", values="value"
            )
            for name in measures
        }
        key = key_of(of_subject.iloc[0])
        pairs = pairwise_tests(values)
        for device, (name, value) in enumerate(
            [("subject", str(subject)), ("model", key.model), ("weights", key.weights), ("layer", key.layer)]
        ):
            pairs.insert(device, name, value)
        tables.append(pairs)
    return pd.concat(tables, ignore_index=True)


def _errors(records: pd.DataFrame) -> list[tuple[int, str, str]]:
    failed = records[records["error"].notna()]
    counts = Counter(failed["error"])
    examples = dict(zip(failed["error"][::-1], failed["image"][::-1], strict=True))
    return [(count, text, examples[text]) for text, count in counts.most_common()]


def _notes(records: pd.DataFrame) -> list[str]:
    """What a reader of the tables ought to know."""
    notes = []
    for (subject, label), group in records.groupby(["subject", "label"], observed=True):
        empty = int((group["empty"] == True).sum())  # noqa: E712  (missing where there was an error)
        if empty:
            notes.append(
                f"{subject}: {empty} of the {int(group['error'].isna().sum())} maps of {label} are empty: by them "
                "nothing speaks for the class."
            )
    for subject, group in records[records["error"].isna()].groupby("subject", observed=True):
        explained = [
            set(zip(rows["image"], rows["requested"], strict=True)) for _, rows in group.groupby("label", observed=True)
        ]
        if on_different_pictures(explained):
            notes.append(
                f"{subject}: not all methods explained the same pictures, so that their means are of different ones; "
                "the tests take those that two have in common."
            )
    pictures = records.drop_duplicates("image")
    for note, count in Counter(pictures["note"].dropna()).items():
        notes.append(f"{count} picture{'s' if count > 1 else ''}: {note}.")
    return notes


def _cell(row: "pd.Series[Any]", measure: str) -> str:
    mean, error = row[measure], row[f"{measure}_standard_error"]
    digits = 1 if MEASURES[measure].scale == 100 else 3
    if np.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" if np.isnan(error) else f"{mean:.{digits}f} ± {error:.{digits}f}"


def _seconds(row: "pd.Series[Any]") -> str:
    return "" if np.isnan(row["seconds"]) else f"{row['seconds']:.2f}"
