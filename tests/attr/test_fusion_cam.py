import numpy as np
import pytest
import torch
from captum.attr import LayerActivation, LayerGradCam, NoiseTunnel
from torch import Tensor, nn

from captum_fusion import FusionCamStages, LayerFusionCam, LayerScoreCam
from tests import straight_line
from tests.cases import NAMES, TARGETS, case
from tests.conftest import SmallNet


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighting", ["normalized", "raw", "released"])
@pytest.mark.parametrize("percentile", [0.0, 10.0, 50.0])
def test_equals_the_straight_line_computation(name: str, weighting: str, percentile: float) -> None:
    model, layer, images, grad_cams, score_cams = case(name)
    attributions, stages = LayerFusionCam(model, layer).attribute(
        images, target=TARGETS, percentile=percentile, weighting=weighting, return_stages=True
    )
    for example, target in enumerate(TARGETS):
        size = tuple(images.shape[2:])
        with torch.no_grad():
            expected = straight_line.fusion_cam(
                straight_line.component(grad_cams[example], size),
                straight_line.component(score_cams[example], size),
                straight_line.probability(model, target),
                images[example : example + 1],
                torch.zeros(1),
                percentile,
                weighting,
            )
        for stage, value in stages._asdict().items():
            np.testing.assert_allclose(value[example].squeeze(0), expected[stage], atol=1e-5, err_msg=stage)
        np.testing.assert_allclose(attributions[example], np.stack([expected["fused"]] * 3), atol=1e-5)


def test_shapes_and_ranges(net: SmallNet, images: Tensor) -> None:
    attributions, stages = LayerFusionCam(net, net.features).attribute(images, target=1, return_stages=True)
    assert attributions.shape == images.shape
    assert attributions.is_contiguous()
    for channel in range(3):
        assert torch.equal(attributions[:, channel : channel + 1], stages.fused)
    assert isinstance(stages, FusionCamStages)
    for values in stages[:5]:
        assert values.shape == (3, 1, 12, 10)
        assert values.ge(0).all()
        assert values.le(1).all()
    assert all(values.shape == (3,) for values in stages[5:])
    assert torch.equal(LayerFusionCam(net, net.features).attribute(images, target=1), attributions)


def test_each_example_gets_the_map_that_it_would_get_alone(net: SmallNet, images: Tensor) -> None:
    fusion_cam = LayerFusionCam(net, net.features)
    together = fusion_cam.attribute(images, target=[0, 1, 2])
    for example in range(3):
        alone = fusion_cam.attribute(images[example : example + 1], target=example)
        torch.testing.assert_close(together[example : example + 1], alone, atol=1e-5, rtol=0)


def test_contributions_are_those_of_the_masked_probabilities(net: SmallNet, images: Tensor) -> None:
    _, stages = LayerFusionCam(net, net.features).attribute(images, target=2, baselines=0.3, return_stages=True)
    with torch.no_grad():
        without = net(torch.full_like(images, 0.3)).softmax(1)[:, 2]
        for name in ("denoised", "region", "combined"):
            mask = getattr(stages, name)
            kept = net(mask * images + (1 - mask) * 0.3).softmax(1)[:, 2]
            measured = getattr(stages, ("gradient" if name == "denoised" else name) + "_contribution")
            torch.testing.assert_close(measured, kept - without)


def test_maps_that_all_hurt_the_class(net: SmallNet, images: Tensor) -> None:
    # The less remains of the image, the higher the score.
    def forward(x: Tensor) -> Tensor:
        remains = x.abs().flatten(1).sum(1, keepdim=True) + net(x)[:, :1] / 1000
        return torch.cat([-remains, remains], dim=1) / 50

    for weighting, weight in (("normalized", 0.5), ("raw", 1.0)):
        _, stages = LayerFusionCam(forward, net.features).attribute(
            images, target=0, weighting=weighting, return_stages=True
        )
        assert all(values.lt(0).all() for values in stages[5:])
        combined = weight * (stages.denoised + stages.region)
        lowest, highest = combined.flatten(1).aminmax(dim=1)
        span = (highest - lowest).clamp(min=1e-9).view(-1, 1, 1, 1)
        torch.testing.assert_close(stages.combined, (combined - lowest.view(-1, 1, 1, 1)) / span)
        assert stages.fused.isfinite().all()


