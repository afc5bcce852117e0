"""Boxes and outlines in the model's input, through turning, scaling and cropping."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from captum_fusion._app.models.preprocessing import Frame, Preprocessing
from captum_fusion.benchmark._dataset import Instance, LabelledImage, Outline, place

# The model sees the left half of a picture of 40 by 20 pixels, at twice its size.
FRAME = Frame(0, 0, 20, 20)


def regions(tmp_path: Path, *instances: Instance) -> Any:
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    picture = LabelledImage("a.png", tmp_path / "a.png", instances=instances)
    return place(picture, FRAME, 40).regions(instances)


def test_boxes_and_outlines_are_moved_with_the_picture_and_cut(tmp_path: Path) -> None:
    rectangle = Outline(polygons=[[4, 2, 30, 2, 30, 10, 4, 10]])
    boxes, mask, _ = regions(tmp_path, Instance(0, (4, 2, 30, 10), rectangle))
    assert boxes.tolist() == [[8, 4, 40, 20]]
    expected = torch.zeros(40, 40, dtype=torch.bool)
    expected[4:20, 8:] = True
    assert torch.equal(mask, expected)


def test_run_lengths_count_down_the_columns(tmp_path: Path) -> None:
    # 20 rows, 40 columns: off for 3 columns and 5 rows, on for 10 rows, then off to the end.
    runs = Outline(runs=[65, 10, 725], size=(20, 40))
    _, mask, instances = regions(tmp_path, Instance(0, (3, 5, 4, 15), runs))
    expected = torch.zeros(40, 40, dtype=torch.bool)
    expected[10:30, 6:8] = True
    assert torch.equal(mask, expected)
    assert torch.equal(instances[0], expected)


def test_what_is_not_seen_is_no_region_and_a_crowd_is_no_single_object(tmp_path: Path) -> None:
    outside = Instance(0, (25, 2, 30, 10), Outline(polygons=[[25, 2, 30, 2, 30, 10]]))
    crowd = Instance(0, (0, 0, 10, 10), Outline(runs=[0, 800], size=(20, 40)), crowd=True)
    boxes, mask, instances = regions(tmp_path, outside, crowd)
    assert boxes.tolist() == [[0, 0, 20, 20]]
    assert mask.all()
    assert instances == []
    boxes, mask, instances = regions(tmp_path)
    assert boxes.shape == (0, 4)
    assert not mask.any()
    assert instances == []


def test_an_object_without_an_outline_leaves_no_mask_and_counts_by_its_box(tmp_path: Path) -> None:
    outlined = Instance(0, (0, 0, 5, 5), Outline(polygons=[[0, 0, 5, 0, 5, 5]]))
    boxes, mask, instances = regions(tmp_path, outlined, Instance(0, (5, 5, 10, 10)))
    assert len(boxes) == 2
    assert not mask.any()
    assert [region.shape for region in instances] == [(40, 40), (4,)]
    assert instances[1].tolist() == [10, 10, 20, 20]


@pytest.mark.parametrize(
    ("polygon", "area"),
    [
        # pycocotools' areas, of the outlines as COCO writes them.
        ([0, 0, 10, 0, 10, 10, 0, 10], 100),
        ([0.5, 0.5, 5.5, 0.5, 5.5, 5.5, 0.5, 5.5], 25),
        ([1, 1, 8, 1, 4, 7], 21),
        ([-3, -3, 5, -3, 5, 5, -3, 5], 25),
    ],
)
def test_polygons_are_filled_as_pycocotools_fills_them(polygon: list[float], area: int) -> None:
    centres = (np.mgrid[:20, :20][::-1] + 0.5).reshape(2, -1).T
    assert Outline(polygons=[polygon]).contains(centres).sum() == area


@pytest.mark.parametrize(("scale", "upright"), [(1, False), (2, False), (1, True)])
def test_objects_are_turned_and_scaled_with_their_picture(tmp_path: Path, scale: float, upright: bool) -> None:
    # Nothing distinguishes upright annotations of an orientation below 5 from those of the stored picture.
    for name in ("a.png", "a.tif"):
        for orientation in range(5 if upright else 1, 9):
            assert_regions_follow(tmp_path / name, orientation, scale, upright)


def assert_regions_follow(image: Path, orientation: int, scale: float, upright: bool) -> None:
    # A picture of 48 by 32 pixels whose object, in a corner of the stored picture, is red.
    pixels = np.zeros((32, 48, 3), dtype=np.uint8)
    pixels[2:10, 4:16, 0] = 255
    stored, box, size = Image.fromarray(pixels), (4, 2, 16, 10), (48, 32)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(image, exif=exif)
    with Image.open(image) as file:
        shown = ImageOps.exif_transpose(file)
    red = np.asarray(shown)[..., 0] > 0
    if upright:
        rows, columns = np.nonzero(red)
        box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
        size = shown.size
    x1, y1, x2, y2 = (scale * side for side in box)
    outline = Outline(polygons=[[x1, y1, x2, y1, x2, y2, x1, y2]])
    instance = Instance(0, (x1, y1, x2, y2), outline)
    picture = LabelledImage("a.png", image, (0,), (instance,), (round(scale * size[0]), round(scale * size[1])))
    preprocessing = Preprocessing(32, 32, (0.0,), (1.0,))
    placement = place(picture, preprocessing.frame(*shown.size), 32)
    boxes, mask, _ = placement.regions([instance])
    seen = preprocessing.crop(shown)[0, 0] > 0
    assert torch.equal(mask, seen), (image.name, orientation)
    rows, columns = (torch.nonzero(seen.any(dim=axis)).flatten() for axis in (1, 0))
    assert boxes.tolist() == [[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], (image.name, orientation)
    assert ("turned" in placement.note) == (orientation != 1 and not upright)
    assert ("scaled" in placement.note) == (scale != 1)


@pytest.mark.parametrize(
    ("size", "instance", "message"),
    [
        ((30, 30), Instance(0, (0, 0, 9, 9)), "is for an image of 30 x 30 pixels, but the image has 40 x 20"),
        (None, Instance(0, (0, 0, 80, 40)), "a box that reaches to 80, 40 in 40 x 20 pixels"),
        (
            (40, 20),
            Instance(0, (0, 0, 9, 9), Outline(runs=[8], size=(4, 2))),
            r"has run lengths of \(2, 4\) pixels; expected \(40, 20\)",
        ),
    ],
)
def test_annotations_of_another_picture_are_refused(
    tmp_path: Path, size: Any, instance: Instance, message: str
) -> None:
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        place(LabelledImage("a.png", tmp_path / "a.png", (0,), (instance,), size), FRAME, 40)
