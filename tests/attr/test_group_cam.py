import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from captum_fusion import LayerGroupCam
from tests import straight_line
from tests.cases import NAMES, TARGETS, case
from tests.conftest import SmallNet


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_straight_line_computation(name: str) -> None:
    model, layer, images, _, _ = case(name)
    attributions = LayerGroupCam(model, layer, groups=7).attribute(images, target=TARGETS)
    assert attributions.shape == images.shape
    for attribution, x, target in zip(attributions, images.split(1), TARGETS, strict=True):
        activations, gradients = straight_line.activations_and_gradients(model, layer, x, target)
        with torch.no_grad():
            probability = straight_line.probability(model, target)
            blurred = straight_line.blur(x, 51, 50.0)
            expected = straight_line.group_cam(activations, gradients, 7, probability, x, blurred)
        for channel in attribution:
            np.testing.assert_allclose(channel, expected, atol=1e-5)


def test_uneven_groups_and_a_baseline_in_one_to_three_dimensions() -> None:
    for axes in [1, 2, 3]:
        model = SmallNet(axes).eval()
        images = torch.randn(2, 3, *(9, 6, 7)[:axes])
        attributions = LayerGroupCam(model, model.features, groups=4).attribute(images, target=1, baselines=0.25)
        for attribution, x in zip(attributions, images.split(1), strict=True):
            activations, gradients = straight_line.activations_and_gradients(model, model.features, x, 1)
            with torch.no_grad():
                probability = straight_line.probability(model, 1)
                expected = straight_line.group_cam(activations, gradients, 4, probability, x, torch.full_like(x, 0.25))
            np.testing.assert_allclose(attribution[0], expected, atol=1e-5)


def test_the_baseline_is_the_blurred_input(net: SmallNet) -> None:
    images = torch.rand(2, 3, 60, 64)
    group_cam = LayerGroupCam(net, net.features, groups=3)
    blurred = gaussian_blur(images, [51, 51], [50.0, 50.0])
    torch.testing.assert_close(
        group_cam.attribute(images, target=0), group_cam.attribute(images, target=0, baselines=blurred)
    )


def test_a_blurred_input_among_others(net: SmallNet, images: Tensor) -> None:
    def forward(first: Tensor, table: Tensor, second: Tensor) -> Tensor:
        return net(first + second) + table

    inputs = (images, torch.randn(3, 3), torch.rand_like(images))
    group_cam = LayerGroupCam(forward, net.features, groups=3)
    attributions = group_cam.attribute(inputs, target=0, baselines=(None, None, 0.5))
    blurred = straight_line.blur(images, 51, 50.0)
    explicit = group_cam.attribute(inputs, target=0, baselines=(blurred, 0, 0.5))
    assert attributions[1].eq(0).all()
    torch.testing.assert_close(attributions[0], explicit[0])
    with pytest.raises(ValueError, match="2 baselines were given for 3 inputs"):
        group_cam.attribute(inputs, target=0, baselines=(None, None))


def test_refuses_too_few_groups(net: SmallNet) -> None:
    for groups in [0, -1]:
        with pytest.raises(ValueError, match=f"groups is {groups}; expected at least 1"):
            LayerGroupCam(net, net.features, groups=groups)


def test_refuses_more_groups_than_channels(net: SmallNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match="groups is 7; expected at most 6, the number of the layer's channels"):
        LayerGroupCam(net, net.features, groups=7).attribute(images, target=0)
