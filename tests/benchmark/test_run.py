import json
import os
import resource
import signal
import sys
from datetime import timedelta
from pathlib import Path
from socket import socket
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from captum.attr import LayerGradCam
from PIL import Image
from torch import Tensor, distributed
from torchvision.transforms.functional import pil_to_tensor

from captum_fusion import LayerFusionCam, LayerXGradCam, cli
from captum_fusion._app.models.loading import load_classifier
from captum_fusion.benchmark import NothingExplainedError, _evaluation, report
from captum_fusion.benchmark._distributed import process_group
from captum_fusion.benchmark._records import RecordWriter
from captum_fusion.metrics import (
    adcc,
    coherency,
    complexity,
    confidence_drop,
    confidence_increase,
    deletion,
    evaluate,
    insertion,
    road,
)
from tests.benchmark.conftest import MODEL, OPTIONS, QUICK, bench, preprocessed, records
from tests.conftest import forked

MEASURED = ["seconds", "seconds_standard_error"]


def deterministic(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "summary.csv").drop(columns=MEASURED)


def test_records_hold_what_the_metrics_give(pictures: Path, tmp_path: Path) -> None:
    metrics = ["confidence_drop", "confidence_increase", "insertion", "deletion", "adcc", "road"]
    methods = {"grad-cam": LayerGradCam, "fusion-cam": LayerFusionCam}
    folder = bench(pictures, tmp_path / "out", **OPTIONS | {"metrics": metrics}, limit=1, size=32)
    classifier = load_classifier(MODEL, size=32)
    model, layer = classifier.model, classifier.model.relu
    by_key = {(record["image"], record["method"]): record for record in records(folder)}
    assert len(by_key) == 2
    for (image, name), record in by_key.items():
        inputs = preprocessed(classifier, pictures / image)
        target = int(model(inputs).argmax())
        assert (record["target"], record["requested"]) == (target, "predicted")
        method: Any = methods[name](model, layer)
        attributions = method.attribute(inputs, target=target)
        masked = (model, inputs, attributions)
        expected = {
            "confidence_drop": confidence_drop(*masked, target=target),
            "confidence_increase": confidence_increase(*masked, target=target),
            "insertion": insertion(*masked, target=target, steps=5),
            "deletion": deletion(*masked, target=target, steps=5),
            "coherency": coherency(method, inputs, attributions, target=target),
            "complexity": complexity(attributions, (32, 32)),
            "adcc": adcc(model, method, inputs, attributions, target=target),
            "road": road(*masked, target=target),
            "road_most": road(*masked, target=target, order="most"),
            "road_least": road(*masked, target=target, order="least"),
        }
        assert {name: record[name] for name in expected} == {
            name: pytest.approx(value.item(), abs=1e-6) for name, value in expected.items()
        }


def test_the_protocol_of_xplain_cam(pictures: Path, tmp_path: Path) -> None:
    metrics = ["confidence_drop", "insertion", "deletion"]
    options = QUICK | {"metrics": metrics, "layers": (), "limit": 1, "steps": 100}
    options["protocol"] = "xplain-cam"
    (record,) = records(bench(pictures, tmp_path / "out", **options))
    assert (record["layer"], record["steps"]) == ("features", 112)
    classifier = load_classifier(MODEL)
    model = classifier.model
    with Image.open(pictures / "0.jpg") as picture:
        squashed = pil_to_tensor(picture.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR))[None] / 255
    inputs = classifier.preprocessing.normalize(squashed)
    target = int(model(inputs).argmax())
    masked = (model, inputs, LayerGradCam(model, model.features).attribute(inputs, target))
    # A Gaussian of sigma 50 in 51 pixels, mirrored at the border, one axis after the other.
    weights = torch.exp(-(torch.arange(-25, 26.0) ** 2) / 2 / 50**2)
    padded = torch.nn.functional.pad(inputs, (25,) * 4, mode="reflect")
    for axis in (2, 3):
        windows = padded.unfold(axis, 51, 1)
        padded = (windows * weights / weights.sum()).sum(dim=-1)
    assert record["frame"] == [0, 0, 300, 240]
    assert record["insertion"] == pytest.approx(insertion(*masked, padded, target=target, steps=112).item(), abs=1e-5)
    assert record["deletion"] == pytest.approx(deletion(*masked, target=target, steps=112).item(), abs=1e-5)
    probability = model(inputs).softmax(dim=1)[0, target].item()
    drop = confidence_drop(*masked, target=target).item() * probability / (probability + 1e-8)
    assert record["confidence_drop"] == pytest.approx(drop, abs=1e-6)
    for change in ({"steps": 50}, {"size": 64}):
        with pytest.raises(ValueError, match=r"is (50|64), but the protocol xplain-cam sets it to (112|224)"):
            bench(pictures, tmp_path / "out", **options | change)


