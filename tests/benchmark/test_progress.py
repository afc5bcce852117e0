"""The progress on standard error."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from captum_fusion.benchmark._progress import ProgressReport
from captum_fusion.benchmark._records import Record, key_of
from tests.benchmark.conftest import made_up


def append(folder: Path, rank: int, *records: Any) -> tuple[Record, ...]:
    with (folder / f"records-{rank:05d}.jsonl").open("a") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)
    return records


def printed(progress: ProgressReport) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(progress.table())
    return console.export_text()


def test_it_counts_the_records_of_all_processes_and_times_this_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = {
        image: [made_up(method, image, confidence_drop=0.25) for method in ("a", "b")]
        for image in (f"{index}.jpg" for index in range(100))
    }
    images = list(everything)
    before, left = images[:90], images[90:]
    append(tmp_path, 0, *(record for image in before for record in everything[image]))
    done: Any = {key_of(record): record for image in before for record in everything[image]}
    pending = {key_of(everything[image][0]).item: set(map(key_of, everything[image])) for image in left}
    now = [1000.0]
    own = tmp_path / "records-00000.jsonl"
    progress = ProgressReport(tmp_path, 100, pending, done, ["confidence_drop"], own, clock=lambda: now[0])
    assert progress.line() == "90 of 100 images"

    # In 40 seconds, this process finishes one picture, another one finishes one and half of the next.
    append(tmp_path, 1, *everything[left[1]], everything[left[2]][0])
    with (tmp_path / "records-00001.jsonl").open("a") as stream:
        stream.write('{"half of a line')
    now[0] += 20
    progress.add(append(tmp_path, 0, everything[left[0]][0]))
    assert capsys.readouterr().err == ""
    now[0] += 20
    progress.add(append(tmp_path, 0, everything[left[0]][1]))
    # Eight are left, at twenty seconds each: earlier runs do not count. No terminal: a line each half minute.
    expected = "92 of 100 images, 0.05 per second, 0:02:40 left"
    assert capsys.readouterr().err == f"captum-fusion: {expected}\n"
    text = printed(progress)
    assert expected in text
    # The means of the metrics that were asked for, over 90 + 2 pictures of b, and one more of a.
    assert "AD ↓" in text
    assert "AI" not in text
    assert text.count("25 ± 0") == 2
    assert "93" in text
    assert "92" in text
