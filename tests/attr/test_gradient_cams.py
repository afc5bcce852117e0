"""Grad-CAM++ and XGrad-CAM."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import Tensor, nn

from captum_fusion import LayerGradCamPlusPlus, LayerXGradCam
from tests import straight_line
from tests.cases import NAMES, TARGETS, case
from tests.conftest import SmallNet

METHODS = [
    (LayerGradCamPlusPlus, straight_line.grad_cam_plus_plus),
    (LayerXGradCam, straight_line.x_grad_cam),
]


@pytest.mark.parametrize(("algorithm", "expected"), METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_straight_line_computation(
    algorithm: type[LayerAttribution], expected: Callable[..., straight_line.Array], name: str
) -> None:
    model, layer, images, _, _ = case(name)
    attributions = algorithm(model, layer).attribute(images, target=TARGETS)
    for attribution, x, target in zip(attributions, images.split(1), TARGETS, strict=True):
        theirs = expected(*straight_line.activations_and_gradients(model, layer, x, target))
        np.testing.assert_allclose(attribution[0].detach(), theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(("algorithm", "expected"), METHODS)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_signed_layers_in_one_to_three_dimensions(
    algorithm: type[LayerAttribution], expected: Callable[..., straight_line.Array], axes: int
) -> None:
    model = SmallNet(axes).eval()
    images = torch.randn(2, 3, *(9, 6, 7)[:axes])
    attributions = algorithm(model, model.features).attribute(images, target=1)
    for attribution, x in zip(attributions, images.split(1), strict=True):
        theirs = expected(*straight_line.activations_and_gradients(model, model.features, x, 1))
        np.testing.assert_allclose(attribution[0].detach(), theirs, atol=1e-5 * np.abs(theirs).max())


def test_grad_cam_plus_plus_worked_out_by_hand() -> None:
    # The layer is the input, f = 2 (left of channel 0) - (right of channel 0) + (left of channel 1).
    # Channel 0: A = [1, 3], sum 4, g = [2, -1]: alpha = 4 / (8 + 4 * 8) = 1/10, weight 2/10.
    # Channel 1: A = [1, 1], sum 2, g = [1, 0]: alpha = 1 / (2 + 2) = 1/4, weight 1/4.
    x = torch.tensor([[[1.0, 3.0], [1.0, 1.0]]])
    identity = nn.Identity()

    def forward(inputs: Tensor) -> Tensor:
        values = identity(inputs)
        return 2 * values[:, 0, 0] - values[:, 0, 1] + values[:, 1, 0]

    attributions = LayerGradCamPlusPlus(forward, identity).attribute(x)
    torch.testing.assert_close(attributions, torch.tensor([[[0.2 + 0.25, 0.6 + 0.25]]]))


def test_x_grad_cam_of_even_gradients_is_grad_cam(net: SmallNet, images: Tensor) -> None:
    # Global average pooling gives every pixel of a channel the same gradient.
    model = nn.Sequential(net.stem, net.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.head)
    ours = LayerXGradCam(model, net.features).attribute(images, target=0)
    torch.testing.assert_close(ours, LayerGradCam(model, net.features).attribute(images, target=0))


@pytest.mark.parametrize("algorithm", [algorithm for algorithm, _ in METHODS])
def test_a_dead_layer_gives_zeros(algorithm: type[LayerAttribution], net: SmallNet, images: Tensor) -> None:
    with torch.no_grad():
        net.features.weight.zero_()
        net.features.bias.zero_()
    assert algorithm(net, net.features).attribute(images, target=0).eq(0).all()


@pytest.mark.parametrize("algorithm", [algorithm for algorithm, _ in METHODS])
def test_shape_of_grad_cam_and_its_options(algorithm: type[LayerAttribution], net: SmallNet, images: Tensor) -> None:
    attributions = algorithm(net, net.features).attribute(images, target=0)
    assert attributions.shape == LayerGradCam(net, net.features).attribute(images, target=0).shape
    assert attributions.lt(0).any()
    rectified = algorithm(net, net.features).attribute(images, target=0, relu_attributions=True)
    assert torch.equal(rectified, attributions.relu())
    to_input = algorithm(net, net.features).attribute(images, target=0, attribute_to_layer_input=True)
    torch.testing.assert_close(to_input, algorithm(net, net.stem).attribute(images, target=0))
