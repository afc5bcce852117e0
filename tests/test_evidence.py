"""What the evidence rests on: paired statistics, the reading of COCO128, and maps of equal coverage."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.evidence_coco import convert
from benchmarks.evidence_statistics import Difference, difference, holm, interval, verdict
from benchmarks.evidence_variants import as_wide


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
