"""Writes the page of the evidence, its tables and its pictures from the records of the runs."""

import re
from pathlib import Path

from benchmarks.evidence_charts import charts
from benchmarks.evidence_runs import Runs
from benchmarks.evidence_tables import comparisons, tables
from captum_fusion._app.drawing import rendered
from captum_fusion._app.output_files import write_whole

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "evidence"


def write(output: Path, results: Path = RESULTS) -> None:
    """Writes the tables, the pictures, and the page around them.

    Args:
        output (Path): The folder with a folder of records for each run.
        results (Path): The folder to write to. Default: the committed one
    """
    runs = Runs(output)
    results.mkdir(parents=True, exist_ok=True)
    write_whole(results / "comparisons.csv", comparisons(runs).to_csv(index=False, float_format="%.5g"))
    for name, chart in charts(runs).items():
        write_whole(results / f"{name}.png", rendered(chart, ".png"))
    page = (HERE / "evidence_page.template").read_text(encoding="utf-8")
    for name, table in tables(runs, output).items():
        page = page.replace(f"<!-- {name} -->", table)
    write_whole(results / "README.md", re.sub("<!-- [^ ]+ -->", "Not measured.", page))
