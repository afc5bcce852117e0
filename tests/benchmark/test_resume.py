"""What a run does with the records that are there: it adds what is missing, and refuses what would change them."""

import json
import multiprocessing
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from captum_fusion._app.models.preprocessing import Preprocessing
from captum_fusion.attr.grad_cam_plus_plus import LayerGradCamPlusPlus
from captum_fusion.benchmark import _evaluation, _plan, _records
from tests.benchmark.conftest import QUICK, bench, records, save_picture
from tests.conftest import SmallNet, forked


def values(folder: Path, measure: str = "average_drop") -> dict[tuple[str, str], float]:
    summary = pd.read_csv(folder / "summary.csv", keep_default_na=False)
    return {(row["layer"], row["weights"]): row[measure] for _, row in summary.iterrows()}


def test_one_model_with_two_layers_and_two_weights(pictures: Path, tmp_path: Path) -> None:
    model = "tests.conftest:SmallNet"
    torch.manual_seed(7)
    file = str(tmp_path / "tuned.pt")
    torch.save(SmallNet().state_dict(), file)
    subjects = [("relu", "none"), ("stem", "none"), ("relu", file)]
    layers, weights = zip(*subjects, strict=True)
    options = QUICK | {"limit": 2, "models": [model]}
    bench(pictures, tmp_path / "all", **options | {"models": [model] * 3, "layers": layers, "weights": weights})
    alone = {}
    for number, (layer, weight) in enumerate(subjects):
        folder = bench(pictures, tmp_path / str(number), **options | {"layers": [layer], "weights": [weight]})
        alone |= values(folder)
    assert values(tmp_path / "all") == pytest.approx(alone)
    table = (tmp_path / "all" / "summary.md").read_text()
    for layer, weight in subjects:
        assert f"## {model}, {layer}, weights {weight}\n" in table


def test_records_are_of_the_layer_that_they_were_made_with(pictures: Path, tmp_path: Path) -> None:
    folder = bench(pictures, tmp_path / "out", **QUICK)
    # Nothing but the records is left of the first run.
    for file in folder.iterdir():
        if not file.name.startswith("records"):
            file.unlink()
    bench(pictures, folder, **QUICK | {"layers": ["stem"]})
    assert set(values(folder)) == {("relu", "default"), ("stem", "default")}
    assert (
        values(folder)["stem", "default"]
        == values(bench(pictures, tmp_path / "b", **QUICK | {"layers": ["stem"]}))["stem", "default"]
    )


def same_size_and_time(pictures: Path) -> None:
    file = pictures / "1.jpg"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_what_would_change_old_records_is_refused_by_name(pictures: Path, tmp_path: Path) -> None:
    labels, weights = tmp_path / "labels.json", tmp_path / "tuned.pt"
    labels.write_text(json.dumps({f"{index}.jpg": 0 for index in range(5)}))
    torch.save(SmallNet().state_dict(), weights)
    options = QUICK | {"metrics": ["insertion"], "labels": str(labels), "weights": [str(weights)], "size": 32}
    # The steps count from the first run that needs them.
    for metrics in ("confidence_drop", "insertion"):
        folder = bench(pictures, tmp_path / "out", **options | {"metrics": [metrics]})
    before = records(folder)

    def refuses(message: str, **change: Any) -> None:
        with pytest.raises(ValueError, match=message):
            bench(pictures, folder, **options | change)
        assert records(folder) == before

    refuses("with steps = 5, not 6", steps=6)
    refuses("of 3 images that this run leaves out, such as 2.jpg; choose images, limit and seed", limit=2)
    refuses("with batch_size = 1, not 2", batch_size=2)
    refuses("with tolerance = 0.0, not 0.1", tolerance=0.1)
    refuses("with precision = 'float32', not 'bfloat16'", precision="bfloat16")
    refuses("with target = 'predicted', not 'label'", target="label")
    content = weights.read_bytes()
    torch.save(SmallNet().state_dict(), weights)
    refuses("The weights .*tuned.pt of .* have changed since")
    weights.write_bytes(content)
    same_size_and_time(pictures)
    refuses("The image 1.jpg has changed since")


FACTOR = 1.0


