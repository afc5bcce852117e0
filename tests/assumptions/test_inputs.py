"""Inputs by keyword and in containers, and maps of several inputs."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from captum.attr import InputXGradient, LayerGradCam
from torch import Tensor, nn

from captum_fusion import (
    FusedAttributions,
    LayerAblationCam,
    LayerFusionCam,
    LayerGradCamPlusPlus,
    LayerScoreCam,
    LayerUnionCam,
    last_feature_map,
    spatial_view,
)
from captum_fusion.functional import (
    combine,
    denoise,
    denoised_gradient_map,
    fuse,
    normalize,
    upsample,
    weighted_sum,
)
from captum_fusion.metrics import (
    saliency_map,
)
from tests.assumptions.networks import Ordered, cnn


@pytest.mark.parametrize("container", ["keyword", "list", "dictionary"])
def test_the_image_is_found_by_keyword_and_in_containers(container: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Ordered()

        def forward(self, pixels: Any) -> Tensor:
            return self.inner(
                pixels[0] if isinstance(pixels, list) else pixels["x"] if isinstance(pixels, dict) else pixels
            )

    model, image = Model().eval(), torch.rand(1, 3, 32, 48)
    ways = {"keyword": lambda x: model(pixels=x), "list": lambda x: model([x]), "dictionary": lambda x: model({"x": x})}
    feature_map = last_feature_map(model, image, ways[container])
    assert (feature_map.name, feature_map.shape) == ("inner.norm", (6, 8, 12))


@pytest.mark.parametrize("kind", ["list", "named tuple", "dictionary"])
def test_the_first_tensor_of_a_container_is_viewed(kind: str) -> None:
    Pair = namedtuple("Pair", ["tokens", "grid"])

    class Wraps(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"list": [x, 1], "named tuple": Pair(x, 1), "dictionary": {"tokens": x, "grid": 1}}[kind]

    cut, wraps = nn.Conv2d(3, 6, 4, 4), Wraps()
    types: list[type] = []

    def forward(x: Tensor) -> Tensor:
        output = wraps(cut(x).flatten(2).mT)
        types.append(type(output))
        return next(iter(output.values() if kind == "dictionary" else output)).square().mean(1)

    plain = wraps(torch.rand(1, 4, 6))
    with spatial_view(wraps, (4, 4)) as view:
        assert LayerGradCam(forward, view).attribute(torch.rand(1, 3, 16, 16), target=1).shape == (1, 1, 4, 4)
    assert set(types) == {type(plain)}


@pytest.mark.parametrize("kind", ["list", "dictionary", "named tuple", "keyword"])
def test_a_layer_of_one_tensor_in_a_container(kind: str) -> None:
    One = namedtuple("One", ["map"])

    class Layer(nn.Module):
        def forward(self, features: Tensor) -> Any:
            return {"list": [features], "dictionary": {"map": features}, "named tuple": One(features)}.get(
                kind, features
            )

    net, layer, x = cnn(), Layer(), torch.rand(2, 3, 8, 8)

    def forward(x: Tensor) -> Tensor:
        output = layer(features=net[:2](x)) if kind == "keyword" else layer(net[:2](x))
        (features,) = output.values() if kind == "dictionary" else (output,) if kind == "keyword" else output
        return net[2:](features)

    for algorithm in (LayerGradCamPlusPlus, LayerScoreCam, LayerAblationCam, LayerFusionCam):
        found = algorithm(forward, layer).attribute(x, target=1, attribute_to_layer_input=kind == "keyword")
        torch.testing.assert_close(found, algorithm(net, net[1]).attribute(x, target=1), msg=algorithm.__name__)
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks


def test_each_input_keeps_its_own_map() -> None:
    net = cnn()
    inputs = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 6, 10)
    method = InputXGradient(lambda a, b: net(a) * net(b))
    fused = FusedAttributions([method]).attribute(inputs, target=1)
    own = method.attribute(tuple(x.clone().requires_grad_() for x in inputs), target=1)
    for found, attribution, x in zip(fused, own, inputs, strict=True):
        torch.testing.assert_close(found[:, :1], saliency_map(attribution, tuple(x.shape[2:])))
    alone = FusedAttributions([method]).attribute((inputs[0][:1], inputs[1][:1] * 0), target=1)
    batch = FusedAttributions([method]).attribute(
        (inputs[0], inputs[1] * torch.tensor([0, 1]).reshape(2, 1, 1, 1)), target=1
    )
    torch.testing.assert_close([part[:1] for part in batch], list(alone))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("algorithm", [LayerFusionCam, LayerUnionCam])
def test_a_fusion_masks_each_input_by_its_own_map(algorithm: Any, given: bool) -> None:
    net = cnn()
    inputs = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 6, 10)

    def forward(a: Tensor, b: Tensor) -> Tensor:
        return net(a).exp() * b.square().mean((1, 2, 3))[:, None]

    method = InputXGradient(forward)
    regions = method.attribute(tuple(x.clone().requires_grad_() for x in inputs), target=1)
    components = {} if given else {"region_method": method}
    options = {"region_attributions": regions} if given else {}
    attributions = algorithm(forward, net[1], activation=None, **components).attribute(inputs, target=1, **options)

    # The equations, in which a score is that of both inputs, each masked by its own map.
    def gain(maps: list[Tensor]) -> Tensor:
        return forward(*(m * x for m, x in zip(maps, inputs, strict=True)))[:, 1].detach()

    activations = net[:2](inputs[0]).detach().requires_grad_()
    gradients = torch.autograd.grad(
        (net[2:](activations).exp() * inputs[1].square().mean((1, 2, 3))[:, None])[:, 1].sum(), activations
    )[0]
    if algorithm is LayerFusionCam:
        grad_cam = torch.relu(weighted_sum(activations, gradients.mean((2, 3))))
        layer_maps = [denoise(normalize(grad_cam), 10)] * 2
    else:
        layer_maps = [denoised_gradient_map(gradients, activations, 10)] * 2
    denoised = [normalize(upsample(m, x.shape[2:])) for m, x in zip(layer_maps, inputs, strict=True)]
    region = [normalize(torch.relu(part.sum(dim=1, keepdim=True))) for part in regions]
    weights = gain(denoised), gain(region)
    combined = [combine(d, r, *weights) for d, r in zip(denoised, region, strict=True)]
    better = gain(combined) > gain(region)
    for found, c, r in zip(attributions, combined, region, strict=True):
        fused = fuse(c, r, gain(combined), gain(region))
        chosen = torch.where(better[:, None, None, None], c, r)
        torch.testing.assert_close(found[:, :1], (fused if algorithm is LayerFusionCam else chosen).detach())
