"""Tables and charts from the records of a benchmark."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from captum_fusion._app.drawing import render
from captum_fusion._app.messages import one_line, printable
from captum_fusion._app.output_files import write_atomically
from captum_fusion._app.settings import MEASURES
from captum_fusion.benchmark._charts import curves_chart, explanations_chart, measures_chart
from captum_fusion.benchmark._plan import STAGES
from captum_fusion.benchmark._records import Key, Record, key_of, read_records, with_several_percentiles
from captum_fusion.benchmark._statistics import SIGNIFICANT, pairwise_tests, significance_marks

FILES = ("run.json", "summary.csv", "summary.md", "pairs.csv", "measures.png", "curves.png", "explanations.png")
_MARKS = {"best": "**{}**", "equal": "{} ≈", "untested": "{} ?", "worse": "{}"}
_REASONS = 10
_LEGEND = (
    "Cells are means with standard errors; n is the number of explanations if it differs from the column explanations. "
    "Average drop, average increase and the pointing games are in percent. Bold is the best mean. ≈ marks means that "
    "are not significantly worse (Wilcoxon's signed-rank test of the paired values, adjusted by Benjamini and "
    f"Yekutieli, {SIGNIFICANT:g}, in the direction of the mean). ? marks methods that have no image in common with the "
    "best one. Seconds are per explanation."
)


def report(folder: str | Path) -> pd.DataFrame:
    """Writes the tables and charts of a benchmark from its records.

    - summary.csv: for each model and method, the means with their standard errors and numbers of explanations, and the
      measured seconds
    - summary.md: the same tables, with marks for the best value of each measure and for values that are not
      significantly worse; then notes, such as the images that are left out, and the errors
    - pairs.csv: a test of each pair of methods. It has the mean difference with its 95 % interval by Student's t
      (interval_low, interval_high), and the p value of Wilcoxon's signed-rank test (exact up to 50 images), also
      adjusted for the number of pairs by Benjamini and Yekutieli. The effect size is the matched-pairs rank-biserial
      correlation: 1 if the first method's value is higher for every image, -1 if the second method's value is. The
      column better names the significantly better method, if any
    - measures.png: the difference of each method from the best method, over the images that both explained
    - curves.png: the same differences along the insertion and deletion curves
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
    """The tables of a benchmark."""

    summary: pd.DataFrame
    pairs: pd.DataFrame
    measures: list[str]
    errors: list[tuple[int, str, str]]
    """The number of each error, its text and an image for example; the most frequent first."""
    notes: list[str]

    @property
    def explained(self) -> int:
        """The number of explanations."""
        return int(self.summary["explanations"].sum())

    def reasons(self) -> str:
        """The errors in one line."""
        return "; ".join(f"{count} x {text}" for count, text, _ in self.errors[:_REASONS])

    def _subjects(self) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
        """Each model with its rows of the summary and its paired tests."""
        for subject, rows in self.summary.groupby("subject", observed=True, sort=False):
            yield str(subject), rows, self.pairs[self.pairs["subject"] == subject]

    def markdown(self) -> str:
        """The content of summary.md."""
        lines = []
        for subject, rows, tests in self._subjects():
            columns = {"method": list(rows["method"])}
            columns |= {name: [str(count) for count in rows[name]] for name in ("explanations", "errors")}
            for name in self.measures:
                means, pairs = rows.set_index("method")[name], tests[tests["measure"] == name]
                marks = significance_marks(means, pairs, MEASURES[name].higher)
                columns[f"{name.replace('_', ' ')} {MEASURES[name].arrow}"] = [
                    _MARKS[marks[method]].format(cell) if method in marks else ""
                    for method, cell in zip(rows["method"], _cells(rows, name), strict=True)
                ]
            columns["seconds"] = _seconds(rows)
            lines += [f"## {_plain(subject)}", "", *_markdown_table(columns), ""]
        lines += [_LEGEND, "", *(part for note in self.notes for part in (_plain(note), ""))]
        if self.errors:
            errors = self.errors[:_REASONS]
            if len(self.errors) > _REASONS:
                errors.append((sum(count for count, _, _ in self.errors[_REASONS:]), "others, see the records", ""))
            counts, texts, examples = ([str(value) for value in column] for column in zip(*errors, strict=True))
            table = _markdown_table({"times": counts, "error": texts, "for example": examples}, "| ---: | --- | --- |")
            lines += ["## Errors", "", *table, ""]
        return "\n".join(lines)

    def show(self, console: Console) -> None:
        """Prints the tables, in as many parts as the width needs."""
        lines = []
        for subject, rows, _ in self._subjects():
            columns = {"n": [str(count) for count in rows["explanations"]]}
            if rows["errors"].any():
                columns["errors"] = [str(count) for count in rows["errors"]]
            columns |= {f"{MEASURES[name].short} {MEASURES[name].arrow}": _cells(rows, name) for name in self.measures}
            columns["seconds"] = _seconds(rows)
            table = pd.DataFrame(columns, index=list(rows["method"]))
            lines += [str(subject), *table.to_string(line_width=console.width).splitlines(), ""]
        if self.measures:
            lines.append(", ".join(f"{MEASURES[name].short} {name.replace('_', ' ')}" for name in self.measures))
        lines += [*self.notes, *(f"{count} x {text} ({example})" for count, text, example in self.errors[:_REASONS])]
        for line in lines:
            # What the terminal cannot show, an arrow or a file's name, ends no finished run.
            text = printable(line).encode(console.encoding, "replace").decode(console.encoding)
            console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _markdown_table(columns: Mapping[str, Sequence[str]], rule: str = "") -> list[str]:
    rows = [columns.keys(), *zip(*columns.values(), strict=True)]
    lines = [f"| {' | '.join(_plain(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return [lines[0], rule or f"| --- {'| ---: ' * (len(columns) - 1)}|", *lines[1:]]


def _plain(text: object) -> str:
    """A text in one line without HTML."""
    return printable(one_line(text)).replace("<", "&lt;")


def write_report(folder: Path, environment: Mapping[str, Any] | None = None) -> Report:
    """Writes the files of ``report``, and run.json where the environment is given."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    by_key = read_records(folder)
    if not by_key:
        raise ValueError(f"{folder} holds no benchmark: there are no records")
    run = folder / "run.json"
    if environment is not None:
        write_atomically(run, json.dumps(environment, indent=2) + "\n")
    try:
        left_out = json.loads(run.read_text()).get("notes", []) if run.is_file() else []
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{run} is damaged ({error}); remove it, or run the benchmark again") from error
    records = _table(by_key)
    measures = [
        name
        for name, measure in MEASURES.items()
        if measure.column in records and records[measure.column].notna().any()
    ]
    notes = [*left_out, *_notes(records)]
    result = Report(_summary(records, measures), _pairs(records, measures), measures, _errors(records), notes)
    for name, table in (("summary.csv", result.summary), ("pairs.csv", result.pairs)):
        write_atomically(folder / name, table.drop(columns="subject").to_csv(index=False, float_format="%.6g"))
    write_atomically(folder / "summary.md", result.markdown())
    if measures:  # There are none where nothing but errors was recorded.
        write_atomically(folder / "measures.png", render(measures_chart(records, measures, result.pairs), ".png"))
        write_atomically(folder / "explanations.png", render(explanations_chart(records, measures), ".png"))
    curves = curves_chart(records)
    if curves is not None:
        write_atomically(folder / "curves.png", render(curves, ".png"))
    return result


def _table(by_key: Mapping[Key, Record]) -> pd.DataFrame:
    """The records with the names of their rows, in the order of models and methods, stage by stage.

    A stage that several methods share is there once.
    """
    several = with_several_percentiles(by_key)
    bases = list(dict.fromkeys(key.base for key in by_key))
    stages = [*STAGES, None]
    order: dict[str, tuple[int, int]] = {}
    rows = []
    for key, record in by_key.items():
        subject = f"{key.model}, {key.layer}{'' if key.weights == 'default' else f', weights {key.weights}'}"
        order[key.label(several)] = (bases.index(key.base), stages.index(key.stage))
        rows.append({**record, "subject": subject, "label": key.label(several)})
    records = pd.DataFrame(rows)
    for name in ("error", "note", "empty", "seconds"):
        if name not in records:
            records[name] = None
    if {"insertion", "deletion"} <= set(records):
        records["overall"] = records["insertion"] - records["deletion"]
    subjects = records["subject"].unique()
    records = records.sort_values("error", key=pd.Series.notna, kind="stable")
    records = records.drop_duplicates(["subject", "label", "image", "requested"])
    records["label"] = pd.Categorical(records["label"], sorted(order, key=order.__getitem__), ordered=True)
    records["subject"] = pd.Categorical(records["subject"], list(subjects), ordered=True)
    return records.sort_values(["subject", "label", "image", "requested"], ignore_index=True)


def _summary(records: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    rows = []
    for (subject, label), group in records.groupby(["subject", "label"], observed=True, sort=True):
        key = key_of(group.iloc[0])
        row: dict[str, Any] = {"subject": str(subject), "model": key.model, "weights": key.weights, "layer": key.layer}
        row |= {"method": str(label), "explanations": int(group["error"].isna().sum())}
        row["errors"] = len(group) - row["explanations"]
        for name in measures:
            values = group[MEASURES[name].column].dropna().astype(float) * MEASURES[name].scale
            row |= {name: values.mean(), f"{name}_standard_error": values.sem(), f"{name}_n": len(values)}
        seconds = group["seconds"].dropna().astype(float)
        rows.append(row | {"seconds": seconds.mean(), "seconds_standard_error": seconds.sem()})
    return pd.DataFrame(rows)


def _pairs(records: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    tables = []
    for subject, group in records.groupby("subject", observed=True):
        values = {
            name: group.assign(value=group[MEASURES[name].column].astype(float) * MEASURES[name].scale).pivot(
                index=["image", "requested"], columns="label", values="value"
            )
            for name in measures
        }
        key, pairs = key_of(group.iloc[0]), pairwise_tests(values)
        for position, name in enumerate(("subject", "model", "weights", "layer")):
            pairs.insert(position, name, str(subject) if name == "subject" else getattr(key, name))
        tables.append(pairs)
    return pd.concat(tables, ignore_index=True)


def _errors(records: pd.DataFrame) -> list[tuple[int, str, str]]:
    failed = records[records["error"].notna()]
    examples = dict(zip(failed["error"][::-1], failed["image"][::-1], strict=True))
    return [(count, text, examples[text]) for text, count in Counter(failed["error"]).most_common()]


def _notes(records: pd.DataFrame) -> list[str]:
    """Remarks on the tables."""
    notes = []
    explained = records[records["error"].isna()]
    for (subject, label), group in explained.groupby(["subject", "label"], observed=True):
        empty = int((group["empty"] == True).sum())  # noqa: E712  (missing where there was an error)
        if empty:
            notes.append(
                f"{subject}: {empty} of the {len(group)} maps of {label} are empty: no positive evidence for the class."
            )
    for subject, group in explained.groupby("subject", observed=True):
        of_labels = [
            set(zip(rows["image"], rows["requested"], strict=True)) for _, rows in group.groupby("label", observed=True)
        ]
        if any(other != of_labels[0] for other in of_labels):
            notes.append(
                f"{subject}: the means are not over the same images, because not all methods explained the same "
                "images; each paired test uses the images that both methods explained."
            )
    for name, measure in MEASURES.items():
        if measure.needs and measure.column in explained and explained[measure.column].isna().all():
            notes.append(f"{name.replace('_', ' ')} has no value: no image shows an object of the explained class.")
    for note, count in Counter(records.drop_duplicates("image")["note"].dropna()).items():
        notes.append(f"{count} image{'s' if count > 1 else ''}: {note}.")
    return notes


def _cells(rows: pd.DataFrame, measure: str) -> list[str]:
    """The mean of each row with its standard error, and of how many images it is where not of all."""
    digits = 1 if MEASURES[measure].scale == 100 else 3
    cells = []
    columns = rows[[measure, f"{measure}_standard_error", f"{measure}_n", "explanations"]]
    for mean, error, count, explanations in columns.itertuples(index=False):
        cell = f"{mean:.{digits}f}" if count == 1 else f"{mean:.{digits}f} ± {error:.{digits}f}"
        cells.append("" if not count else cell if count == explanations else f"{cell} (n {count})")
    return cells


def _seconds(rows: pd.DataFrame) -> list[str]:
    return [f"{seconds:.2f}" if seconds == seconds else "" for seconds in rows["seconds"]]
