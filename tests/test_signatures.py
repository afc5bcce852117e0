"""Signatures: the arguments of Captum's classes, their order, and the results."""

from inspect import Parameter, signature
from itertools import product
from typing import Any

import pytest
import torch
from captum.attr import GuidedGradCam, LayerAttribution, LayerGradCam
from torch import Tensor, nn

from captum_fusion import (
    LayerFinerCam,
    LayerFusionCam,
    LayerGradCamPlusPlus,
    LayerGroupCam,
    LayerScoreCam,
    LayerUnionCam,
    LayerXGradCam,
)
from captum_fusion.metrics import insertion
from tests.conftest import SmallNet
from tests.methods import AT_INPUT_SIZE, LAYER_KINDS, LAYER_PATHS, METHODS, has_input_shape, keeps_the_graph, takes

pytestmark = pytest.mark.every_device

GRAPH_KEEPING = [method for method in METHODS if takes(method, "grad_kwargs")]


def positional(method: Any) -> list[Parameter]:
    parameters = list(signature(method).parameters.values())[1:]
    return [parameter for parameter in parameters if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD]


def test_the_positional_arguments_are_those_of_captums_class() -> None:
    for algorithm in METHODS:
        model = GuidedGradCam if has_input_shape(algorithm) else LayerGradCam
        ours, theirs = positional(algorithm.attribute), positional(model.attribute)
        # A method without gradients has no use for grad_kwargs, the last one.
        fewer = not keeps_the_graph(algorithm) and model is LayerGradCam
        assert len(theirs) - fewer <= len(ours) <= len(theirs), algorithm
        for mine, captums in zip(ours, theirs, strict=False):
            default = "bilinear" if mine.name == "interpolate_mode" else captums.default
            assert (mine.name, mine.default) == (captums.name, default), algorithm
        others = [value for value in signature(algorithm.attribute).parameters.values() if value not in ours]
        assert {value.kind for value in others if value.name != "self"} <= {Parameter.KEYWORD_ONLY}, algorithm


def test_the_fourth_argument_is_no_flag_where_it_is_a_mode(net: SmallNet, images: Tensor) -> None:
    for algorithm in AT_INPUT_SIZE:
        for mode in (True, 0.5, 1, "cubic spline"):
            with pytest.raises((TypeError, ValueError), match="interpolate_mode"):
                algorithm(net, net.features).attribute(images, 1, None, mode)


@pytest.mark.parametrize("algorithm", AT_INPUT_SIZE)
def test_nearest_gives_the_pixels_of_the_layer(
    algorithm: type[LayerAttribution], net: SmallNet, images: Tensor
) -> None:
    # The layer's map is half as large as the image: each of its pixels covers two by two of the image's.
    attributions = algorithm(net, net.features).attribute(images, 1, None, "nearest")
    blocks = attributions.unfold(2, 2, 2).unfold(3, 2, 2)
    torch.testing.assert_close(blocks, blocks[..., :1, :1].expand_as(blocks))


def test_a_bool_is_no_baseline(net: SmallNet, images: Tensor) -> None:
    for baseline in (True, False, (True,)):
        with pytest.raises(TypeError, match=r"baseline.*(True|False|bool)"):
            LayerScoreCam(net, net.features).attribute(images, target=1, baselines=baseline)
        with pytest.raises(TypeError, match=r"baseline.*(True|False|bool)"):
            insertion(net, images, images, baselines=baseline, target=1)


@pytest.mark.parametrize("algorithm", [method for method in LAYER_PATHS if takes(method, "attr_dim_summation")])
def test_without_summation_each_channel_is_its_share(
    algorithm: type[LayerAttribution], net: SmallNet, images: Tensor
) -> None:
    attribution = algorithm(net, net.features)
    channels = attribution.attribute(images, target=0, attr_dim_summation=False)
    assert channels.shape == LayerGradCam(net, net.features).attribute(images, 0, attr_dim_summation=False).shape
    torch.testing.assert_close(channels.sum(dim=1, keepdim=True), attribution.attribute(images, target=0))
    rectified = attribution.attribute(images, target=0, attr_dim_summation=False, relu_attributions=True)
    assert torch.equal(rectified, channels.relu())


@pytest.mark.parametrize("algorithm", [LayerXGradCam, LayerFinerCam])
def test_grad_kwargs_reach_the_gradient(algorithm: type[LayerAttribution], net: SmallNet, images: Tensor) -> None:
    attribution = algorithm(net, net.features)
    with pytest.raises(TypeError, match="no_such_option"):
        attribution.attribute(images, 0, grad_kwargs={"no_such_option": True})
    ours = attribution.attribute(images, 0, grad_kwargs={"retain_graph": True})
    assert torch.equal(ours, attribution.attribute(images, 0))


