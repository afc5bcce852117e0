"""Folders, and torchvision's datasets on tiny trees of their layout."""

import json
import os
from pathlib import Path

import pytest
import torch
from captum.attr import LayerGradCam
from torch import nn

from captum_fusion._app.models.classifier import Classifier
from captum_fusion._app.models.loading import load_classifier
from captum_fusion._app.models.preprocessing import Preprocessing
from captum_fusion.benchmark._sources import classes_of_labels, find_source
from captum_fusion.metrics import pointing_game
from tests.benchmark.conftest import QUICK, bench, preprocessed, records, save_picture
from tests.conftest import SmallNet


def voc_net() -> nn.Module:
    torch.manual_seed(0)
    return SmallNet(classes=20)


VOC = QUICK | {
    "models": ["tests.benchmark.test_sources:voc_net"],
    "metrics": ["pointing_game"],
    "labels_by_order": True,
}


def imagenet_net() -> nn.Module:
    torch.manual_seed(0)
    return SmallNet(classes=1000)


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    base = tmp_path / "voc" / "VOCdevkit" / "VOC2007"
    save_picture(base / "JPEGImages" / "000005.jpg", 0)
    save_picture(base / "JPEGImages" / "000007.jpg", 1)
    (base / "ImageSets" / "Main").mkdir(parents=True)
    (base / "ImageSets" / "Main" / "val.txt").write_text("000005\n000007\n")
    (base / "Annotations").mkdir()
    # Pictures of 300 by 240 pixels; the second chair lies outside the centre crop.
    things = {
        "000005": [("chair", 1, 1, 300, 240), ("dog", 101, 101, 200, 200), ("chair", 1, 1, 10, 20)],
        "000007": [("car", 51, 51, 150, 150)],
    }
    for name, objects in things.items():
        parts = "".join(
            f"<object><name>{kind}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax>"
            "</bndbox></object>"
            for kind, a, b, c, d in objects
        )
        (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>{parts}</annotation>")
    return tmp_path / "voc"


def test_voc_labels_are_explained_one_by_one_and_its_boxes_judge(voc: Path, tmp_path: Path) -> None:
    folder = bench(
        f"voc2007:{voc}",
        tmp_path / "out",
        **VOC | {"metrics": ["pointing_game", "energy_pointing_game"], "target": "label"},
    )
    found = records(folder)
    # In the order of VOC's names, aeroplane first: car 6, chair 8, dog 11.
    assert [(record["image"], record["target"]) for record in found] == [
        ("000005.jpg", 8),
        ("000005.jpg", 11),
        ("000007.jpg", 6),
    ]
    # The chair's box is the whole picture.
    assert found[0]["pointing_game"] == 1
    assert found[0]["energy_pointing_game"] == pytest.approx(1)
    # 300 by 240 pixels become 320 by 256, of which 224 by 224 are seen: 48 are cut off to the left, 16 above.
    box = torch.tensor([[100 * 256 / 240 - 48, 100 * 256 / 240 - 16, 200 * 256 / 240 - 48, 200 * 256 / 240 - 16]])
    classifier = load_classifier("tests.benchmark.test_sources:voc_net")
    inputs = preprocessed(classifier, voc / "VOCdevkit" / "VOC2007" / "JPEGImages" / "000005.jpg")
    attributions = LayerGradCam(classifier.model, classifier.model.relu).attribute(inputs, target=11)
    assert found[1]["pointing_game"] == pointing_game(attributions, [box], (224, 224)).item()


def test_a_class_that_is_not_in_the_picture_has_no_pointing_game(voc: Path, tmp_path: Path) -> None:
    folder = bench(f"voc2007:{voc}", tmp_path / "out", **VOC)
    for record in records(folder):
        present = {"000005.jpg": {8, 11}, "000007.jpg": {6}}[record["image"]]
        assert (record["pointing_game"] is None) == (record["target"] not in present)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<name>dog", "<name>unicorn", "000005.xml: The object's name is 'unicorn'; expected one of VOC's"),
        ("<xmin>101</xmin>", "", r"The box of the dog is \[None, '101', '200', '200'\]; expected numbers xmin"),
        ("</annotation>", "", "000005.xml: no element found"),
    ],
)
def test_annotations_of_voc_that_cannot_be_read_are_named(voc: Path, old: str, new: str, message: str) -> None:
    file = voc / "VOCdevkit" / "VOC2007" / "Annotations" / "000005.xml"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        find_source(f"voc2007:{voc}")