def test_a_constant_layer_gives_maps_of_zeros(net: SmallNet, images: Tensor) -> None:
    with torch.no_grad():
        net.features.weight.zero_()
    attributions, stages = LayerFusionCam(net, net.features).attribute(images, target=0, return_stages=True)
    assert attributions.eq(0).all()
    assert all(values.eq(0).all() for values in stages)


def test_components_can_be_chosen(net: SmallNet, images: Tensor) -> None:
    default = LayerFusionCam(net, net.features).attribute(images, target=0)
    same = LayerFusionCam(
        net,
        net.features,
        gradient_method=LayerGradCam(net, net.features),
        region_method=LayerScoreCam(net, net.features),
    )
    assert torch.equal(same.attribute(images, target=0), default)
    other = LayerFusionCam(net, net.features, region_method=LayerActivation(net, net.features))
    _, stages = other.attribute(images, target=0, return_stages=True)
    summed = net.features(net.stem(images)).sum(1, keepdim=True).relu().detach()
    upsampled = nn.functional.interpolate(summed, images.shape[2:], mode="bilinear")
    low, high = (bound.view(-1, 1, 1, 1) for bound in upsampled.flatten(1).aminmax(dim=1))
    torch.testing.assert_close(stages.region, (upsampled - low) / (high - low))


def test_a_noise_tunnel_as_a_component_gets_the_target(net: SmallNet, images: Tensor) -> None:
    noisy = LayerFusionCam(net, net.features, gradient_method=NoiseTunnel(LayerGradCam(net, net.features)))
    _, stages = noisy.attribute(images, target=[0, 1, 2], return_stages=True)
    _, plain = LayerFusionCam(net, net.features).attribute(images, target=[0, 1, 2], return_stages=True)
    assert torch.equal(stages.region, plain.region)
    assert not torch.equal(stages.gradient, plain.gradient)


def test_several_inputs(images: Tensor) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4 + 4 + 5, 3)

        def forward(self, first: Tensor, table: Tensor, second: Tensor, scale: Tensor, shift: float) -> Tensor:
            pooled = [self.features(image).relu().mean((2, 3)) for image in (second, first)]
            return self.head(torch.cat([*pooled, table], 1)) * scale[:, None] + shift

    net = Net()
    table, scale, larger = torch.randn(3, 5), torch.rand(3) + 1, torch.rand(3, 3, 20, 24)
    fusion_cam = LayerFusionCam(net, net.features)
    inputs = (images, table, larger)
    attributions = fusion_cam.attribute(inputs, [0, 1, 2], (scale, 0.5), baselines=(None, 0, 0.5))
    assert attributions[1] is None
    assert attributions[0].shape == images.shape
    assert attributions[2].shape == larger.shape
    upsampled = nn.functional.interpolate(attributions[0], larger.shape[2:], mode="bilinear")
    torch.testing.assert_close(attributions[2], upsampled)
    for example in range(3):
        one = slice(example, example + 1)
        alone = fusion_cam.attribute(
            tuple(value[one] for value in inputs), example, (scale[one], 0.5), baselines=(None, 0, 0.5)
        )
        torch.testing.assert_close(alone[0], attributions[0][one], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percentile": 100}, r"percentile is 100; expected a number in \[0, 100\)"),
        ({"percentile": -1}, "percentile is -1"),
        ({"percentile": float("nan")}, "percentile is nan"),
        ({"weighting": "fair"}, "weighting is 'fair'; expected one of"),
        ({"perturbations_per_eval": 0}, "perturbations_per_eval is 0; expected at least 1"),
    ],
)
def test_refuses_bad_options_before_any_forward_pass(
    net: SmallNet, images: Tensor, options: dict[str, object], message: str
) -> None:
    def forward(_: Tensor) -> Tensor:
        raise AssertionError

    with pytest.raises(ValueError, match=message):
        LayerFusionCam(forward, net.features).attribute(images, target=0, **options)


def test_refuses_bad_settings(net: SmallNet) -> None:
    with pytest.raises(ValueError, match="activation is 'relu'; expected one of"):
        LayerFusionCam(net, net.features, activation="relu")
    with pytest.raises(TypeError, match=r"gradient_method is 'grad-cam'; expected an instance of"):
        LayerFusionCam(net, net.features, gradient_method="grad-cam")


def test_refuses_inference_mode(net: SmallNet, images: Tensor) -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no_grad"):
        LayerFusionCam(net, net.features).attribute(images, target=0)
    with torch.no_grad():
        LayerFusionCam(net, net.features).attribute(images, target=0)
