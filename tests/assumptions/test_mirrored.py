"""Augmentations move the target and the arguments with the image."""

from typing import Any

import pytest
import torch
from captum.attr import LayerGradCam, Saliency
from torch import Tensor, nn
from torchvision.tv_tensors import BoundingBoxes

from captum_fusion import (
    SESS,
    AugmentationTunnel,
    LayerHiResCam,
)
from captum_fusion.targets import region_scores
from tests.assumptions.networks import cnn, scorer


@pytest.mark.parametrize("kind", ["region", "pixel", "mask", "mask without channels", "mask in a dictionary"])
def test_what_is_explained_is_mirrored_with_the_input(kind: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).eval()
    x, place = torch.rand(1, 3, 8, 10), torch.zeros(8, 10)
    place[2, 1] = 1

    def expected(place: Tensor, x: Tensor) -> Tensor:
        return LayerHiResCam(region_scores(net, place), net[1]).attribute(x, target=2)

    right = (expected(place, x) + expected(place.flip(-1), x.flip(-1)).flip(-1)) / 2
    forward, options = {
        "region": (region_scores(net, place), {"target": 2}),
        "pixel": (net, {"target": (2, 2, 1)}),
        "mask": (
            lambda x, where: (net(x) * where).sum((2, 3)),
            {"target": 2, "additional_forward_args": place[None, None]},
        ),
        "mask without channels": (
            lambda x, where: (net(x) * where[:, None]).sum((2, 3)),
            {"target": 2, "additional_forward_args": place[None]},
        ),
        "mask in a dictionary": (
            lambda x, where: (net(x) * where["mask"][0]).sum((2, 3)),
            {"target": 2, "additional_forward_args": {"mask": [place[None, None]]}},
        ),
    }[kind]
    found = AugmentationTunnel(LayerHiResCam(forward, net[1])).attribute(x, factors=[1.0], **options)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("kind", ["shared mask", "boxes"])
def test_what_an_argument_says_of_places_is_mirrored(kind: str) -> None:
    net, images = scorer(), torch.rand(2, 3, 10, 14)
    mask = torch.rand(10, 14)
    boxes = BoundingBoxes(torch.tensor([[1, 1, 4, 4], [2, 0, 3, 9]]), format="XYWH", canvas_size=(10, 14))
    other = BoundingBoxes(torch.tensor([[9, 1, 4, 4], [9, 0, 3, 9]]), format="XYWH", canvas_size=(10, 14))

    def forward(x: Tensor, place: Tensor) -> Tensor:
        scores = net(x)
        if kind == "shared mask":
            return (scores * place).mean((2, 3))
        rows = zip(scores, place.tolist(), strict=True)
        return torch.stack([row[:, y : y + h, x : x + w].mean((1, 2)) for row, (x, y, w, h) in rows])

    method = LayerHiResCam(forward, net[1])
    place, opposite = (mask, mask.flip(-1)) if kind == "shared mask" else (boxes, other)
    found = AugmentationTunnel(method).attribute(images, factors=[1.0], target=1, additional_forward_args=place)
    mirrored = method.attribute(images.flip(-1), target=1, additional_forward_args=opposite).flip(-1)
    right = (method.attribute(images, target=1, additional_forward_args=place) + mirrored) / 2
    torch.testing.assert_close(found, right)


def test_a_mask_of_another_resolution_is_refused() -> None:
    net = scorer()
    tunnel = AugmentationTunnel(LayerGradCam(lambda x, m: (net(x) * m.mean()).mean((2, 3)), net[1]))
    with pytest.raises(ValueError, match="at another resolution"):
        tunnel.attribute(torch.rand(2, 3, 10, 14), target=1, additional_forward_args=torch.rand(2, 1, 5, 7))


def test_a_target_that_may_name_a_place_is_refused() -> None:
    net = cnn()
    with pytest.raises(ValueError, match="may or may not be a pixel to mirror"):
        AugmentationTunnel(Saliency(lambda x: net(x)[:, :, None])).attribute(torch.rand(1, 3, 8, 8), target=(1, 0))


def test_a_model_that_writes_into_its_input_sees_a_fresh_one() -> None:
    net = cnn()

    class Plain(Saliency):
        def attribute(self, inputs: Tensor, **_: object) -> Tensor:
            result = inputs.clone()
            inputs.zero_()
            return result

    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(AugmentationTunnel(Plain(net)).attribute(x, factors=[1.0]), x)


def test_the_model_and_the_random_state_stay_as_they_were_around_a_method_of_captum() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    tunnels: list[Any] = [(AugmentationTunnel, {}), (SESS, {"scales": [1.0]})]
    for tunnel, options in tunnels:
        x, state = torch.rand(2, 3, 8, 8), torch.get_rng_state()
        with pytest.warns(UserWarning, match="The model is in training mode"):
            tunnel(LayerGradCam(net, net[2])).attribute(x, target=1, **options)
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
