import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from captum.attr import LayerGradCam
from PIL import Image

from captum_fusion import LayerFusionCam
from captum_fusion._models import load_classifier
from captum_fusion.benchmark import report, run
from captum_fusion.metrics import confidence_drop, confidence_increase, deletion, insertion
from tests.benchmark.conftest import MODEL

MEASURED = ["seconds", "seconds_standard_error"]
OPTIONS: dict[str, Any] = {"models": [MODEL], "layers": ["relu"], "methods": ["grad-cam", "fusion-cam"], "steps": 5}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob("records-*.jsonl")) for line in file.open()]


def deterministic(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "summary.csv").drop(columns=MEASURED)


def test_records_hold_what_the_functions_give(pictures: Path, tmp_path: Path) -> None:
    run(pictures, tmp_path / "out", **OPTIONS)
    found = {(record["image"], record["method"]): record for record in records(tmp_path / "out")}
    assert len(found) == 10
    classifier = load_classifier(MODEL, None, None, None, None)
    model, layer = classifier.model, classifier.model.relu
    for file in sorted(pictures.iterdir()):
        inputs = classifier.preprocessing.normalize(classifier.preprocessing.crop(Image.open(file)))
        target = int(model(inputs).argmax())
        for method, algorithm in (("grad-cam", LayerGradCam), ("fusion-cam", LayerFusionCam)):
            attributions = algorithm(model, layer).attribute(inputs, target=target)
            record = found[file.name, method]
            assert (record["target"], record["requested"]) == (target, "predicted")
            for metric, options in (
                (confidence_drop, {}),
                (confidence_increase, {}),
                (insertion, {"steps": 5}),
                (deletion, {"steps": 5}),
            ):
                expected = metric(model, inputs, attributions, target=target, **options).item()
                assert record[metric.__name__] == pytest.approx(expected, abs=1e-6)


