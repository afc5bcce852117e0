"""Class folders whose names are numbers, pictures of other kinds, and records of another release."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from torch import nn

from captum_fusion._app.models.loading import load_classifier
from captum_fusion.benchmark import _plan
from captum_fusion.benchmark._dataset import LabelledImage, Source
from captum_fusion.benchmark._sources import classes_of_labels
from tests.benchmark.conftest import QUICK, bench, records, save_picture
from tests.conftest import SmallNet


def two() -> nn.Module:
    return SmallNet(classes=2)


def twelve() -> nn.Module:
    return SmallNet(classes=12)


def class_folders(root: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        save_picture(root / "pictures" / name / "a.jpg", seed)
    return root / "pictures"


def targets(folder: Path) -> dict[str, int]:
    return {record["image"].partition("/")[0]: record["target"] for record in records(folder)}


def options(model: str) -> dict[str, object]:
    return QUICK | {"models": [f"tests.benchmark.test_inputs:{model}"], "target": "label"}


def test_folders_that_are_all_category_names_are_names_not_indices(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("1\n0\n")
    folder = bench(
        class_folders(tmp_path, ["0", "1"]), tmp_path / "out", **options("two"), classes=str(tmp_path / "names.txt")
    )
    assert targets(folder) == {"0": 1, "1": 0}


def test_twelve_numbered_folders_are_indices_or_an_order_but_not_by_chance(tmp_path: Path) -> None:
    # In the order of ImageFolder, 10 follows on 1.
    names = [str(number) for number in range(12)]
    pictures = class_folders(tmp_path, names)
    with pytest.raises(
        ValueError, match=r"The folder 10 may mean the model's class 10 or, in the order of the folders, 2"
    ):
        bench(pictures, tmp_path / "out", **options("twelve"))
    assert not (tmp_path / "out").exists()
    by_order = bench(pictures, tmp_path / "order", **options("twelve"), labels_by_order=True)
    assert targets(by_order) == {name: index for index, name in enumerate(sorted(names))}
    for name in names:
        (pictures / name).rename(pictures / f"index:{name}")
    by_index = bench(pictures, tmp_path / "index", **options("twelve"))
    assert targets(by_index) == {f"index:{name}": int(name) for name in names}


def test_some_numbered_folders_are_indices(tmp_path: Path) -> None:
    folder = bench(class_folders(tmp_path, ["3", "11"]), tmp_path / "out", **options("twelve"))
    assert targets(folder) == {"3": 3, "11": 11}


def test_heif_pictures_are_part_of_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_picture(tmp_path / "pictures" / "a.jpg", 0)
    (tmp_path / "pictures" / "b.HEIC").touch()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    folder = bench(tmp_path / "pictures", tmp_path / "out", **QUICK)
    assert "needs the package pillow-heif" in records(folder)[1]["error"]


def test_records_of_another_release_are_refused(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bench(pictures, tmp_path / "out", **QUICK, limit=2)
    before = records(folder)
    assert {record["version"] for record in before} == {version("captum-fusion")}
    monkeypatch.setattr(_plan, "version", lambda _: "9.9")
    with pytest.raises(
        ValueError, match=rf"out was written by captum-fusion {version('captum-fusion')}, and this is 9.9; expected the"
    ):
        bench(pictures, folder, **QUICK, limit=3)
    assert records(folder) == before


def test_more_steps_than_pixels_are_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps is 626; expected at most 625, the number of pixels of the input"):
        bench(pictures, tmp_path / "out", **QUICK | {"metrics": ["deletion"], "steps": 626, "size": 25})
    assert not (tmp_path / "out").exists()


def test_labels_of_imagenet_are_none_of_another_models_classes() -> None:
    source = Source([LabelledImage("a.jpg", Path("a.jpg"), (3,))], classes=1000)
    classifier = load_classifier("tests.benchmark.test_inputs:twelve")
    with pytest.raises(ValueError, match="The labels are for 1000 classes; expected a model with as many"):
        classes_of_labels(source, classifier, 12, False)
    assert classes_of_labels(source, classifier, 1000, False) == {3: (3,)}


def annotated(root: Path, segmentation: object) -> str:
    """An annotation file of one picture with one object, of the category b."""
    save_picture(root / "a.jpg", 0)
    thing = {"image_id": 1, "category_id": 2, "bbox": [10, 10, 50, 50], "segmentation": segmentation}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [thing],
    }
    (root / "boxes.json").write_text(json.dumps(content))
    (root / "names.txt").write_text("a\nb\n")
    return f"coco:{root / 'boxes.json'}"


def test_localization_without_outlines_or_without_the_class_is_no_empty_table(tmp_path: Path) -> None:
    more = {"models": ["tests.benchmark.test_inputs:two"], "classes": str(tmp_path / "names.txt")}
    with pytest.raises(ValueError, match=r"mask_pointing_game needs outlines of objects, which coco:.* does not have"):
        bench(annotated(tmp_path, []), tmp_path / "out", **QUICK | more | {"metrics": ["mask_pointing_game"]})
    images = annotated(tmp_path, [[10, 10, 60, 10, 60, 60]])
    folder = bench(images, tmp_path / "out", **QUICK | more | {"metrics": ["pointing_game", "mask_pointing_game"]})
    (record,) = records(folder)
    told = "mask pointing game has no value: no image shows an object of the explained class."
    # The object is one of class 1.
    assert (told in (folder / "summary.md").read_text()) == (record["target"] == 0)
    assert (record["mask_pointing_game"] is None) == (record["target"] == 0)
