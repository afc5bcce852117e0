import torch

from captum_fusion._app.models.preprocessing import Frame
from captum_fusion.benchmark._dataset import Instance, Outline, regions_seen

# The model sees the left half of a picture of 40 by 20 pixels, at twice its size.
FRAME = Frame(0, 0, 20, 20)


def test_boxes_and_outlines_are_moved_with_the_picture_and_cut() -> None:
    rectangle = Outline(polygons=[[4, 2, 30, 2, 30, 10, 4, 10]])
    regions = regions_seen([Instance(0, (4, 2, 30, 10), rectangle)], FRAME, 40)
    assert regions.boxes.tolist() == [[8, 4, 40, 20]]
    expected = torch.zeros(40, 40, dtype=torch.bool)
    expected[4:20, 8:] = True
    # Pillow draws the pixels that an edge touches.
    assert (regions.mask & ~expected).sum() <= 2 * (32 + 16)
    assert not (expected & ~regions.mask).any()


def test_run_lengths_count_down_the_columns() -> None:
    # 20 rows, 40 columns: off for 3 columns and 5 rows, on for 10 rows, then off to the end.
    runs = Outline(runs=[65, 10, 725], size=(20, 40))
    regions = regions_seen([Instance(0, (3, 5, 4, 15), runs)], FRAME, 40)
    expected = torch.zeros(40, 40, dtype=torch.bool)
    expected[10:30, 6:8] = True
    assert torch.equal(regions.mask, expected)
    assert torch.equal(regions.singles[0], expected)


def test_what_is_not_seen_is_no_region_and_a_crowd_is_no_single_object() -> None:
    outside = Instance(0, (25, 2, 30, 10), Outline(polygons=[[25, 2, 30, 2, 30, 10]]))
    crowd = Instance(0, (0, 0, 10, 10), Outline(runs=[0, 800], size=(20, 40)), crowd=True)
    regions = regions_seen([outside, crowd], FRAME, 40)
    assert regions.boxes.tolist() == [[0, 0, 20, 20]]
    assert regions.mask.all()
    assert regions.singles == []


def test_an_object_without_an_outline_leaves_no_mask_and_counts_by_its_box() -> None:
    outlined = Instance(0, (0, 0, 5, 5), Outline(polygons=[[0, 0, 5, 0, 5, 5]]))
    regions = regions_seen([outlined, Instance(0, (5, 5, 10, 10))], FRAME, 40)
    assert len(regions.boxes) == 2
    assert not regions.mask.any()
    assert [region.shape for region in regions.singles] == [(40, 40), (4,)]
    assert regions.singles[1].tolist() == [10, 10, 20, 20]


def test_no_objects_are_no_regions() -> None:
    regions = regions_seen([], FRAME, 40)
    assert regions.boxes.shape == (0, 4)
    assert not regions.mask.any()
    assert regions.singles == []