def test_imagenet_validation_layout(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    # Some of the classes: goldfish and tiger cat.
    names = ["n01443537", "n02123159"]
    for index, name in enumerate(names):
        save_picture(root / "val" / name / f"ILSVRC2012_val_0000000{index}.JPEG", index)
    torch.save(({name: (name,) for name in names}, names), root / "meta.bin")
    source = find_source(f"imagenet:{root}")
    assert [picture.name for picture in source.images] == [
        "n01443537/ILSVRC2012_val_00000000.JPEG",
        "n02123159/ILSVRC2012_val_00000001.JPEG",
    ]
    options = QUICK | {"models": ["tests.benchmark.test_sources:imagenet_net"], "target": "label"}
    folder = bench(f"imagenet:{root}", tmp_path / "out", **options)
    assert [record["target"] for record in records(folder)] == [1, 282]
    # A class of the whole of ImageNet.
    save_picture(root / "val" / "n00007846" / "1.JPEG", 2)
    torch.save(({name: (name,) for name in [*names, "n00007846"]}, names), root / "meta.bin")
    with pytest.raises(ValueError, match="The folder val/n00007846 is none of ImageNet's 1000 classes; remove it"):
        find_source(f"imagenet:{root}")


def test_links_are_followed_and_every_other_file_is_named(tmp_path: Path) -> None:
    save_picture(tmp_path / "elsewhere" / "1.jpg", 0)
    root = tmp_path / "pictures"
    (root / "dog").mkdir(parents=True)
    (root / "cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    for name in ("1.gif", "2.AVIF", "3.jfif", "notes.txt", ".hidden"):
        (root / "dog" / name).touch()
    for name in ("dog/.ipynb_checkpoints/1.jpg", ".trash/1.jpg", "rat/1.jpg", "rat/records-2024.jsonl"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    source = find_source(str(root))
    assert [picture.name for picture in source.images] == ["cat/1.jpg", "dog/1.gif", "dog/2.AVIF", "dog/3.jfif"]
    assert source.categories == ("cat", "dog")
    assert source.notes == [
        "Left out: files without an image extension (1): dog/notes.txt.",
        "Left out: hidden files and folders (3): .trash, dog/.hidden, dog/.ipynb_checkpoints.",
        "Left out: folders with records-*.jsonl, results of a benchmark (1): rat.",
    ]
    (root / "dog" / "again").symlink_to(root, target_is_directory=True)
    with pytest.raises(ValueError, match="dog/again is a link to a folder that holds it; remove the link"):
        find_source(str(root))


def test_finding_pictures_takes_one_stat_of_each_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(400):
        (tmp_path / str(index % 4)).mkdir(exist_ok=True)
        (tmp_path / str(index % 4) / f"{index}.jpg").touch()
    calls = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: calls.append(args) or stat(*args, **kwargs))
    assert len(find_source(str(tmp_path)).images) == 400
    assert len(calls) < 20


def test_leaves_in_a_folder_for_each_class_with_fine_tuned_weights(tmp_path: Path) -> None:
    for index, name in enumerate(["healthy", "rust", "scab"]):
        save_picture(tmp_path / "leaves" / name / "1.jpg", index)
        save_picture(tmp_path / "leaves" / name / "more" / "2.png", 10 + index)
    torch.manual_seed(7)
    tuned = SmallNet()
    torch.save(tuned.state_dict(), tmp_path / "tuned.pt")
    options = QUICK | {"weights": [str(tmp_path / "tuned.pt")], "target": "label", "labels_by_order": True}
    folder = bench(tmp_path / "leaves", tmp_path / "out", **options)
    assert [(record["image"], record["target"]) for record in records(folder)] == [
        (f"{name}/{file}", index)
        for index, name in enumerate(["healthy", "rust", "scab"])
        for file in ("1.jpg", "more/2.png")
    ]


def test_a_labels_file(pictures: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({f"{index}.jpg": index % 3 for index in range(5)}))
    source = find_source(str(pictures), labels)
    assert [picture.labels for picture in source.images] == [(0,), (1,), (2,), (0,), (1,)]
    labels.write_text(json.dumps({"0.jpeg": 0}))
    with pytest.raises(ValueError, match=r"has no label for 0.jpg. Did you mean '0.jpeg'"):
        find_source(str(pictures), labels)
    labels.write_text('{"0.jpg": 0, "1.jpg": 1, "0.jpg": 2}')
    with pytest.raises(ValueError, match=r"has the labels 0 and 2 for 0.jpg; expected one"):
        find_source(str(pictures), labels)
    for content in ("[1, 2]", "[]", '[["0.jpg", 0]]', '{"0.jpg": {}}'):
        labels.write_text(content)
        with pytest.raises(ValueError, match="does not hold class indices by image name"):
            find_source(str(pictures), labels)


def test_folders_are_matched_with_the_models_categories(tmp_path: Path) -> None:
    for index, name in enumerate(["Tiger_Cat", "goldfish"]):
        save_picture(tmp_path / name / "1.jpg", index)
    source = find_source(str(tmp_path))

    def classifier(*categories: str) -> Classifier:
        return Classifier("fish", nn.Identity(), Preprocessing(8, 8, (0.0,), (1.0,)), categories or None)

    assert classes_of_labels(source, classifier("goldfish", "hen", "tiger cat"), 3, False) == {0: (2,), 1: (0,)}
    # As many classes as the model, but in another order: names decide, whether or not order may.
    for by_order in (False, True):
        assert classes_of_labels(source, classifier("goldfish", "tiger cat"), 2, by_order) == {0: (1,), 1: (0,)}
    with pytest.raises(ValueError, match=r"Unknown category 'goldfish'. Did you mean 'goldfinch'"):
        classes_of_labels(source, classifier("tiger cat", "goldfinch"), 2, False)
    with pytest.raises(ValueError, match=r"has no category names; .*labels_by_order"):
        classes_of_labels(source, classifier(), 2, False)
    assert classes_of_labels(source, classifier(), 2, True) == {0: (0,), 1: (1,)}
    with pytest.raises(ValueError, match="the model has 3 classes, the images have 2"):
        classes_of_labels(source, classifier(), 3, True)


def test_folders_named_by_index_or_wordnet_id(tmp_path: Path) -> None:
    # Order would make 0, 1 and 2 of them.
    for index, name in enumerate(["2", "n01443537", "n02123159"]):
        save_picture(tmp_path / name / "1.jpg", index)
    source = find_source(str(tmp_path))
    imagenet = load_classifier("squeezenet1_1", "none")
    assert imagenet.category(1) == "goldfish"
    assert imagenet.category(282) == "tiger cat"
    assert classes_of_labels(source, imagenet, 1000, False) == {0: (2,), 1: (1,), 2: (282,)}
