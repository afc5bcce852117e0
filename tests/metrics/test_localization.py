import pytest
import torch
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from captum_fusion.metrics import energy_pointing_game, instances_reached, pointing_game


@pytest.fixture
def attributions() -> Tensor:
    """A maximum of 3 in row 1, column 2 and a 1 in row 3, column 0 of 4 by 6 pixels."""
    values = torch.zeros(1, 1, 4, 6)
    values[0, 0, 1, 2] = 3
    values[0, 0, 3, 0] = 1
    return values


def test_boxes(attributions: Tensor) -> None:
    for boxes, hit, share in [
        ([[2, 1, 3, 2]], 1, 0.75),
        ([[0, 3, 1, 4]], 0, 0.25),
        ([[0, 3, 1, 4], [2, 0, 6, 2]], 1, 1),
        ([[3, 0, 6, 4]], 0, 0),
        ([[2.9, 1.9, 3.5, 2.5]], 1, 0.75),
    ]:
        assert pointing_game(attributions, [torch.tensor(boxes)]).item() == hit
        assert energy_pointing_game(attributions, [torch.tensor(boxes)]).item() == pytest.approx(share)
        xyxy = torch.tensor(boxes).float()
        xywh = torch.cat([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], dim=1)
        for values, form in ((xyxy, BoundingBoxFormat.XYXY), (xywh, BoundingBoxFormat.XYWH)):
            given = BoundingBoxes(values, format=form, canvas_size=(4, 6))
            assert pointing_game(attributions, [given]).item() == hit


def test_boxes_in_0_to_1_warn() -> None:
    maps = torch.rand(1, 1, 12, 16)
    unit = torch.tensor([[0.25, 0.25, 0.75, 0.75], [0, 0, 1, 1]])
    tiny = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    for metric in (pointing_game, energy_pointing_game, instances_reached):
        for boxes in (unit, tiny, BoundingBoxes(unit, format="XYXY", canvas_size=(12, 16))):
            with pytest.warns(UserWarning, match="example 0 lie in the first pixel of an image that is 16 wide and 12"):
                metric(maps, [boxes])
        # The first pixel itself, beside others, in whole numbers and in a small image.
        for boxes in (torch.cat([tiny, 9 * tiny]), tiny.long(), 2 * tiny):
            metric(maps, [boxes])
        metric(maps[..., :8, :8], [tiny])
        metric(maps, [torch.empty(0, 4)])


def test_masks(attributions: Tensor) -> None:
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[3, 0] = True
    for regions in ([mask], mask[None], mask[None, None]):
        assert pointing_game(attributions, regions).item() == 0
        assert energy_pointing_game(attributions, regions).item() == 0.25


def test_an_image_without_the_class_is_nan(attributions: Tensor) -> None:
    both = attributions.repeat(3, 1, 1, 1)
    regions = [torch.tensor([[0, 0, 6, 4]]), torch.empty(0, 4), torch.zeros(4, 6, dtype=torch.bool)]
    for metric in (pointing_game, energy_pointing_game):
        values = metric(both, regions)
        assert values[0] == 1
        assert values[1:].isnan().all()


def test_a_map_of_zeros_points_nowhere(attributions: Tensor) -> None:
    for metric in (pointing_game, energy_pointing_game):
        assert metric(torch.zeros_like(attributions), [torch.tensor([[0, 0, 6, 4]])]).item() == 0


def test_layer_resolution_is_brought_to_the_image() -> None:
    coarse = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])
    regions = [torch.tensor([[10, 0, 20, 5]])]
    assert pointing_game(coarse, regions, size=(10, 20)).item() == 1
    assert 0.5 < energy_pointing_game(coarse, regions, size=(10, 20)).item() < 1


def test_refuses(attributions: Tensor) -> None:
    for regions, message in [
        ([torch.tensor([[0, 0, 7, 4]])], r"A box of example 0 is \(0, 0, 7, 4\); expected .* 6 wide and 4 high"),
        ([torch.tensor([[-1, 0, 2, 2]])], "expected x1 < x2 and y1 < y2 inside the image"),
        ([torch.tensor([[3, 0, 3, 2]])], "expected x1 < x2"),
        ([], "regions has 0 entries; expected one for each of the 1 examples"),
        ([torch.zeros(4, 5, dtype=torch.bool)], r"has shape \(4, 5\); expected the image's, \(4, 6\)"),
        ([torch.zeros(4, 6)], "expected boxes .* or a mask of dtype bool"),
        (
            [BoundingBoxes([[0, 0, 1, 1]], format="XYXY", canvas_size=(8, 8))],
            r"lie in an image of \(8, 8\); expected the size \(4, 6\)",
        ),
    ]:
        for metric in (pointing_game, energy_pointing_game):
            with pytest.raises(ValueError, match=message):
                metric(attributions, regions)


def test_as_many_peaks_as_instances_point() -> None:
    """Peaks of 4, 2 and 1 in columns 0, 3 and 5; the slope beside the first one is no peak."""
    maps = torch.tensor([[[[4.0, 3.0, 0.0, 2.0, 0.0, 1.0]] * 4]])
    columns = {column: [column, 0, column + 1, 4] for column in range(6)}

    def reached(*given: int) -> float:
        return instances_reached(maps, [torch.tensor([columns[column] for column in given])]).item()

    assert reached(0) == 1
    assert reached(3) == 0
    assert reached(0, 3) == 1
    assert reached(0, 1) == 0.5
    assert reached(0, 5) == 0.5
    assert reached(0, 3, 5) == 1
    assert reached(1, 2, 4) == 0
    # More points than peaks.
    assert reached(0, 1, 2, 3, 4, 5) == pytest.approx(3 / 6)
    masks = torch.zeros(2, 4, 6, dtype=torch.bool)
    masks[0, :, 0] = masks[1, 2, 5] = True
    for regions in (masks, list(masks)):
        assert instances_reached(maps, [regions]).item() == 0.5


def test_equal_pixels_that_touch_are_one_peak() -> None:
    # A plateau of six pixels at the border, and two peaks further on: three points are three places.
    maps = torch.zeros(1, 1, 4, 9)
    maps[0, 0, :2, :3] = 3
    maps[0, 0, 3, 5] = 2
    maps[0, 0, 0, 8] = 1
    boxes = torch.tensor([[2, 1, 3, 2], [5, 3, 6, 4], [8, 0, 9, 1]])
    assert instances_reached(maps, [boxes]).item() == 1


def test_instances_are_counted_for_each_example_and_zeros_reach_none() -> None:
    maps = torch.zeros(3, 1, 4, 6)
    maps[1:, :, 1, 2] = 1
    boxes = torch.tensor([[2, 1, 3, 2]])
    reached = instances_reached(maps, [boxes, boxes, torch.empty(0, 4)])
    assert reached[:2].tolist() == [0, 1]
    assert reached[2].isnan()


def test_instances_refuse() -> None:
    maps = torch.rand(2, 1, 4, 6)
    with pytest.raises(ValueError, match="regions has 1 entries; expected one for each of the 2 examples"):
        instances_reached(maps, [torch.tensor([[0, 0, 1, 1]])])
    with pytest.raises(ValueError, match="expected two spatial axes"):
        instances_reached(maps[:, :, 0], [torch.empty(0, 4)] * 2)
