from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn

from captum_fusion import (
    LayerEigenCam,
    LayerFEM,
    LayerFinerCam,
    LayerGradCamPlusPlus,
    LayerKPCACam,
    LayerLayerCam,
    LayerShapleyCam,
    LayerXGradCam,
)
from tests import straight_line
from tests.cases import NAMES, TARGETS, case
from tests.conftest import SmallNet

BASES = [
    (None, straight_line.grad_cam),
    (LayerGradCamPlusPlus, straight_line.grad_cam_plus_plus),
    (LayerXGradCam, straight_line.x_grad_cam),
    (LayerLayerCam, straight_line.layer_cam),
]


@pytest.mark.parametrize(
    ("method", "expected", "name"), [(*base, name) for base, name in zip(BASES, [*NAMES, NAMES[0]], strict=True)]
)
def test_equals_the_straight_line_computation(
    method: Any, expected: Callable[..., straight_line.Array], name: str
) -> None:
    model, layer, images, _, _ = case(name)
    attributions = LayerFinerCam(model, layer, method=method).attribute(images, target=TARGETS)
    for attribution, x, target in zip(attributions, images.split(1), TARGETS, strict=True):
        with torch.no_grad():
            scores = model(x)[0].tolist()
        nearest = sorted(range(7), key=lambda k: abs(scores[k] - scores[target]))
        assert nearest[0] == target
        weights = [1.0 if k == target else -0.6 / 3 if k in nearest[1:4] else 0.0 for k in range(7)]
        theirs = expected(*straight_line.activations_and_gradients(model, layer, x, target, weights))
        np.testing.assert_allclose(attribution[0].detach(), theirs, atol=1e-5 * np.abs(theirs).max())


def test_worked_out_by_hand() -> None:
    # Scores 5 a, 4 b, 2 a and a - 3 b of a = 1, b = 1: of the first class, 5, the nearest are 4 and 2.
    # 5 a - 1/2 (4 b + 2 a) / 2 has the gradients 4.5 and -1.
    x = torch.ones(1, 2, 1)
    identity = nn.Identity()

    def forward(inputs: Tensor) -> Tensor:
        a, b = identity(inputs)[:, :, 0].unbind(1)
        return torch.stack([5 * a, 4 * b, 2 * a, a - 3 * b], dim=1)

    attributions = LayerFinerCam(forward, identity, strength=0.5, references=2).attribute(x, target=0)
    torch.testing.assert_close(attributions, torch.tensor([[[3.5]]]))


def test_without_strength_it_is_the_method(net: SmallNet, images: Tensor) -> None:
    for method, alone in [(None, LayerGradCam), *((method, method) for method, _ in BASES[1:])]:
        ours = LayerFinerCam(net, net.features, method=method, strength=0).attribute(images, target=[0, 1, 2])
        torch.testing.assert_close(ours, alone(net, net.features).attribute(images, target=[0, 1, 2]))


def test_fewer_classes_than_references_are_all_compared(net: SmallNet, images: Tensor) -> None:
    ours = LayerFinerCam(net, net.features, references=50).attribute(images, target=1)
    assert torch.equal(ours, LayerFinerCam(net, net.features, references=2).attribute(images, target=1))


@pytest.mark.filterwarnings("error::UserWarning")
def test_classes_that_a_mask_rules_out_are_not_compared(net: SmallNet, images: Tensor) -> None:
    out = torch.tensor([False, False, True])
    expected = LayerGradCam(lambda x: (y := net(x))[:, 1] - 0.6 * y[:, 0], net.features).attribute(images)
    for low in (-torch.inf, torch.finfo(torch.float32).min, -1e9, torch.finfo(torch.float16).min, -1e4):
        for forward in (
            lambda x, low=low: net(x).masked_fill(out, low),
            lambda x, low=low: net(x) + out * max(low, -1e30),
        ):
            # Scores that may be logits are named, and only where they would have been compared.
            with (
                pytest.warns(match="Classes with scores below -5000 and below .* are not compared")
                if low > -1e9
                else nullcontext()
            ):
                ours = LayerFinerCam(forward, net.features).attribute(images, target=1)
            torch.testing.assert_close(ours, expected)
            LayerFinerCam(forward, net.features, references=1).attribute(images, target=1)
    # Scores of another scale, such as negative distances, rule no class out.
    scaled = LayerFinerCam(lambda x: 1e4 * (net(x) - 10), net.features).attribute(images, target=1)
    torch.testing.assert_close(scaled / 1e4, LayerFinerCam(net, net.features).attribute(images, target=1))


def test_refuses_classes_of_which_none_can_be_compared(net: SmallNet, images: Tensor) -> None:
    out = torch.tensor([True, False, True])
    for low, reason in (
        (-1e4, "0 have NaN or infinity, and 2 scores as low as"),
        (torch.nan, "2 have NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=f"Of the 2 classes besides the target of example 0, {reason}"):
            LayerFinerCam(lambda x, low=low: net(x).masked_fill(out, low), net.features).attribute(images, target=1)


def test_classes_of_a_pixel_are_compared_at_this_pixel(images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1))
    pixels = [(0, 1, 2), (4, 3, 3), (2, 0, 9)]
    ours = LayerFinerCam(net, net[0]).attribute(images, target=pixels)
    for example, (chosen, row, column) in enumerate(pixels):
        x = images[example : example + 1]
        at_pixel = LayerFinerCam(lambda x, row=row, column=column: net(x)[:, :, row, column], net[0])
        torch.testing.assert_close(ours[example : example + 1], at_pixel.attribute(x, target=chosen))


def test_refuses_a_single_class(net: SmallNet, images: Tensor) -> None:
    for forward in (lambda x: net(x)[:, 0], lambda x: net(x)[:, :1]):
        with pytest.raises(ValueError, match="expected at least two classes in dimension 1"):
            LayerFinerCam(forward, net.features).attribute(images)


def test_refuses(net: SmallNet) -> None:
    without = (LayerShapleyCam, LayerEigenCam, LayerKPCACam, LayerFEM)
    for options, error, message in [
        ({"strength": -0.1}, ValueError, "strength is -0.1; expected a number that is not negative"),
        ({"references": 0}, ValueError, "references is 0; expected at least 1"),
        ({"method": LayerGradCam}, TypeError, "method is <class .*LayerGradCam'>; expected a class of captum_fusion's"),
        ({"method": "grad-cam"}, TypeError, "method is 'grad-cam'; expected a class"),
        *(({"method": method}, TypeError, "expected a class of .* first gradients") for method in without),
    ]:
        with pytest.raises(error, match=message):
            LayerFinerCam(net, net.features, **options)
