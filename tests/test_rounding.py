"""Scores and map values that are equal but for rounding have one defined result."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from captum_fusion import LayerFusionCam, LayerGroupCam, LayerUnionCam
from captum_fusion.functional import normalize
from captum_fusion.metrics import confidence_drop, confidence_increase, deletion
from tests.conftest import SmallNet

# Sums of numbers of this size, in double precision, carry an error of about 1e-10 into a probability.
SCALE = 1e6


@pytest.fixture(params=[0, 1])
def probability(request: pytest.FixtureRequest, net: SmallNet) -> Callable[[Tensor], Tensor]:
    """A probability of 0.5 for any input, but for rounding, which differs from pass to pass and from row to row."""
    net.double()
    passes = request.param

    def forward(x: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        error = 1e-10 * ((passes + torch.arange(len(x))) % 2).to(x)
        # With gradients, so that the gradient map is none of zeros.
        return 0.5 + error.unsqueeze(1) + 1e-13 * net(x / SCALE)

    return forward


@pytest.fixture
def large(images: Tensor) -> Tensor:
    return SCALE * images.double()


def test_fusion_cam_weighs_maps_alike_that_contribute_nothing(
    probability: Callable[[Tensor], Tensor], net: SmallNet, large: Tensor
) -> None:
    fusion_cam = LayerFusionCam(probability, net.features, activation=None)
    _, stages = fusion_cam.attribute(large, target=1, return_stages=True)
    assert all(contribution.eq(0).all() for contribution in stages[5:])
    torch.testing.assert_close(stages.combined, normalize(stages.denoised + stages.region))


def test_union_cam_takes_the_region_map_where_the_union_is_no_better(
    probability: Callable[[Tensor], Tensor], net: SmallNet, large: Tensor
) -> None:
    stages = LayerFusionCam(probability, net.features, activation=None).attribute(large, 1, return_stages=True)[1]
    union = LayerUnionCam(probability, net.features, activation=None).attribute(large, target=1)
    assert (stages.combined - stages.region).abs().amax() > 0.1
    torch.testing.assert_close(union[:, :1], stages.region)


def test_group_cam_gives_no_score_to_groups_that_add_nothing(
    probability: Callable[[Tensor], Tensor], net: SmallNet, large: Tensor
) -> None:
    assert LayerGroupCam(probability, net.features, activation=None).attribute(large, target=1).eq(0).all()


@pytest.mark.parametrize("metric", [confidence_drop, confidence_increase])
def test_masks_that_change_nothing_neither_lose_nor_gain(
    metric: Callable[..., Tensor], probability: Callable[[Tensor], Tensor], large: Tensor
) -> None:
    assert metric(probability, large, torch.rand(3, 1, 4, 4), target=1, activation=None).eq(0).all()


def test_pixels_whose_importance_ties_are_removed_in_row_order() -> None:
    above = 0.5 + torch.finfo(torch.float32).eps
    removed: list[list[float]] = []

    def forward(x: Tensor) -> Tensor:
        removed.extend((1 - x[:, 0]).tolist())
        return x.mean(dim=2)

    saliency = torch.tensor([[[0.0, 0.5, above, 1.0]]])
    deletion(forward, torch.ones(1, 1, 4), saliency, target=0, steps=4, activation=None)
    assert removed[1:6] == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]]
