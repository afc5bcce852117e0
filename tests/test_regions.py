"""Regions of maps equal scipy's connected components, and go into torchvision's and our own functions."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from captum_fusion.metrics import pointing_game, saliency_map
from captum_fusion.regions import instances, region_masks
from tests import straight_line

pytestmark = pytest.mark.every_device


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9])
def test_instances_are_scipys_components(threshold: float, device: torch.device) -> None:
    maps = torch.rand(4, 2, 14, 11, device=device)
    maps[1, :, ::2] = 0
    saliencies = saliency_map(maps, (14, 11)).cpu().numpy()
    for saliency, found in zip(saliencies[:, 0], instances(maps, threshold), strict=True):
        labels, count = ndimage.label(saliency >= threshold, np.ones((3, 3)))
        expected = {
            (float(saliency[labels == i].max()), (x.start, y.start, x.stop, y.stop), (labels == i).tobytes())
            for i, (y, x) in enumerate(ndimage.find_objects(labels), 1)
        }
        masks, boxes, scores = (found[name].cpu() for name in ("masks", "boxes", "scores"))
        assert expected == {
            (score, tuple(box), mask.numpy().tobytes())
            for score, box, mask in zip(scores.tolist(), boxes.tolist(), masks, strict=True)
        }
        assert len(scores) == count
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)


def test_a_spiral_is_one_region_and_a_diagonal_connects(device: torch.device) -> None:
    rows = ["#####.", ".....#", "####.#", "#..#.#", "#.##.#", "#....#", ".####."]
    spiral = torch.tensor([[pixel == "#" for pixel in row] for row in rows], device=device).float()
    (found,) = instances(spiral[None, None])
    assert torch.equal(found["masks"], spiral[None].bool())
    assert found["boxes"].tolist() == [[0, 0, 6, 7]]


def test_maps_of_zeros_have_no_region_and_constant_ones_are_one(device: torch.device) -> None:
    maps = torch.stack([torch.zeros(1, 3, 4), torch.ones(1, 3, 4), -torch.ones(1, 3, 4)]).to(device)
    assert region_masks(maps).flatten(1).sum(dim=1).tolist() == [0, 12, 0]
    nothing, everything, negative = instances(maps)
    for found in (nothing, negative):
        assert {name: tuple(value.shape) for name, value in found.items()} == {
            "masks": (0, 3, 4),
            "boxes": (0, 4),
            "scores": (0,),
        }
    assert everything["boxes"].tolist() == [[0, 0, 4, 3]]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_masks_of_enlarged_maps_with_channels_last(axes: int) -> None:
    size, enlarged = (3, 4, 2)[:axes], (7, 9, 5)[:axes]
    attributions = torch.randn(2, *size, 3).double()
    masks = region_masks(attributions, 0.4, enlarged, "absolute_value", channel_dim=-1)
    for mask, values in zip(masks, attributions.sum(dim=-1).abs().numpy(), strict=True):
        assert np.array_equal(mask[0], straight_line.normalize(straight_line.upsample(values, enlarged)) >= 0.4)


def test_they_fit_torchvision_and_the_pointing_game(images: Tensor) -> None:
    image = (images[0].sigmoid() * 255).byte().cpu()
    (found,) = instances(images[:1], 0.6)
    assert len(found["masks"]) > 1
    assert draw_bounding_boxes(image, found["boxes"]).shape == image.shape
    assert draw_segmentation_masks(image, found["masks"].cpu()).shape == image.shape
    # The first region holds the maximum, the last one does not.
    for regions in (region_masks(images[:1], 0.6), [found["boxes"][:1]], [found["masks"][0]]):
        assert pointing_game(images[:1], regions).item() == 1
    assert pointing_game(images[:1], [found["masks"][-1]]).item() == 0


def test_refuses() -> None:
    for threshold in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"threshold is .*; expected a number in \(0, 1\]"):
            region_masks(torch.rand(1, 1, 3, 3), threshold)
    with pytest.raises(ValueError, match=r"maps have the shape \(1, 1, 3\); expected two spatial axes"):
        instances(torch.rand(1, 1, 3))
