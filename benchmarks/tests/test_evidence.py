"""What the evidence rests on: paired statistics, the reading of COCO128, maps of equal coverage, runs and the page."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.evidence import RUNS, rows
from benchmarks.evidence_coco import convert
from benchmarks.evidence_report import write
from benchmarks.evidence_runs import COMPETITORS, OURS, Runs
from benchmarks.evidence_statistics import Difference, difference, holm, interval, verdict
from benchmarks.evidence_variants import as_wide
from captum_fusion.benchmark import Settings


def made(mean: float, p_value: float) -> Difference:
    return Difference(10, mean, mean - 1, mean + 1, 0.0, p_value)


def test_a_difference_is_positive_where_the_first_is_better() -> None:
    first, second = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([2.0, 4.0, 6.0, 8.0, 7.0])
    lower = difference(first, second, higher=False)
    assert (lower.pictures, lower.mean, lower.effect) == (5, 2.4, 1)
    assert lower.low < 2.4 < lower.high
    assert lower.p_value == 2 / 32
    higher = difference(first, second, higher=True)
    assert (higher.mean, higher.effect, higher.p_value) == (-2.4, -1, 2 / 32)
    assert difference(first, first, higher=True)[1:] == (0, 0, 0, 0, 1)


def test_the_interval_is_scipys_and_covers_the_mean_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = sum(low <= 1 <= high for low, high in (interval(random.exponential(1, 60)) for _ in range(40)))
    assert 34 <= covered <= 40


def test_holm_multiplies_the_least_by_their_number_and_never_falls() -> None:
    found = {"a": made(1, 0.02), "b": made(1, 0.01), "c": made(1, 0.04), "d": made(1, 0.6)}
    corrected = {name: each.p_value for name, each in holm(found).items()}
    # 4 x 0.01; 3 x 0.02; 2 x 0.04; 0.6.
    assert corrected == pytest.approx({"a": 0.06, "b": 0.04, "c": 0.08, "d": 0.6})
    equal = {"a": made(1, 0.03), "b": made(1, 0.02)}
    assert [each.p_value for each in holm(equal).values()] == pytest.approx([0.04, 0.04])


def test_the_verdict() -> None:
    assert verdict([made(1, 0.01), made(0.1, 0.049)]) == "holds"
    assert verdict([made(1, 0.01), made(0.1, 0.06)]) == "cannot be told"
    assert verdict([made(1, 0.01), made(-1, 0.06)]) == "cannot be told"
    assert verdict([made(1, 0.01), made(-1, 0.01)]) == "does not hold"


def test_an_outline_belongs_to_the_object_whose_box_it_fits(tmp_path: Path) -> None:
    folder = tmp_path / "coco128"
    for name in ("images", "boxes", "segments"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (100, 50)).save(folder / "images" / "1.jpg")
    Image.new("RGB", (10, 10)).save(folder / "images" / "2.jpg")
    # Two cups and a fork; of the outlines one is that of the second cup, and one fits no cup.
    (folder / "boxes" / "1.txt").write_text("0 0.1 0.5 0.2 1\n0 0.8 0.5 0.4 1\n1 0.8 0.5 0.4 1\n")
    (folder / "segments" / "1.txt").write_text("47 0.6 0 1 0 1 1 0.6 1\n47 0.4 0 0.5 0 0.5 0.1\n")
    (folder / "box_names.yaml").write_text("names:\n  0: cup\n  1: fork\n")
    (folder / "segment_names.yaml").write_text("names:\n  47: cup\n  48: fork\n")
    file = convert(folder, tmp_path / "out")
    content = json.loads(file.read_text())
    assert [(image["file_name"], image["width"], image["height"]) for image in content["images"]] == [
        ("1.jpg", 100, 50),
        ("2.jpg", 10, 10),
    ]
    assert content["categories"] == [{"id": 0, "name": "cup"}, {"id": 1, "name": "fork"}]
    things = [(each["category_id"], each["bbox"], each["segmentation"]) for each in content["annotations"]]
    assert things == [
        (0, [0, 0, 20, 50], []),
        (0, [60, 0, 40, 50], [[60, 0, 100, 0, 100, 50, 60, 50]]),
        (1, [60, 0, 40, 50], []),
    ]
    assert (file.parent.parent / "coco128" / "1.jpg").is_file()
    assert convert(folder, tmp_path / "out") == file


def test_maps_get_the_coverage_of_others_and_keep_their_order() -> None:
    maps, others = torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8) ** torch.tensor([0.2, 1, 4]).reshape(3, 1, 1, 1)
    wide = as_wide(maps, others)
    torch.testing.assert_close(wide.mean(dim=(1, 2, 3)), others.mean(dim=(1, 2, 3)), atol=1e-4, rtol=0)
    for before, after in zip(maps.flatten(1), wide.flatten(1), strict=True):
        assert torch.equal(before.argsort(), after.argsort())


def recorded(folder: Path, drops: dict[str, list[float]]) -> None:
    """A run with the confidence drop of each picture by each method."""
    folder.mkdir(parents=True)
    lines = [
        {"model": "m", "weights": "default", "layer": "l", "requested": "predicted", "percentile": None, "stage": None}
        | {"file": f"{place}.jpg", "image": f"{place}.jpg", "method": method, "map": "AA==", "seconds": 1.0}
        | {"confidence_drop": drop, "confidence_increase": float(drop == 0), "instances": 1, "weights_hash": "w"}
        for method, values in drops.items()
        for place, drop in enumerate(values)
    ]
    (folder / "records-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_photographs_of_one_leaf_are_one_picture(tmp_path: Path) -> None:
    recorded(tmp_path / "leaves-vgg", {OURS: [0.1, 0.3, 0.2], "grad-cam": [0.2, 0.6, 0.2]})
    (tmp_path / "groups.json").write_text(json.dumps({"0.jpg": "one leaf", "1.jpg": "one leaf"}))
    found = Runs(tmp_path).compare("leaves-vgg", "average_drop", OURS, ["grad-cam"])["grad-cam"]
    # The means of the first two are 20 and 40 %, and the third has no advantage.
    assert (found.pictures, found.mean) == (2, pytest.approx(10))


def test_the_page_tells_the_verdict_of_each_setting(tmp_path: Path) -> None:
    ours = [0.01 * place for place in range(1, 21)]
    worse = [drop + 0.1 + 0.01 * place for place, drop in enumerate(ours)]
    recorded(tmp_path / "imagenet", {OURS: ours} | dict.fromkeys(COMPETITORS, worse))
    recorded(tmp_path / "lite1", {OURS: worse} | dict.fromkeys(COMPETITORS, ours))
    write(tmp_path, tmp_path / "page")
    page = (tmp_path / "page" / "README.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| lowest Average Drop, average drop")]
    assert "10.5 (" in row
    assert "+19.5 (" in row
    assert "**holds**: Lite0 on ImageNet<br>**does not hold**: Lite1 on ImageNet" in row
    assert sum(line.startswith("| lowest Average Drop |") for line in page.splitlines()) == 2
    assert {file.name for file in (tmp_path / "page").iterdir()} >= {"claims.png", "comparisons.csv"}


def test_what_is_scored_is_not_counted_again(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for place in range(3):
        Image.new("RGB", (8, 8)).save(pictures / f"{place}.jpg")
    methods = ("grad-cam", "random-map")
    settings = Settings(
        images=str(pictures), output=tmp_path / "run", methods=methods, metrics=("confidence_drop",), steps=10
    )
    # A picture takes a pass to make and one to judge, for each method.
    assert rows(settings) == 12
    recorded(tmp_path / "run", {"grad-cam": [0.1, 0.2]})
    assert rows(settings) == 8


def test_runs_of_one_folder_ask_the_same_but_for_their_methods() -> None:
    for run in RUNS:
        for other in RUNS:
            if run.name == other.name:
                assert {name: run.asked.get(name) for name in ("models", "tolerance", "limit", "metrics")} == {
                    name: other.asked.get(name) for name in ("models", "tolerance", "limit", "metrics")
                }
