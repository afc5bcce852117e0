import json
from pathlib import Path
from typing import Any

from rich.console import Console

from captum_fusion.benchmark._progress import Progress
from captum_fusion.benchmark._records import key_of
from tests.benchmark.conftest import made_up


def append(folder: Path, rank: int, *records: dict[str, Any]) -> None:
    with (folder / f"records-{rank:05d}.jsonl").open("a") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)


def shown(progress: Progress) -> str:
    console = Console(width=100, record=True, file=(Path(progress.folder) / "shown").open("w"))
    console.print(progress._shown())
    return console.export_text()


def test_it_counts_what_all_processes_do_and_times_what_this_run_did(tmp_path: Path) -> None:
    everything = {
        image: [made_up(method, image, confidence_drop=0.25) for method in ("a", "b")]
        for image in (f"{index}.jpg" for index in range(100))
    }
    images = list(everything)
    before, left = images[:90], images[90:]
    append(tmp_path, 0, *(record for image in before for record in everything[image]))
    done = {key_of(record): record for image in before for record in everything[image]}
    pending = {key_of(everything[image][0]).item: set(map(key_of, everything[image])) for image in left}
    now = [1000.0]
    progress = Progress(tmp_path, 100, pending, done, clock=lambda: now[0])
    progress.poll()
    assert progress.rate() == ""
    assert "90/100" in shown(progress)

    # In 40 seconds, one process finishes one picture, another one finishes one and half of the next.
    append(tmp_path, 0, *everything[left[0]])
    append(tmp_path, 1, *everything[left[1]], everything[left[2]][0])
    with (tmp_path / "records-00001.jsonl").open("a") as stream:
        stream.write('{"half of a line')
    now[0] += 40
    progress.poll()
    text = shown(progress)
    assert "92/100" in text
    # Eight are left, at twenty seconds each. What was there before took none of this time.
    assert "0.05 per second, 0:02:40 left" in text
    assert "25.0 ± 0.0" in text
    assert "93" in text