class Scaled(SmallNet):
    """Depends on more than its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * FACTOR


def test_changed_code_preprocessing_and_categories_are_refused(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = QUICK | {"models": ["tests.benchmark.test_resume:Scaled"], "limit": 2}
    torch.save(SmallNet().state_dict(), tmp_path / "tuned.pt")
    options["weights"] = [str(tmp_path / "tuned.pt")]
    folder = bench(pictures, tmp_path / "out", **options)
    before = records(folder)
    load = _plan.load_classifier
    for change in ({"categories": ("a", "b", "c")}, {"preprocessing": Preprocessing(230, 224, (0.0,) * 3, (1.0,) * 3)}):
        with monkeypatch.context() as patch:
            patch.setattr(_plan, "load_classifier", lambda *a, c=change, **k: replace(load(*a, **k), **c))
            with pytest.raises(ValueError, match=r"The preprocessing or the category names of .*Scaled have changed"):
                bench(pictures, folder, **options)
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 0.2)
    with pytest.raises(ValueError, match=r"The code of .*Scaled has changed: \w+ of 0.jpg by grad-cam was .* and is"):
        bench(pictures, folder, **options | {"limit": 3, "methods": ["saliency"]})
    assert records(folder) == before


def test_changed_labels_are_refused(pictures: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.json"
    for target, requested in (("label", "0"), ("best-label", "best-label 0")):
        options = QUICK | {"labels": str(labels), "target": target}
        labels.write_text(json.dumps({f"{index}.jpg": 0 for index in range(5)}))
        folder = bench(pictures, tmp_path / target, **options)
        before = records(folder)
        labels.write_text(json.dumps({f"{index}.jpg": int(index == 3) for index in range(5)}))
        with pytest.raises(
            ValueError, match=f"The labels have changed: .* records of 3.jpg with the label {requested};"
        ):
            bench(pictures, folder, **options)
        assert records(folder) == before


def test_more_pictures_methods_percentiles_and_metrics_do_what_is_missing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explained: list[tuple[str, frozenset[str]]] = []
    whole = _evaluation.Evaluator._explain

    def counted(self: _evaluation.Evaluator, batch: Any, variant: Any, metrics: set[str]) -> Any:
        label = variant.method.name + ("" if variant.percentile is None else f" {variant.percentile:g}")
        explained.extend((f"{row.item.image.name} {label}", frozenset(metrics)) for row in batch.rows)
        return whole(self, batch, variant, metrics)

    monkeypatch.setattr(_evaluation.Evaluator, "_explain", counted)
    monkeypatch.setattr(_evaluation.Evaluator, "check_unchanged", lambda *_: None)
    drop, both = frozenset(["confidence_drop"]), frozenset(["confidence_drop", "deletion"])
    options = QUICK | {"limit": 1, "size": 32}
    folder = bench(pictures, tmp_path / "out", **options)
    for change, missing in (
        ({"limit": 2}, [("1.jpg grad-cam", drop)]),
        (
            {"methods": ["grad-cam", "union-cam"]},
            [("0.jpg union-cam 10", drop), ("1.jpg union-cam 10", drop)],
        ),
        ({"percentiles": [10, 20]}, [("0.jpg union-cam 20", drop), ("1.jpg union-cam 20", drop)]),
        (
            {"metrics": ["confidence_drop", "deletion"]},
            [
                (f"{image} {label}", frozenset(["deletion"]))
                for image in ("0.jpg", "1.jpg")
                for label in ("grad-cam", "union-cam 10", "union-cam 20")
            ],
        ),
        ({"methods": ["saliency"]}, [("0.jpg saliency", both), ("1.jpg saliency", both)]),
    ):
        explained.clear()
        options |= change
        bench(pictures, folder, **options)
        assert explained == missing
    # The same as if all had been asked at once.
    options["methods"] = ["grad-cam", "union-cam", "saliency"]
    at_once = pd.read_csv(bench(pictures, tmp_path / "at once", **options) / "summary.csv")
    measured = ["seconds", "seconds_standard_error"]
    pd.testing.assert_frame_equal(
        pd.read_csv(folder / "summary.csv").drop(columns=measured), at_once.drop(columns=measured), check_exact=False
    )


def test_what_failed_is_tried_again(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = QUICK | {"methods": ["grad-cam", "grad-cam++"]}
    content = (pictures / "2.jpg").read_bytes()
    (pictures / "2.jpg").write_text("not yet copied")
    with monkeypatch.context() as patch:
        patch.setattr(LayerGradCamPlusPlus, "attribute", None)
        folder = bench(pictures, tmp_path / "out", **options)
        assert pd.read_csv(folder / "summary.csv")["errors"].tolist() == [1, 5]
        size = len(records(folder))
        bench(pictures, folder, **options)
        # Failing again in the same way adds nothing.
        assert len(records(folder)) == size
    (pictures / "2.jpg").write_bytes(content)
    bench(pictures, folder, **options)
    assert pd.read_csv(folder / "summary.csv")["errors"].tolist() == [0, 0]
    assert pd.read_csv(folder / "summary.csv")["explanations"].tolist() == [5, 5]


def test_results_inside_the_picture_folder_are_no_pictures_and_no_class(pictures: Path, tmp_path: Path) -> None:
    for name in ("first", "second", "first"):
        folder = bench(pictures, pictures / "results" / name, **QUICK, limit=6)
        assert {record["image"] for record in records(folder)} == {f"{index}.jpg" for index in range(5)}
    with pytest.raises(ValueError, match="the folder of the images; expected"):
        bench(pictures, pictures, **QUICK)
    for index in range(3):
        save_picture(tmp_path / "classes" / str(index) / "a.jpg", index)
    for _ in range(2):
        folder = bench(tmp_path / "classes", tmp_path / "classes" / "results", **QUICK | {"target": "label"})
    assert [record["target"] for record in records(folder)] == [0, 1, 2]


def test_damaged_lines_are_named_set_aside_and_done_again(pictures: Path, tmp_path: Path) -> None:
    folder = bench(pictures, tmp_path / "out", **QUICK, limit=3)
    writer = folder / "records-00000.jsonl"
    lines = writer.read_bytes().splitlines(keepends=True)
    damaged = b""
    for broken in (
        b"{}\n",
        b"[]\n",
        b"\x00\xff\xfe\n",
        lines[1][: len(lines[1]) // 2] + b"\n",
        lines[1].replace(b'"confidence_drop": ', b'"confidence_drop": NaN, "x": '),
        lines[1].replace(b'"map": "', b'"map": "?'),
    ):
        damaged += broken
        writer.write_bytes(lines[0] + broken + lines[2])
        with pytest.warns(UserWarning, match=r"records-00000.jsonl line 2 is damaged; moved to records-00000.damaged"):
            bench(pictures, folder, **QUICK, limit=3)
        after = writer.read_bytes().splitlines(keepends=True)
        assert after[:2] == [lines[0], lines[2]], broken
        again, first = json.loads(after[2]), json.loads(lines[1])
        assert {**again, "seconds": 0} == {**first, "seconds": 0}, broken
        assert (folder / "records-00000.damaged").read_bytes() == damaged


def test_damaged_hashes_are_computed_again(pictures: Path, tmp_path: Path) -> None:
    folder = bench(pictures, tmp_path / "out", **QUICK, limit=1)
    before = (folder / "hashes.json").read_text()
    for content in ("{}", "[]", '{"a": [1', '{"a": 3}', ""):
        (folder / "hashes.json").write_text(content)
        bench(pictures, folder, **QUICK, limit=1)
        assert (folder / "hashes.json").read_text() == before, content


def test_a_picture_is_hashed_once(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench(pictures, tmp_path / "out", **QUICK, limit=2)
    monkeypatch.setattr(_records, "hash_of", None)
    hashes = _records.Hashes(tmp_path / "out")
    assert len({hashes.of(pictures / f"{index}.jpg") for index in range(2)}) == 2


def hold(folder: Path, held: Any, done: Any) -> None:
    with _records.locked(folder):
        held.set()
        done.wait()


def test_another_run_in_the_folder_is_refused_until_it_ends(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    held, done = (multiprocessing.get_context("fork").Event() for _ in range(2))
    process = forked(hold, tmp_path / "out", held, done)
    assert held.wait(600)
    with pytest.raises(ValueError, match=r"Another run is writing to .*out"):
        bench(pictures, tmp_path / "out", **QUICK, limit=1)
    # However it ends.
    process.kill()
    process.join()
    bench(pictures, tmp_path / "out", **QUICK, limit=1)
    assert len(records(tmp_path / "out")) == 1


def test_a_report_that_cannot_be_written_is_found_before_computing(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "summary.md").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"summary.md is a folder, but the report writes a file of this name"):
        bench(pictures, tmp_path / "out", **QUICK)
    assert not list((tmp_path / "out").glob("records-*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        bench(pictures, tmp_path / "file", **QUICK)


def test_what_a_killed_run_had_begun_to_write_is_removed(pictures: Path, tmp_path: Path) -> None:
    folder = bench(pictures, tmp_path / "out", **QUICK, limit=1)
    before = sorted(file.name for file in folder.iterdir())
    (folder / ".summary.csv.123.draft").write_text("model,meth")
    bench(pictures, folder, **QUICK, limit=1)
    assert sorted(file.name for file in folder.iterdir()) == before
