"""Components, buffers and graphs of the caller that a call must leave alone."""

from typing import Any

import pytest
import torch
from captum.attr import GuidedGradCam, LayerAttribution, LayerGradCam
from torch import Tensor, nn

from captum_fusion import LayerFusionCam, LayerScoreCam, LayerUnionCam, LayerXGradCam
from tests.conftest import Counter, SmallNet


class OfAnotherModel(LayerAttribution):
    """Score-CAM of the model with its layer's weights negated for the time of the call."""

    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
        with torch.no_grad():
            self.layer.weight.neg_()
            try:
                return LayerScoreCam(self.forward_func, self.layer).attribute(inputs, target)
            finally:
                self.layer.weight.neg_()


def test_a_component_that_changes_the_model_does_not_share_its_forward_pass(net: SmallNet, images: Tensor) -> None:
    method = OfAnotherModel(net, net.features)
    _, stages = LayerFusionCam(net, net.features, region_method=method).attribute(images, 1, return_stages=True)
    same = LayerFusionCam(net, net.features, region_method=LayerScoreCam(net, net.features))
    with torch.no_grad():
        net.features.weight.neg_()
    _, expected = same.attribute(images, 1, return_stages=True)
    torch.testing.assert_close(stages.region, expected.region)


@pytest.mark.filterwarnings("ignore::UserWarning:captum")
@pytest.mark.parametrize("axes", [1, 3])
def test_guided_grad_cam_is_a_component_for_any_number_of_axes(axes: int) -> None:
    net = SmallNet(axes).eval()
    net.relu = nn.ReLU()
    inputs = torch.rand(2, 3, *(9, 6, 7)[:axes])
    fusion_cam = LayerFusionCam(net, net.features, gradient_method=GuidedGradCam(net, net.features))
    assert fusion_cam.attribute(inputs, target=1).shape == inputs.shape


def test_buffers_that_cannot_be_compared_are_left_alone(net: SmallNet, images: Tensor) -> None:
    expected = LayerScoreCam(net, net.features).attribute(images, target=1)
    net.register_buffer("sparse", torch.eye(2).to_sparse())
    net.register_buffer("nowhere", torch.empty(2, device="meta"))
    torch.testing.assert_close(LayerScoreCam(net, net.features).attribute(images, target=1), expected)


def test_a_graph_of_the_callers_survives(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    loss = model(images).sum()
    with pytest.warns(UserWarning, match="training mode") as warnings:
        LayerXGradCam(model, model[0]).attribute(images, target=1)
    assert warnings[0].filename == __file__
    loss.backward()


def test_an_additional_argument_that_the_model_changes_stays(net: SmallNet, images: Tensor) -> None:
    scale = torch.ones(3, 1)
    LayerScoreCam(lambda x, by: net(x) * by.mul_(2), net.features).attribute(images, 1, scale)
    assert torch.equal(scale, torch.ones(3, 1))


@pytest.mark.parametrize("resolution", ["layer", "input"])
def test_components_that_are_there_are_not_computed_again(net: SmallNet, images: Tensor, resolution: str) -> None:
    forward = Counter(net)
    gradient, region = (method(net, net.features).attribute(images, 1) for method in (LayerGradCam, LayerScoreCam))
    if resolution == "input":
        gradient, region = (
            LayerAttribution.interpolate(each, (12, 10), "bilinear") for each in (gradient.relu(), region)
        )
    ready = {"gradient_attributions": gradient, "region_attributions": region}
    fusion_cam, union_cam = LayerFusionCam(forward, net.features), LayerUnionCam(forward, net.features)
    expected = fusion_cam.attribute(images, 1), union_cam.attribute(images, 1)
    forward.sizes.clear()
    torch.testing.assert_close(fusion_cam.attribute(images, 1, **ready), expected[0])
    torch.testing.assert_close(union_cam.attribute(images, 1, region_attributions=region), expected[1])
    assert len(forward.sizes) == 2 * 3, "the unmasked pass, the blank with both maps, and their union"
    for wrong in (region[:1], region[0], region[..., 0]):
        with pytest.raises(ValueError, match="region_method gave attributions of shape"):
            union_cam.attribute(images, 1, region_attributions=wrong)
    with pytest.raises(ValueError, match="no effect"):
        fusion_cam.attribute(images, 1, region_attributions=region, region_kwargs={"perturbations_per_eval": 1})
