"""Annotation files of COCO's form, on a tiny tree of its layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from captum_fusion.benchmark._sources import find_source
from tests.benchmark.conftest import bench, preprocessed, records, save_picture
from tests.conftest import SmallNet

MODEL = "tests.benchmark.test_coco:two_things"


def two_things() -> nn.Module:
    torch.manual_seed(0)
    return SmallNet(classes=2)


def annotation(image: int, category: int, box: list[float], **more: Any) -> dict[str, Any]:
    return {"id": image * 10 + category, "image_id": image, "category_id": category, "bbox": box} | more


@pytest.fixture
def content() -> dict[str, Any]:
    """Three pictures of 300 by 240 pixels: two cups and a fork, the crowd of forks, and nothing."""
    whole = [[0, 0, 300, 0, 300, 240, 0, 240]]
    return {
        "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}, {"id": 4, "file_name": "c.jpg"}],
        "categories": [{"id": 48, "name": "fork"}, {"id": 47, "name": "cup"}],
        "annotations": [
            annotation(3, 47, [0, 0, 300, 240], segmentation=whole),
            annotation(3, 48, [100, 100, 50, 50], segmentation=[]),
            annotation(7, 48, [0, 0, 300, 240], segmentation={"counts": [0, 72000], "size": [240, 300]}, iscrowd=1),
        ],
    }


def write(root: Path, content: object) -> str:
    file = root / "annotations" / "instances_val2017.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    for index, name in enumerate("abc"):
        save_picture(root / "val2017" / f"{name}.jpg", index)
    return f"coco:{file}"


def test_pictures_labels_boxes_and_outlines(content: dict[str, Any], tmp_path: Path) -> None:
    source = find_source(write(tmp_path, content))
    assert source.categories == ("cup", "fork")
    assert [(picture.name, picture.labels) for picture in source.images] == [
        ("a.jpg", (0, 1)),
        ("b.jpg", (1,)),
        ("c.jpg", ()),
    ]
    cup, fork = source.images[0].instances or ()
    assert (cup.box, cup.crowd) == ((0, 0, 300, 240), False)
    assert cup.outline is not None
    assert fork.box == (100, 100, 150, 150)
    assert fork.outline is None
    assert (source.images[1].instances or ())[0].crowd
    # Beside the file, as other tools write it.
    (tmp_path / "val2017" / "all.json").write_text(json.dumps(content))
    beside = find_source(f"coco:{tmp_path / 'val2017' / 'all.json'}")
    assert [picture.file for picture in beside.images] == [picture.file for picture in source.images]


def test_each_label_is_explained_and_judged_by_its_regions(content: dict[str, Any], tmp_path: Path) -> None:
    images = write(tmp_path, content)
    metrics = ["pointing_game", "mask_pointing_game", "mask_energy_pointing_game", "instances_reached"]
    options: dict[str, Any] = {"models": [MODEL], "layers": ["relu"], "methods": ["centred-gaussian"]}
    options |= {"metrics": metrics, "labels_by_order": True, "target": "label"}
    folder = bench(images, tmp_path / "out", **options)
    note = "1 of 3 images, such as c.jpg, show no object of the model's classes; they are left out."
    assert note in (folder / "summary.md").read_text()
    values = {(record["image"], record["requested"]): [record[name] for name in metrics] for record in records(folder)}
    # The cup is everywhere. The fork is in the middle, without an outline. The crowd of forks is no single object.
    assert values == {
        ("a.jpg", "0"): [1, 1, pytest.approx(1), 1],
        ("a.jpg", "1"): [1, None, None, 1],
        ("b.jpg", "1"): [1, 1, pytest.approx(1), None],
    }


def test_changed_boxes_are_refused_and_each_mean_has_its_number(content: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"models": [MODEL], "layers": ["relu"], "methods": ["centred-gaussian"]}
    options |= {"metrics": ["complexity", "pointing_game", "mask_pointing_game"], "labels_by_order": True}
    # The objects count from the first run that needs them.
    bench(write(tmp_path, content), tmp_path / "out", target="label", **options | {"metrics": ["complexity"]})
    folder = bench(write(tmp_path, content), tmp_path / "out", target="label", **options)
    (row,) = (line for line in (folder / "summary.md").read_text().splitlines() if "centred" in line)
    cells = [cell.strip() for cell in row.split("|")]
    # Three explanations, of which one has no outline.
    assert [cell.count("(n 2)") for cell in cells if "±" in cell] == [0, 0, 1]
    box, fork = content["annotations"][0], content["categories"][0]
    for part, change in ((box, {"bbox": [0, 0, 100, 100]}), (fork, {"name": "spoon"})):
        before = {**part}
        part.update(change)
        with pytest.raises(ValueError, match=r"The boxes, outlines or categories of a.jpg have changed since"):
            bench(write(tmp_path, content), folder, target="label", **options)
        part.update(before)


def test_annotations_without_a_picture_are_left_out_and_named(content: dict[str, Any], tmp_path: Path) -> None:
    content["images"].append({"id": 9, "file_name": "d.jpg"})
    content["annotations"].append(annotation(11, 48, [0, 0, 9, 9]))
    source = find_source(write(tmp_path, content))
    assert len(source.images) == 3
    assert source.notes == [
        "Left out: annotated images that are missing (1): d.jpg.",
        "Left out: annotations of images that are not listed (1): annotation 158.",
    ]


def test_two_categories_of_one_class_are_its_objects(content: dict[str, Any], tmp_path: Path) -> None:
    content["categories"].append({"id": 90, "name": "Cup"})
    content["annotations"].append(annotation(3, 90, [150, 100, 50, 50]))
    (tmp_path / "names.txt").write_text("cup\nfork\n")
    options: dict[str, Any] = {"models": [MODEL], "layers": ["relu"], "methods": ["centred-gaussian"]}
    options |= {"metrics": ["instances_reached"], "classes": str(tmp_path / "names.txt"), "target": "label"}
    found = records(bench(write(tmp_path, content), tmp_path / "out", **options))
    assert [(record["image"], record["requested"], record["instances"]) for record in found] == [
        ("a.jpg", "0", 2),
        ("a.jpg", "1", 1),
        ("b.jpg", "1", 0),
    ]


def test_repeated_ids_and_files_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    for part, entry, message in (
        ("images", {"id": 3, "file_name": "d.jpg"}, "2 of its images have the id 3; expected each id once"),
        ("images", {"id": 9, "file_name": "a.jpg"}, "2 of its images have the file_name 'a.jpg'"),
        ("categories", {"id": 48, "name": "knife"}, "2 of its categories have the id 48"),
    ):
        with pytest.raises(ValueError, match=message):
            find_source(write(tmp_path, content | {part: [*content[part], entry]}))


def test_boxes_that_contradict_their_outlines_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    square = [[104, 54, 140, 54, 140, 90], [110, 60, 110, 94, 104, 94]]
    reach = "and its polygons reach from 104, 54 to 140, 94; expected both in the pixels of the image"
    for box, message in (
        ([140, 94, -36, -40], r"The annotation 77: its bbox is \[140, 94, -36, -40\]; expected x, y, width and height"),
        (
            [104.4, 54, 140, 94],
            r"A bbox of a.jpg is 104.4, 54, 140, 94, and .* to 140, 94, as in 1 of 1; expected x, y",
        ),
        ([10, 5, 14, 4], f"A bbox of a.jpg is 10, 5, 14, 4, {reach}"),
        ([0.35, 0.22, 0.12, 0.17], reach),
    ):
        others = [annotation(7, 48, [30, 40, 90, 150]), annotation(7, 48, [30, 40, 90, 150])]
        content["annotations"] = [annotation(3, 47, box, segmentation=square), *others]
        with pytest.raises(ValueError, match=message):
            find_source(write(tmp_path, content))
    # Rounded, of a partly hidden object, of its visible part, from elsewhere, and without a box.
    for box in ([103, 53, 38, 42], [60, 30, 200, 150], [110, 60, 20, 20], [90, 70, 40, 40], [0, 0, 0, 0]):
        content["annotations"] = [annotation(3, 47, box, segmentation=square)]
        find_source(write(tmp_path, content))
    # In the corner of the image, and one larger box among others.
    content["annotations"] = [annotation(3, 47, [1, 2, 36, 40], segmentation=[[1, 2, 37, 2, 37, 42]])]
    find_source(write(tmp_path, content))
    content["annotations"] = [annotation(3, 47, [104, 54, side, 94], segmentation=square) for side in (36, 140)]
    find_source(write(tmp_path, content))


def test_boxes_in_shares_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    shares, pixels = annotation(3, 47, [0.25, 0.25, 0.75, 0.5]), annotation(7, 48, [0, 0, 9, 9])
    content["annotations"] = [shares]
    with pytest.raises(ValueError, match=r"in the first two pixels of its image; expected pixels, not"):
        find_source(write(tmp_path, content))
    # One small object, boxes that only hold a place, and shares of a side that is 1.
    sized = [image | {"width": 1, "height": 1} for image in content["images"]]
    for change in (
        {"annotations": [shares, pixels]},
        {"annotations": [shares | {"bbox": [0, 0, 1, 1]}]},
        {"images": sized},
    ):
        find_source(write(tmp_path, content | change))


def thousand_things() -> nn.Module:
    torch.manual_seed(0)
    return SmallNet(classes=1000)


def test_the_likeliest_of_the_classes_that_name_an_object_is_explained(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from captum_fusion._app.models import loading
    from captum_fusion._app.models.classifier import LoadedModel, imagenet_categories

    # A model with ImageNet's categories: a coffee mug and a cup are cups, and no class is a fork.
    model = LoadedModel(thousand_things(), categories=imagenet_categories())
    monkeypatch.setattr(loading, "_from_callable", lambda _: model)
    options: dict[str, Any] = {"models": ["any:thing"], "layers": ["relu"], "methods": ["grad-cam"]}
    options |= {"metrics": ["pointing_game"], "target": "best-label"}
    images = write(tmp_path, content)
    (record,) = records(bench(images, tmp_path / "out", **options))
    assert "2 of 3 images, such as b.jpg" in (tmp_path / "out" / "summary.md").read_text()
    assert (record["image"], record["requested"]) == ("a.jpg", "best-label 504|968")
    classifier = loading.load_classifier("any:thing")
    scores = classifier.scores(preprocessed(classifier, tmp_path / "val2017" / "a.jpg"))[0]
    assert record["target"] == max([504, 968], key=lambda index: float(scores[index]))
    assert record["pointing_game"] == 1
    content["annotations"] = content["annotations"][1:]
    with pytest.raises(ValueError, match="show no object of the model's classes; expected images of"):
        bench(write(tmp_path, content), tmp_path / "none", **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [{"id": 3, "file_name": "d.jpg"}]}, r"No image is in .*annotations or in .*val2017; .* d.jpg"),
        (
            {"images": [{"id": 3, "file_name": "a.jpg", "width": "300", "height": 240}]},
            r"The image a.jpg: its width and height are \['300', 240\]; expected numbers",
        ),
        ({"images": None}, "It has no list 'images'; expected one, as in COCO's own files"),
        ({"categories": [{"id": 3}]}, "Number 0 of its categories has no 'name'; expected id and name"),
        ({"annotations": [annotation(3, 47, [0, 0, 9])]}, r"The annotation 77: its bbox is \[0, 0, 9\]; expected x"),
        (
            {"annotations": [annotation(3, 47, [0, 0, 9, 9], segmentation=[[0, 0, 9, 9, 5]])]},
            r"its polygon is \[0, 0, 9, 9, 5\]; expected x and y of at least three corners",
        ),
        (
            {"annotations": [annotation(3, 47, [0, 0, 9, 9], segmentation={"counts": [7], "size": [2, 3]})]},
            r"its run lengths do not add up to its size \[2, 3\]",
        ),
        ({"categories": []}, r"The annotation 77: its category_id is 47; expected one of \[\]"),
        (
            {"annotations": [annotation(3, 47, [0, 0, 9, 9], segmentation={"counts": "PP", "size": [240, 300]})]},
            "has compressed run lengths; expected polygons or a list of numbers",
        ),
    ],
)
def test_refuses(content: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path) -> None:
    if "images" in change:
        content["annotations"] = []
    with pytest.raises(ValueError, match=message):
        find_source(write(tmp_path, content | change))