def test_a_metric_that_was_not_asked_for_is_not_recorded_and_a_fusion_takes_the_time_of_its_components(
    pictures: Path, tmp_path: Path
) -> None:
    folder = bench(pictures, tmp_path / "out", **QUICK | {"methods": ["score-cam", "fusion-cam"], "limit": 1})
    score_cam, fusion_cam = records(folder)
    assert "insertion" not in score_cam
    assert fusion_cam["seconds"] > score_cam["seconds"] > 0


def test_a_map_that_two_methods_share_is_evaluated_once(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        evaluated.append(len(args[1]))
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(_evaluation, "evaluate", counted)
    methods = ["grad-cam", "score-cam", "fusion-cam", "fusion-cam:raw"]
    options = OPTIONS | {"methods": methods, "metrics": ["deletion"], "limit": 2, "batch_size": 2}
    folder = bench(pictures, tmp_path / "out", **options, stages=True)
    assert len(records(folder)) == 2 * (2 + 2 * 5)
    # Both methods, what the fusions denoise, and of each fusion what it combines and its map; not each of the twelve.
    assert evaluated == [2] * 7


def test_a_compiled_model_gives_the_same_records(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def as_compiled(model: torch.nn.Module, **options: Any) -> Any:
        assert options == {"options": {"freezing": True}}

        def compiled(inputs: Tensor) -> Tensor:
            ran.append(len(inputs))
            return model(inputs)

        return compiled

    monkeypatch.setattr(torch, "compile", as_compiled)
    options = OPTIONS | {"methods": ["grad-cam", "score-cam"], "limit": 1}
    values = [
        [
            {name: value for name, value in record.items() if name not in ("seconds", "compile")}
            for record in records(bench(pictures, tmp_path / str(asked), **options, compile=asked))
        ]
        for asked in (False, True)
    ]
    assert values[0] == values[1]
    assert ran
    assert {record["compile"] for record in records(tmp_path / "True")} == {True}
    with pytest.raises(ValueError, match="with compile = True, not False"):
        bench(pictures, tmp_path / "True", **options)


@pytest.mark.usefixtures("charts")
def test_summary(pictures: Path, tmp_path: Path) -> None:
    bench(pictures, tmp_path / "out", **OPTIONS)
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
    folder = bench(pictures, tmp_path / "out", **OPTIONS)
    names = ["summary.csv", "summary.md", "pairs.csv"]
    before = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    report(folder)
    assert {name: (folder / name).read_bytes() for name in names} == before


# Without gradients, which a forked process cannot have.
FORKED: dict[str, Any] = QUICK | {"methods": ["score-cam"]}


def killed_after_two_records(images: Path, folder: Path) -> None:
    append = RecordWriter.append

    def append_and_die(writer: RecordWriter, new: list[Any]) -> None:
        append(writer, new)
        if len(records(folder)) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    RecordWriter.append = append_and_die  # type: ignore[method-assign]
    bench(images, folder, **FORKED)


def test_killed_and_started_again_it_ends_with_the_same_table(pictures: Path, tmp_path: Path) -> None:
    bench(pictures, tmp_path / "whole", **FORKED)
    folder, writer = tmp_path / "killed", tmp_path / "killed" / "records-00000.jsonl"
    process = forked(killed_after_two_records, pictures, folder)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(records(folder)) == 2
    # As if it had been killed in the middle of a line.
    with writer.open("ab") as stream:
        stream.write(b'{"model": "tests.te')
    finished = writer.read_bytes().rpartition(b"\n")[0]
    bench(pictures, folder, **FORKED)
    assert writer.read_bytes().startswith(finished + b"\n")
    keys = [(record["image"], record["method"]) for record in records(folder)]
    assert len(keys) == len(set(keys)) == 5
    pd.testing.assert_frame_equal(deterministic(folder), deterministic(tmp_path / "whole"))


def test_nothing_is_computed_twice(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench(pictures, tmp_path / "out", **OPTIONS)
    before = records(tmp_path / "out")
    monkeypatch.setattr(LayerFusionCam, "attribute", None)
    bench(pictures, tmp_path / "out", **OPTIONS)
    assert records(tmp_path / "out") == before


def as_rank(rank: int, port: int, arguments: list[str]) -> None:
    """Does what torchrun does."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.exit(cli.run(arguments))


def in_two_processes(pictures: Path, folder: Path, *more: str) -> None:
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    chosen = ["--model", MODEL, "--layer", "relu", "--methods", "score-cam", "--metrics", "confidence_drop"]
    arguments = ["benchmark", "--images", str(pictures), "--output", str(folder), *chosen, *more]
    processes = [forked(as_rank, rank, port, arguments) for rank in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def images_of(writer: Path) -> list[str]:
    return [json.loads(line)["image"] for line in writer.open()]


def test_two_processes_give_the_table_of_one(pictures: Path, tmp_path: Path) -> None:
    bench(pictures, tmp_path / "one", **FORKED, batch_size=2)
    folder = tmp_path / "two"
    in_two_processes(pictures, folder, "--batch-size", "2")
    shards = [images_of(file) for file in sorted(folder.glob("records-*.jsonl"))]
    assert [len(set(images)) for images in shards] == [3, 2]
    assert not set(shards[0]) & set(shards[1])
    pd.testing.assert_frame_equal(deterministic(folder), deterministic(tmp_path / "one"), rtol=1e-4)

    # One of them died, in the middle of a line: what the other wrote is kept, and one process goes on.
    survivor, dead = sorted(folder.glob("records-*.jsonl"))
    kept, lost = survivor.read_bytes(), dead.read_bytes()
    dead.write_bytes(lost[: len(lost) // 2])
    bench(pictures, folder, **FORKED, batch_size=2)
    assert survivor.read_bytes().startswith(kept)
    pd.testing.assert_frame_equal(deterministic(folder), deterministic(tmp_path / "one"), rtol=1e-4)


def test_what_is_left_is_shared(pictures: Path, tmp_path: Path) -> None:
    bench(pictures, tmp_path / "out", **FORKED)
    # All that the second of two processes would have done is lost: the pictures 1 and 3 of 0 to 4.
    writer = tmp_path / "out" / "records-00000.jsonl"
    lines = writer.read_bytes().splitlines(keepends=True)
    writer.write_bytes(b"".join(line for line in lines if json.loads(line)["image"] not in ("1.jpg", "3.jpg")))
    in_two_processes(pictures, tmp_path / "out")
    assert images_of(writer)[3:] == ["1.jpg"]
    assert images_of(tmp_path / "out" / "records-00001.jsonl") == ["3.jpg"]


def in_a_group(rank: int, meeting: str) -> None:
    given: list[Any] = []
    new_group = distributed.new_group
    distributed.new_group = lambda **options: given.append(options) or new_group(**options)  # type: ignore[assignment]
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    with process_group() as group:
        group.wait()
        assert group.broadcast_from_rank0(lambda: 7) == 7
        with pytest.raises(ValueError, match="no luck"):
            group.broadcast_from_rank0(unlucky)
    # Whatever the caller's own group waits for.
    assert given[0]["timeout"] > timedelta(days=100)


def unlucky() -> None:
    raise ValueError("no luck")


def test_processes_share_results_and_errors_and_wait_for_as_long_as_others_work(tmp_path: Path) -> None:
    processes = [forked(in_a_group, rank, f"file://{tmp_path}/meeting") for rank in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def test_a_picture_that_cannot_be_read_is_counted(pictures: Path, tmp_path: Path) -> None:
    (pictures / "2.jpg").write_bytes((pictures / "2.jpg").read_bytes()[:500])
    (pictures / "3.jpg").write_text("no picture")
    bench(pictures, tmp_path / "out", **OPTIONS, batch_size=2)
    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert summary["explanations"].tolist() == [3, 3]
    assert summary["errors"].tolist() == [2, 2]
    errors = {record["image"]: record["error"] for record in records(tmp_path / "out") if "error" in record}
    assert errors.keys() == {"2.jpg", "3.jpg"}
    assert all(error.startswith("The image cannot be read") for error in errors.values())
    with pytest.raises(ValueError, match=r"2\.jpg: The image cannot be read"):
        bench(pictures, tmp_path / "strict", **OPTIONS, strict=True)


def test_a_method_that_fails_does_not_stop_the_others(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr(LayerXGradCam, "attribute", fail)
    options = QUICK | {"methods": ["x-grad-cam", "grad-cam"]}
    bench(pictures, tmp_path / "out", **options, batch_size=2)
    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert summary["errors"].tolist() == [5, 0]
    errors = {record["error"] for record in records(tmp_path / "out") if "error" in record}
    assert errors == {"ZeroDivisionError: no luck"}
    with pytest.raises(RuntimeError, match=r"0\.jpg, 1\.jpg: ZeroDivisionError: no luck"):
        bench(pictures, tmp_path / "strict", **options, batch_size=2, strict=True)
    # Nothing but errors is a report as well, and said so.
    with pytest.raises(NothingExplainedError, match="Nothing could be explained: 5 x ZeroDivisionError: no luck"):
        bench(pictures, tmp_path / "errors", **options | {"methods": ["x-grad-cam"]})
    assert pd.read_csv(tmp_path / "errors" / "summary.csv")["errors"].tolist() == [5]
    assert "| 5 | ZeroDivisionError: no luck | 0.jpg |" in (tmp_path / "errors" / "summary.md").read_text()


def test_an_interrupt_says_how_to_resume(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LayerXGradCam, "attribute", interrupt)
    with (
        pytest.warns(UserWarning, match="out keeps the finished records: run again to resume"),
        pytest.raises(KeyboardInterrupt),
    ):
        bench(pictures, tmp_path / "out", **QUICK | {"methods": ["grad-cam", "x-grad-cam"]})
    assert len(records(tmp_path / "out")) == 1


def test_percentiles_and_stages(pictures: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"methods": ["score-cam", "union-cam", "fusion-cam:raw"], "limit": 2}
    bench(pictures, tmp_path / "out", **options, percentiles=[5, 20], stages=True, metrics=["confidence_drop"])
    methods = pd.read_csv(tmp_path / "out" / "summary.csv")["method"].tolist()
    # Stage by stage, and what no percentile or weighting changes is there once.
    assert methods == [
        "score-cam",
        "union-cam 5%",
        "union-cam 20%",
        "fusion-cam gradient",
        "fusion-cam 5% denoised",
        "fusion-cam 20% denoised",
        "fusion-cam region",
        "fusion-cam:raw 5% combined",
        "fusion-cam:raw 20% combined",
        "fusion-cam:raw 5%",
        "fusion-cam:raw 20%",
    ]
    of = {
        (record["method"], record["percentile"], record["stage"], record["image"]): record["map"]
        for record in records(tmp_path / "out")
    }
    for image in ("0.jpg", "1.jpg"):
        assert of["fusion-cam:raw", 5, "region", image] == of["score-cam", None, None, image]
        assert of["fusion-cam:raw", 5, "gradient", image] == of["fusion-cam:raw", 20, "gradient", image]


def test_a_random_choice_of_pictures(pictures: Path, tmp_path: Path) -> None:
    chosen = []
    for seed in (0, 0, 1, None):
        folder = bench(pictures, tmp_path / f"out{len(chosen)}", **QUICK, limit=3, seed=seed)
        chosen.append(sorted({record["image"] for record in records(folder)}))
    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[3] == ["0.jpg", "1.jpg", "2.jpg"]


def on_a_full_disk(folder: Path) -> None:
    writer = RecordWriter(folder, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.end + 40, writer.end + 40))
    with pytest.raises(OSError, match=r"Errno 27.*The records of x+ are not written, all earlier ones are; run again"):
        writer.append([{"image": "x" * 100}])


def test_a_full_disk_leaves_earlier_records_whole(pictures: Path, tmp_path: Path) -> None:
    folder = bench(pictures, tmp_path / "out", **QUICK, limit=2)
    writer = folder / "records-00000.jsonl"
    before = writer.read_bytes()
    process = forked(on_a_full_disk, folder)
    process.join()
    assert process.exitcode == 0
    assert writer.read_bytes() == before


def test_reduced_precision(pictures: Path, tmp_path: Path) -> None:
    folder = bench(pictures, tmp_path / "out", **OPTIONS, limit=1, precision="bfloat16")
    assert all("error" not in record for record in records(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["grad-cams"]}, "Unknown method 'grad-cams'. Did you mean 'grad-cam'"),
        ({"metrics": ["insertoin"]}, "metrics is 'insertoin'. Did you mean 'insertion'"),
        ({"target": "labels"}, "target is 'labels'. Did you mean 'label'"),
        ({"target": "label"}, "0.jpg has no label; expected a folder for each class"),
        ({"models": ["resnet5O"]}, "Did you mean 'resnet50'"),
        ({"layers": ["rely"]}, "Did you mean 'relu'"),
        ({"percentiles": [100]}, "percentile is 100"),
        ({"tolerance": 1}, "tolerance is 1;"),
        ({"limit": 0}, "limit is 0; expected at least 1"),
        ({"methods": []}, "methods is empty; expected at least one"),
        ({"layers": ["relu", "stem", "relu"]}, "3 layers were given for 1 models"),
        ({"layers": ["head"]}, r"The layer 'head' returns shape \(2, 3\); expected a feature map"),
        ({"steps": 5.5}, "steps is 5.5; expected a whole number"),
        ({"limit": 2.0}, "limit is 2.0; expected a whole number"),
        ({"batch_size": True}, "batch_size is True; expected a whole number"),
        ({"device": "gpu"}, "device is 'gpu', which cannot be used"),
        ({"models": [MODEL, MODEL]}, "with layer relu and weights default is listed twice"),
        ({"metrics": ["pointing_game"]}, "The pointing games and instances_reached need boxes"),
    ],
)
def test_refuses_before_any_record(pictures: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench(pictures, tmp_path / "out", **OPTIONS | change)
    assert not list((tmp_path / "out").glob("records-*"))


def test_refuses_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no image; expected files ending in"):
        bench(tmp_path, tmp_path / "out", **OPTIONS)
    with pytest.raises(ValueError, match="is not a folder; expected a folder of images"):
        bench(tmp_path / "missing", tmp_path / "out", **OPTIONS)
