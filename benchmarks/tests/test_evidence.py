"""The evidence: paired statistics, the reading of collections, the page, and the generated pictures."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from benchmarks import truth
from benchmarks.evidence import main, runs
from benchmarks.evidence_page import write
from benchmarks.evidence_pictures import convert
from benchmarks.evidence_statistics import (
    COMPETITORS,
    OURS,
    comparisons,
    differences,
    holm,
    interval,
    paired_test,
    read,
)
from benchmarks.networks import IMAGENET_MEAN, IMAGENET_STD, squeezenet


def test_a_paired_test_by_hand() -> None:
    tested = paired_test(np.array([1.0, 2.0, 3.0, 4.0, 2.0]))
    assert (tested["pictures"], tested["difference"], tested["effect"]) == (5, 2.4, 1)
    assert tested["low"] < 2.4 < tested["high"]
    # All five signs are equal: two of 32 ways.
    assert tested["p"] == pytest.approx(2 / 32)
    assert paired_test(np.zeros(4)) == {"pictures": 4, "difference": 0, "low": 0, "high": 0, "effect": 0, "p": 1}


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = sum(low <= 1 <= high for low, high in (interval(random.exponential(1, 60)) for _ in range(40)))
    assert 34 <= covered <= 40


def test_holm_multiplies_the_least_by_their_number_and_never_falls() -> None:
    # 4 x 0.01; 3 x 0.02; 2 x 0.04; 0.6.
    corrected = holm(pd.Series({"a": 0.02, "b": 0.01, "c": 0.04, "d": 0.6}))
    assert corrected.to_dict() == pytest.approx({"a": 0.06, "b": 0.04, "c": 0.08, "d": 0.6})
    assert holm(pd.Series([0.03, 0.02])).tolist() == pytest.approx([0.04, 0.04])


def test_networks_on_the_same_pictures_are_one_sample() -> None:
    rows = [
        {"model": model, "picture": picture, "method": method, "average drop": drop, "insertion": drop}
        for model, drops in {"a": (10, 20), "b": (30, 60)}.items()
        for picture in ("1", "2")
        for method, drop in zip((OURS, "grad-cam"), drops, strict=True)
    ]
    # The mean of 10 and 30 is positive for the drop, where lower is better, and negative for insertion.
    for measure, mean in (("average drop", 20), ("insertion", -20)):
        assert differences(pd.DataFrame(rows), measure, OURS, "grad-cam").to_dict() == {"1": mean, "2": mean}


def test_an_outline_belongs_to_the_object_whose_box_it_fits(tmp_path: Path) -> None:
    folder = tmp_path / "coco128"
    for name in ("images", "boxes", "segments"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (100, 50)).save(folder / "images" / "1.jpg")
    Image.new("RGB", (10, 10)).save(folder / "images" / "2.jpg")
    # Two cups and a fork; one outline is that of the second cup, and one fits no cup.
    (folder / "boxes" / "1.txt").write_text("0 0.1 0.5 0.2 1\n0 0.8 0.5 0.4 1\n1 0.8 0.5 0.4 1\n")
    (folder / "segments" / "1.txt").write_text("47 0.6 0 1 0 1 1 0.6 1\n47 0.4 0 0.5 0 0.5 0.1\n")
    (folder / "box_names.yaml").write_text("names:\n  0: cup\n  1: fork\n")
    (folder / "segment_names.yaml").write_text("names:\n  47: cup\n  48: fork\n")
    file = convert("coco128", folder, tmp_path / "out")
    content = json.loads(file.read_text())
    assert [image["file_name"] for image in content["images"]] == ["1.jpg", "2.jpg"]
    assert content["categories"] == [{"id": 0, "name": "cup"}, {"id": 1, "name": "fork"}]
    things = [(each["category_id"], each["bbox"], each["segmentation"]) for each in content["annotations"]]
    assert things == [
        (0, [0, 0, 20, 50], []),
        (0, [60, 0, 40, 50], [[60, 0, 100, 0, 100, 50, 60, 50]]),
        (1, [60, 0, 40, 50], []),
    ]
    assert (file.parent.parent / "coco128" / "1.jpg").is_file()


def test_boxes_of_voc_and_of_ilsvrc(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    corners = "<xmin>1</xmin><ymin>2</ymin><xmax>10</xmax><ymax>20</ymax>"
    (folder / "annotations" / "1.xml").write_text(
        "<annotation><filename>1.jpg</filename>"
        f"<object><name>dog</name><bndbox>{corners}</bndbox></object></annotation>"
    )
    (folder / "annotations.json").write_text(json.dumps({"2.JPEG": {"label": 300, "boxes": [[0, 1, 10, 20]]}}))
    for collection, name, category in (("voc2012", "1.jpg", "dog"), ("ilsvrc", "2.JPEG", "300")):
        content = json.loads(convert(collection, folder, tmp_path / "out").read_text())
        assert [image["file_name"] for image in content["images"]] == [name]
        assert [each["name"] for each in content["categories"]] == [category]
        assert [each["bbox"] for each in content["annotations"]] == [[0, 1, 10, 19]]


def recorded(folder: Path, drops: dict[str, list[float]]) -> None:
    """A run with the confidence drop of each picture by each method."""
    folder.mkdir(parents=True)
    lines = [
        {"model": "m", "weights": "default", "layer": "l", "requested": "predicted", "percentile": None, "stage": None}
        | {"file": f"{place}.jpg", "image": f"{place}.jpg", "method": method, "map": "AA=="}
        | {"tolerance": 0.05, "target_kind": "predicted", "steps": None, "device": "cpu"}
        | {"confidence_drop": drop, "confidence_increase": float(drop == 0)}
        for method, values in drops.items()
        for place, drop in enumerate(values)
    ]
    (folder / "records-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_photographs_of_one_leaf_are_one_picture(tmp_path: Path) -> None:
    recorded(tmp_path / "leaves-vgg", {OURS: [0.1, 0.3, 0.2], "grad-cam": [0.2, 0.6, 0.2]})
    (tmp_path / "groups.json").write_text(json.dumps({"0.jpg": "one leaf", "1.jpg": "one leaf"}))
    row = comparisons(read(tmp_path)).set_index("measure").loc["average drop"]
    # The means of the first two are 20 and 40 %, and the third has no advantage.
    assert (row["pictures"], row["difference"]) == (2, pytest.approx(10))


def test_the_page_and_the_csv_have_the_same_verdicts(tmp_path: Path) -> None:
    ours = [0.01 * place for place in range(1, 21)]
    worse = [drop + 0.1 + 0.01 * place for place, drop in enumerate(ours)]
    recorded(tmp_path / "ilsvrc-lite0", {OURS: ours} | dict.fromkeys(COMPETITORS, worse))
    recorded(tmp_path / "leaves-vgg", {OURS: worse} | dict.fromkeys(COMPETITORS, ours))
    write(tmp_path, tmp_path / "page")
    page = (tmp_path / "page" / "README.md").read_text()
    assert "Fusion-CAM ran as `fusion-cam:raw`" in page
    table = pd.read_csv(tmp_path / "page" / "comparisons.csv")
    drops = table[table["measure"] == "average drop"]
    verdicts = dict(zip(drops["pictures of"], drops["verdict"], strict=True))
    assert verdicts == {"ImageNet": "better", "rice leaves": "worse"}
    for _, row in drops.iterrows():
        (line,) = [
            line for line in page.splitlines() if f"| {row['pictures of']} | average drop | {row['other']} " in line
        ]
        assert line.endswith(f"| {row['p corrected']:.2g} | {row['verdict']} |")
    # 20 comparisons of the drop and the increase: each drop's p value is multiplied by 20 at most.
    assert len(table) == 20
    assert table["p corrected"].max() <= 1
    assert drops["p corrected"].iloc[0] == pytest.approx(20 * drops["p"].iloc[0], rel=1e-3)


def test_the_dry_run_counts_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ilsvrc"
    (folder / "images").mkdir(parents=True)
    known = {f"{place}.jpg": {"label": 1, "boxes": [[0, 0, 1, 1]]} for place in range(3)}
    (folder / "annotations.json").write_text(json.dumps(known))
    command = [str(tmp_path / "out"), "--ilsvrc", str(folder), "--only", "exact", "--dry-run"]
    main(command)
    # Score-CAM's channels, four rows of a fusion, and 23 for the metrics of each.
    assert f"exact: {3 * (650 + 23 + 4 + 23)} rows" in capsys.readouterr().out
    recorded(tmp_path / "out" / "exact", {"score-cam": [0.1, 0.2]})
    main(command)
    assert f"exact: {650 + 23 + 3 * (4 + 23)} rows" in capsys.readouterr().out


def test_networks_without_weights_are_left_out(tmp_path: Path) -> None:
    folders = {"ilsvrc": tmp_path, "leaves": tmp_path}
    assert [each.name for each in runs(folders, None)] == ["ilsvrc-lite0", "percentiles", "exact", "family"]
    (tmp_path / "vgg16.pt").touch()
    names = [each.name for each in runs(folders, tmp_path)]
    assert {"ilsvrc-mobilenet_v2", "ilsvrc-squeezenet", "leaves-vgg16"} <= set(names)


def test_squeezenet_takes_what_the_command_gives() -> None:
    model, seen = squeezenet(), []
    model.get_submodule("features.0").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    model.eval()((pixels - mean) / std)
    expected = 255 * pixels.flip(1) - torch.tensor([104.0, 117.0, 123.0]).reshape(3, 1, 1)
    torch.testing.assert_close(seen[0], expected, atol=1e-3, rtol=0)


def test_generated_pictures_differ_without_a_deciding_shape_only_inside_the_truth() -> None:
    data = truth.generate(8, seed=0)
    changed = (data.pixels != data.occluded).any(dim=1)
    assert not (changed & ~data.masks).any()
    assert (data.masks.flatten(1).any(1) == (data.classes < truth.NONE)).all()
    assert (changed.flatten(1).any(1) == (data.classes < truth.NONE)).all()
    torch.testing.assert_close(truth.generate(8, seed=0).pixels, data.pixels)


def test_the_best_threshold_is_the_best_of_all() -> None:
    saliency = torch.randint(0, 5, (8, 8)) / 4
    mask = torch.rand(8, 8) > 0.5
    overlaps = [
        ((saliency >= value) & mask).sum() / ((saliency >= value) | mask).sum() for value in torch.unique(saliency)
    ]
    assert truth.best_overlap(saliency, mask) == pytest.approx(float(max(overlaps)))