def test_summary(pictures: Path, tmp_path: Path) -> None:
    run(pictures, tmp_path / "out", **OPTIONS)
    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert list(summary.columns[-2:]) == MEASURED
    assert list(summary["method"]) == ["grad-cam", "fusion-cam"]
    for _, row in summary.iterrows():
        values = pd.DataFrame([r for r in records(tmp_path / "out") if r["method"] == row["method"]])
        assert row["explanations"] == 5
        assert row["average_drop"] == pytest.approx(100 * values["confidence_drop"].mean(), rel=1e-4)
        assert row["average_increase"] == pytest.approx(100 * values["confidence_increase"].mean(), rel=1e-4)
        overall = values["insertion"] - values["deletion"]
        assert row["overall"] == pytest.approx(overall.mean(), rel=1e-4)
        assert row["overall_standard_error"] == pytest.approx(overall.sem(), rel=1e-4)
    environment = json.loads((tmp_path / "out" / "run.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["arguments"]["methods"] == ["grad-cam", "fusion-cam"]
    for name in ("curves.png", "measures.png", "explanations.png"):
        with Image.open(tmp_path / "out" / name) as drawn:
            assert np.asarray(drawn.convert("L")).std() > 5


def test_a_report_is_made_again_from_the_records(pictures: Path, tmp_path: Path) -> None:
    folder = run(pictures, tmp_path / "out", **OPTIONS)
    names = ["summary.csv", "summary.md", "pairs.csv", "measures.png"]
    before = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    report(folder)
    assert {name: (folder / name).read_bytes() for name in names} == before


def command(pictures: Path, output: Path, *more: str) -> list[str]:
    chosen = ["--model", MODEL, "--layer", "relu", "--methods", "grad-cam", "fusion-cam", "--steps", "5"]
    return ["-m", "captum_fusion", "benchmark", "--images", str(pictures), "--output", str(output), *chosen, *more]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_and_started_again_it_ends_with_the_same_table(pictures: Path, tmp_path: Path) -> None:
    run(pictures, tmp_path / "whole", **OPTIONS)
    folder, shard = tmp_path / "killed", tmp_path / "killed" / "records-00000.jsonl"
    process = subprocess.Popen([sys.executable, *command(pictures, folder)], stderr=subprocess.DEVNULL)
    wait_for(lambda: shard.exists() and shard.read_bytes().count(b"\n") >= 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # As if it had been killed in the middle of a line.
    with shard.open("ab") as stream:
        stream.write(b'{"model": "tests.te')
    finished = shard.read_bytes().rpartition(b"\n")[0]
    run(pictures, folder, **OPTIONS)
    assert shard.read_bytes().startswith(finished + b"\n")
    keys = [(record["image"], record["method"]) for record in records(folder)]
    assert len(keys) == len(set(keys)) == 10
    pd.testing.assert_frame_equal(deterministic(folder), deterministic(tmp_path / "whole"))


def test_nothing_is_computed_twice(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(pictures, tmp_path / "out", **OPTIONS)
    before = records(tmp_path / "out")
    monkeypatch.setattr(LayerFusionCam, "attribute", None)
    run(pictures, tmp_path / "out", **OPTIONS)
    assert records(tmp_path / "out") == before


@pytest.mark.parametrize("batch_size", [1, 2])
def test_two_processes_give_the_table_of_one(pictures: Path, tmp_path: Path, batch_size: int) -> None:
    more = ["--batch-size", str(batch_size)]
    run(pictures, tmp_path / "one", **OPTIONS, batch_size=batch_size)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    folder = tmp_path / "two"
    subprocess.run([*torchrun, *command(pictures, folder, *more)], check=True, env=environment, capture_output=True)
    shards = [[json.loads(line)["image"] for line in file.open()] for file in sorted(folder.glob("records-*.jsonl"))]
    assert [len(set(images)) for images in shards] in ([3, 2], [4, 1], [2, 3])
    assert not set(shards[0]) & set(shards[1])
    pd.testing.assert_frame_equal(deterministic(folder), deterministic(tmp_path / "one"), rtol=1e-4)

    # One of them died, in the middle of a line: what the other wrote is kept, and one process goes on.
    survivor, dead = sorted(folder.glob("records-*.jsonl"))
    kept, lost = survivor.read_bytes(), dead.read_bytes()
    dead.write_bytes(lost[: len(lost) // 2])
    run(pictures, folder, **OPTIONS, batch_size=batch_size)
    assert survivor.read_bytes().startswith(kept)
    pd.testing.assert_frame_equal(deterministic(folder), deterministic(tmp_path / "one"), rtol=1e-4)


def test_a_picture_that_cannot_be_read_is_counted(pictures: Path, tmp_path: Path) -> None:
    (pictures / "2.jpg").write_bytes((pictures / "2.jpg").read_bytes()[:500])
    (pictures / "3.jpg").write_text("no picture")
    run(pictures, tmp_path / "out", **OPTIONS, batch_size=2)
    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert summary["explanations"].tolist() == [3, 3]
    assert summary["errors"].tolist() == [2, 2]
    errors = {record["image"]: record["error"] for record in records(tmp_path / "out") if "error" in record}
    assert errors.keys() == {"2.jpg", "3.jpg"}
    assert all(error.startswith("The picture cannot be read") for error in errors.values())
    with pytest.raises(ValueError, match=r"2\.jpg: The picture cannot be read"):
        run(pictures, tmp_path / "strict", **OPTIONS, strict=True)


def test_a_method_that_fails_does_not_stop_the_others(pictures: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"methods": ["group-cam", "grad-cam"]}
    run(pictures, tmp_path / "out", **options, batch_size=2)
    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert summary["errors"].tolist() == [5, 0]
    errors = {record["error"] for record in records(tmp_path / "out") if "error" in record}
    assert len(errors) == 1
    assert "groups is 32; expected at most 6" in errors.pop()
    with pytest.raises(ValueError, match="groups is 32"):
        run(pictures, tmp_path / "strict", **options, strict=True)
    # Nothing but errors is a result as well.
    run(pictures, tmp_path / "errors", **OPTIONS | {"methods": ["group-cam"]})
    assert pd.read_csv(tmp_path / "errors" / "summary.csv")["errors"].tolist() == [5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 6}, "with steps = 5, not 6"),
        ({"methods": ["grad-cam"]}, r"methods = \['grad-cam', 'fusion-cam'\], not \['grad-cam'\]"),
        ({"limit": 2}, "with images = "),
        ({"layers": ["stem"]}, "with models = "),
    ],
)
def test_other_settings_are_refused(pictures: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run(pictures, tmp_path / "out", **OPTIONS)
    before = records(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        run(pictures, tmp_path / "out", **OPTIONS | change)
    assert records(tmp_path / "out") == before


def test_percentiles_and_stages(pictures: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"methods": ["score-cam", "union-cam", "fusion-cam:raw"], "limit": 2}
    run(pictures, tmp_path / "out", **options, percentiles=[5, 20], stages=True, metrics=["confidence_drop"])
    methods = pd.read_csv(tmp_path / "out" / "summary.csv")["method"].tolist()
    stages = ["gradient", "denoised", "region", "combined"]
    fused = [f"fusion-cam:raw {percentile}%" for percentile in (5, 20)]
    expected = ["score-cam", "union-cam 5%", "union-cam 20%", *fused]
    expected += [f"{label} {stage}" for label in fused for stage in stages]
    assert sorted(methods) == sorted(expected)
    of = {(record["method"], record["image"]): record for record in records(tmp_path / "out")}
    for image in ("0.jpg", "1.jpg"):
        assert of["fusion-cam:raw 5% region", image]["map"] == of["score-cam", image]["map"]
        assert of["fusion-cam:raw 5% gradient", image]["map"] == of["fusion-cam:raw 20% gradient", image]["map"]


def test_a_random_choice_of_pictures(pictures: Path, tmp_path: Path) -> None:
    chosen = []
    for seed in (0, 0, 1, None):
        folder = run(
            pictures, tmp_path / f"out{len(chosen)}", **OPTIONS | {"methods": ["grad-cam"]}, limit=3, seed=seed
        )
        chosen.append(sorted({record["image"] for record in records(folder)}))
    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[3] == ["0.jpg", "1.jpg", "2.jpg"]


def test_a_full_disk_leaves_earlier_records_whole(pictures: Path, tmp_path: Path) -> None:
    folder = run(pictures, tmp_path / "out", **OPTIONS, limit=2)
    shard = folder / "records-00000.jsonl"
    before = shard.read_bytes()
    script = (
        "import resource, sys; from pathlib import Path; from captum_fusion.benchmark._records import Shard;"
        "shard = Shard(Path(sys.argv[1]), 0); limit = shard.end + 40;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); shard.append([{'image': 'x' * 100}])"
    )
    result = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
    assert "OSError: [Errno 27]" in result.stderr
    assert shard.read_bytes() == before


@pytest.mark.parametrize("precision", ["bfloat16"])
def test_reduced_precision(pictures: Path, tmp_path: Path, precision: Any) -> None:
    folder = run(pictures, tmp_path / "out", **OPTIONS, limit=1, precision=precision)
    assert all("error" not in record for record in records(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["grad-cams"]}, "There is no method 'grad-cams'. Close: grad-cam"),
        ({"metrics": ["insertoin"]}, "metrics is 'insertoin'. Close: insertion"),
        ({"target": "labels"}, "target is 'labels'. Close: label"),
        ({"target": "label"}, "0.jpg has no label; expected a folder for each class"),
        ({"models": ["resnet5O"]}, "Close: resnet50"),
        ({"layers": ["rely"]}, "Close: relu"),
        ({"percentiles": [100]}, "percentile is 100"),
        ({"limit": 0}, "limit is 0; expected at least 1"),
        ({"methods": []}, "at least one of each"),
        ({"layers": ["relu", "stem", "relu"]}, "3 layers were given for 1 models"),
        ({"metrics": ["pointing_game"]}, "The pointing games need boxes"),
    ],
)
def test_refuses_before_any_record(pictures: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(pictures, tmp_path / "out", **OPTIONS | change)
    assert not list((tmp_path / "out").glob("records-*"))


def test_refuses_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no picture; expected files ending in"):
        run(tmp_path, tmp_path / "out", **OPTIONS)
    with pytest.raises(ValueError, match="is not a folder; expected one of pictures"):
        run(tmp_path / "missing", tmp_path / "out", **OPTIONS)
    with pytest.raises(ValueError, match="holds no benchmark"):
        report(tmp_path)
