"""Winsor-CAM: the straight-line computation, and Grad-CAM of one layer."""

from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import Tensor, nn

from captum_fusion import WinsorCam
from captum_fusion.functional import normalize, winsorized_weights
from tests import straight_line
from tests.attr.test_full_grad import DeepNet
from tests.conftest import SmallNet

pytestmark = pytest.mark.every_device


class Once(nn.Module):
    """The layers of a deep network, each run once, with ReLUs in place."""

    def __init__(self, deep: DeepNet) -> None:
        super().__init__()
        self.deep = deep

    def forward(self, x: Tensor) -> Tensor:
        relu = self.deep.relu
        x = relu(self.deep.norm(self.deep.plain(relu(self.deep.twice(relu(self.deep.stem(x)))))))
        return self.deep.head(x.flatten(2).mean(2))


def test_equals_the_straight_line_computation() -> None:
    seen, targets = set(), [0, 1, 2, 0, 1, 2]
    for axes in [1, 2, 3]:
        model = Once(DeepNet(axes)).eval().double()
        images = torch.randn(6, 3, *(9, 8, 10)[:axes]).double()
        layers = [part for part in model.modules() if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
        for percentile in (0.0, 40.0, 99.0, 100.0):
            attributions = WinsorCam(model, percentile=percentile).attribute(images, target=targets)
            for x, target, attribution in zip(images.split(1), targets, attributions, strict=True):
                expected = straight_line.winsor_cam(model, layers, x, target, percentile)
                for channel in attribution:
                    np.testing.assert_allclose(channel, expected, atol=1e-9)
                seen.add(float(expected.sum()))
    assert len(seen) > 20


def test_weights_worked_out_by_hand() -> None:
    importances = torch.tensor([[0.0, -2.0, 3.0], [1.0, 1.0, -1.0], [-1.0, -2.0, 0.0], [1.0, 2.0, 4.0]])
    expected = torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.1, 0.4, 1.0]])
    torch.testing.assert_close(winsorized_weights(importances, 100.0), expected)
    # The median of 1, 2 and 4 is 2.
    torch.testing.assert_close(winsorized_weights(importances[3:], 50.0), torch.tensor([[0.1, 1.0, 1.0]]))


def test_one_layer_is_grad_cam_where_its_mean_gradient_is_positive() -> None:
    net, images = SmallNet().eval(), torch.rand(3, 3, 12, 10)
    maps = normalize(LayerGradCam(net, net.features).attribute(images, target=1).relu())
    expected = LayerAttribution.interpolate(maps, (12, 10), "bilinear").detach()
    ours = WinsorCam(lambda x: net(x), layers=[net.features]).attribute(images, target=1)
    for example, x in enumerate(images.split(1)):
        _, gradients = straight_line.activations_and_gradients(net, net.features, x, 1)
        torch.testing.assert_close(ours[example], (expected[example] * (gradients.mean() > 0)).expand_as(x[0]))
    assert not any(part._forward_hooks for part in net.modules())


def test_refuses(net: SmallNet, images: Tensor) -> None:
    with pytest.raises(TypeError, match="forward_func is a function, whose convolutions are unknown"):
        WinsorCam(lambda x: net(x))
    with pytest.raises(ValueError, match="percentile is 101; expected a number in"):
        WinsorCam(net, percentile=101)
    inputs: Any = (images, images)
    with pytest.raises(TypeError, match="inputs are a tuple; expected one tensor"):
        WinsorCam(net).attribute(inputs, target=1)
    layers: Any = [net.features, "head"]
    with pytest.raises(TypeError, match="layer is 'head'; expected a torch"):
        WinsorCam(net, layers=layers).attribute(images, target=1)
    assert not net.features._forward_hooks
    bare = nn.Sequential(nn.Flatten(), nn.Linear(360, 2)).to(images.device)
    for model, layers, maps in [
        (bare, None, "0 of 0"),
        (net, [], "0 of 0"),
        (net, [net.head], "0 of 1"),
        (net, [net.features, net.head], "1 of 2"),
        (net, [net.features, nn.Identity()], "1 of 2"),
    ]:
        with pytest.raises(ValueError, match=f"{maps} layers gave a map of 2 spatial axes"):
            WinsorCam(model, layers=layers).attribute(images, target=1)
