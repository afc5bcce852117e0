"""Methods need no more than their equation does: no gradients, no mask, no detection."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_fusion import (
    LayerEigenCam,
    LayerFusionCam,
    LayerGradCamPlusPlus,
    LayerScoreCam,
    last_feature_map,
)
from captum_fusion.metrics import (
    confidence_drop,
    deletion,
    insertion,
)
from captum_fusion.targets import box_score, region_scores
from tests.assumptions.networks import cnn


def test_eigen_cam_needs_no_gradients() -> None:
    net, x = cnn(), torch.rand(1, 3, 8, 8)

    def in_place(x: Tensor) -> Tensor:
        output = net(x).sigmoid()
        output[:, :2] = output[:, :2] * 2 - 0.5
        return output

    expected = LayerEigenCam(net, net[1]).attribute(x, target=1)
    for forward in (in_place, lambda x: net(x).detach()):
        torch.testing.assert_close(LayerEigenCam(forward, net[1]).attribute(x, target=1), expected)
    with torch.inference_mode():
        torch.testing.assert_close(LayerEigenCam(net, net[1]).attribute(x, target=1), expected)


def test_a_mask_among_the_inputs_passes_through() -> None:
    net, x = cnn(), torch.rand(1, 3, 8, 8)
    mask = torch.rand(1, 1, 8, 8) > 0.3

    def forward(x: Tensor, mask: Tensor) -> Tensor:
        return net(x * mask)

    expected = LayerScoreCam(forward, net[1]).attribute(x, target=1, additional_forward_args=mask)
    torch.testing.assert_close(LayerScoreCam(forward, net[1]).attribute((x, mask), target=1), expected)
    with pytest.raises(TypeError, match="additional_forward_args"):
        LayerScoreCam(lambda mask: net(mask.float().expand(-1, 3, -1, -1)), net[1]).attribute(mask, target=1)


@pytest.mark.parametrize("metric", [confidence_drop, insertion, deletion])
def test_one_map_is_for_the_inputs_that_can_be_masked(metric: Any) -> None:
    net, images, mask = cnn(), torch.rand(2, 3, 16, 16), torch.rand(2, 1, 16, 16) > 0.3
    maps = torch.rand(2, 1, 16, 16)
    found = metric(lambda x, m: net(x * m), (images, mask), maps, target=1)
    right = metric(lambda x, m: net(x * m), images, maps, additional_forward_args=mask, target=1)
    assert torch.equal(found, right)


@pytest.mark.parametrize("algorithm", [LayerGradCamPlusPlus, LayerScoreCam, LayerFusionCam])
def test_a_box_that_is_not_found_has_a_map_of_zeros(algorithm: Any) -> None:
    convolution = cnn()[0]

    def detector(images: Tensor) -> list[dict[str, Tensor]]:
        score = torch.relu(convolution(images)).mean((1, 2, 3))
        boxes = torch.tensor([[0.0, 0, 4, 4]])
        return [{"boxes": boxes, "labels": torch.tensor([1]), "scores": s[None]} for s in score]

    forward = box_score(detector, [0, 0, 4, 4], label=2)
    options = {"activation": None} if algorithm is LayerFusionCam else {}
    with pytest.warns(UserWarning, match=r"The examples \[0, 1\] have no detection of the label"):
        maps = algorithm(forward, convolution, **options).attribute(torch.rand(2, 3, 8, 8))
    assert not maps.any()


@pytest.mark.parametrize("side", [16, 32])
def test_scores_of_a_cube_are_no_feature_map(side: int) -> None:
    up = nn.ConvTranspose3d(8, 2, 3, 2, padding=1, output_padding=1)
    net = nn.Sequential(nn.Conv3d(1, 8, 3, 2, 1), nn.ReLU(), up).eval()
    feature_map = last_feature_map(
        net, torch.rand(1, 1, side, side, side), region_scores(net, torch.ones(side, side, side))
    )
    assert (feature_map.name, feature_map.shape) == ("1", (8, *(side // 2,) * 3))