class CurvedNet(nn.Module):
    """Its gradients depend on its input, and it is the same for any number of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).sigmoid().square().mean((2, 3)))


@pytest.mark.parametrize("algorithm", [LayerGradCamPlusPlus, LayerFinerCam])
def test_the_graph_is_kept_where_captums_grad_cam_keeps_it(algorithm: type[LayerAttribution], images: Tensor) -> None:
    for requires_grad, trainable in product((True, False), repeat=2):
        net = CurvedNet().to(images.device).requires_grad_(trainable)
        inputs = images.clone().requires_grad_(requires_grad)
        captums = LayerGradCam(net, net.features).attribute(inputs, 1)
        ours = algorithm(net, net.features).attribute(inputs, 1)
        assert ours.requires_grad == captums.requires_grad
        assert inputs.requires_grad == requires_grad
        if requires_grad:
            for map_ in (captums, ours):
                (gradient,) = torch.autograd.grad(map_.square().sum(), inputs)
                assert gradient.isfinite().all()
                assert gradient.any()


@pytest.mark.parametrize("algorithm", GRAPH_KEEPING)
def test_the_gradient_of_a_map_whose_gradients_have_a_graph(algorithm: type[LayerAttribution]) -> None:
    # Against central differences, in double precision; only with create_graph are the weights differentiated as well.
    net = CurvedNet().double()
    x = torch.rand(1, 3, 3, 3, dtype=torch.double, requires_grad=True)
    attribution = algorithm(net, net.features)

    def total(inputs: Tensor) -> Tensor:
        return attribution.attribute(inputs, 1, grad_kwargs={"create_graph": True}).square().sum()

    assert torch.autograd.gradcheck(total, (x,))


@pytest.mark.parametrize("algorithm", LAYER_KINDS)
def test_layer_and_forward_function_can_be_assigned(algorithm: type[LayerAttribution], images: Tensor) -> None:
    first, second = (net.eval().to(images.device) for net in (SmallNet(), SmallNet(channels=5)))
    expected = {
        (net, layer): algorithm(net, net.get_submodule(layer)).attribute(images, target=1)
        for net in (first, second)
        for layer in ("stem", "features")
    }
    attribution = algorithm(first, None)
    for net, layer in expected:
        attribution.forward_func = net
        attribution.layer = net.get_submodule(layer)
        assert torch.equal(attribution.attribute(images, target=1), expected[net, layer])


def test_a_method_without_a_layer_asks_for_one(net: SmallNet, images: Tensor) -> None:
    for algorithm in LAYER_PATHS:
        with pytest.raises((TypeError, ValueError), match="layer"):
            algorithm(net, None).attribute(images, target=1)


def test_given_components_stay_where_they_are(net: SmallNet, images: Tensor) -> None:
    """Only the defaults follow an assigned layer."""
    grad_cam, score_cam = LayerGradCam(net, net.stem), LayerScoreCam(net, net.stem)
    fusion_cam = LayerFusionCam(net, net.stem, gradient_method=grad_cam)
    fusion_cam.layer = net.features
    expected = LayerFusionCam(net, net.features, gradient_method=grad_cam).attribute(images, target=1)
    assert torch.equal(fusion_cam.attribute(images, target=1), expected)
    assert not torch.equal(expected, LayerFusionCam(net, net.features).attribute(images, target=1))
    union_cam = LayerUnionCam(net, net.stem, region_method=score_cam)
    union_cam.layer = net.features
    expected = LayerUnionCam(net, net.features, region_method=score_cam).attribute(images, target=1)
    assert torch.equal(union_cam.attribute(images, target=1), expected)


@pytest.mark.parametrize(("channels", "groups"), [(6, 6), (40, 32)])
def test_group_cam_has_a_group_for_each_channel_of_a_small_layer(channels: int, groups: int, images: Tensor) -> None:
    net = SmallNet(channels=channels).eval().to(images.device)
    default = LayerGroupCam(net, net.features).attribute(images, target=0)
    assert torch.equal(default, LayerGroupCam(net, net.features, groups=groups).attribute(images, target=0))


@pytest.mark.parametrize("algorithm", AT_INPUT_SIZE)
def test_a_model_with_one_output_is_told_what_to_set(
    algorithm: type[LayerAttribution], net: SmallNet, images: Tensor
) -> None:
    for forward in (lambda x: net(x)[:, :1], lambda x: net(x)[:, 0]):
        with pytest.raises(ValueError, match=r"sigmoid.*activation=None"):
            algorithm(forward, net.features).attribute(images)
        for activation in ("sigmoid", None):
            attributions = algorithm(forward, net.features, activation=activation).attribute(images)
            assert attributions.isfinite().all()
