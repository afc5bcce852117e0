from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import (
    Attribution,
    GuidedGradCam,
    IntegratedGradients,
    LayerActivation,
    LayerGradCam,
    LayerGradientXActivation,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from captum.log import log_usage
from torch import Tensor, nn

from captum_fusion import (
    AugmentationTunnel,
    FusedAttributions,
    FusionCamStages,
    LayerFinerCam,
    LayerFusionCam,
    LayerGroupCam,
    LayerScoreCam,
    LayerUnionCam,
    LayerXGradCam,
    Rise,
)
from captum_fusion.functional import normalize
from tests import straight_line
from tests.cases import TARGETS, case
from tests.conftest import SmallNet


# The layer of MobileNetV2 has negative values. tests/test_fuzz.py crosses all settings on small networks.
@pytest.mark.parametrize(
    ("name", "weighting", "percentile"),
    [
        ("vgg", "normalized", 0.0),
        ("resnet", "raw", 10.0),
        ("mobilenet_v2", "raw", 50.0),
        ("mobilenet_v2", "released", 10.0),
    ],
)
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
                straight_line.region_component(score_cams[example], size),
                straight_line.probability(model, target),
                images[example : example + 1],
                torch.zeros(1, dtype=torch.double),
                percentile,
                weighting,
            )
        for stage, value in stages._asdict().items():
            np.testing.assert_allclose(value[example].squeeze(0), expected[stage], atol=1e-5, err_msg=stage)
        np.testing.assert_allclose(attributions[example], np.stack([expected["fused"]] * 3), atol=1e-5)


def test_the_region_map_is_interpolated_before_its_relu(net: SmallNet, images: Tensor) -> None:
    signed = torch.tensor([[-4.0, 1.0], [2.0, -3.0]]).expand(3, 1, 2, 2)
    _, stages = LayerFusionCam(net, net.features).attribute(
        images, 1, return_stages=True, gradient_attributions=signed, region_attributions=signed
    )
    evidence = signed[0, 0].double().numpy()
    gradient, region = (
        to_map(evidence, (12, 10)) for to_map in (straight_line.component, straight_line.region_component)
    )
    assert np.abs(gradient - region).max() > 0.2
    np.testing.assert_allclose(stages.gradient[0, 0], gradient, atol=1e-6)
    np.testing.assert_allclose(stages.region[0, 0], region, atol=1e-6)
    # Union-CAM takes the same one, and gives it back where the union is no better.
    union = LayerUnionCam(net, net.features).attribute(images, [0, 1, 2], region_attributions=signed)
    assert any(np.allclose(example[0], region, atol=1e-6) for example in union)


@pytest.mark.parametrize("method", [LayerFusionCam, LayerUnionCam])
def test_the_tolerance_is_that_of_the_default_region_method(
    net: SmallNet, images: Tensor, method: type[LayerFusionCam]
) -> None:
    tolerant = LayerScoreCam(net, net.features, tolerance=0.3)
    expected = method(net, net.features, region_method=tolerant).attribute(images, target=1)
    fusion = method(net, net.features, tolerance=0.3)
    torch.testing.assert_close(fusion.attribute(images, target=1), expected, atol=0, rtol=0)
    assert fusion.region_method.tolerance == 0.3
    with pytest.raises(ValueError, match=r"tolerance is 0\.3, but it applies to the default region method only"):
        method(net, net.features, region_method=tolerant, tolerance=0.3)
    with pytest.raises(ValueError, match=r"tolerance is 1; expected a number in \[0, 1\)"):
        method(net, net.features, tolerance=1)


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
        torch.testing.assert_close(stages.combined, normalize(combined))
        assert stages.fused.isfinite().all()


def test_a_constant_layer_gives_maps_of_zeros(net: SmallNet, images: Tensor) -> None:
    with torch.no_grad():
        net.features.weight.zero_()
    attributions, stages = LayerFusionCam(net, net.features).attribute(images, target=0, return_stages=True)
    assert attributions.eq(0).all()
    assert all(values.isfinite().all() for values in stages)


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
    summed = net.features(net.stem(images)).sum(1, keepdim=True).detach()
    upsampled = nn.functional.interpolate(summed, images.shape[2:], mode="bilinear").relu()
    torch.testing.assert_close(stages.region, normalize(upsampled))


# What Captum says of the copies of the inputs that it sets to require gradients, and of the hooks of GuidedGradCam.
CAPTUMS_WARNINGS = pytest.mark.filterwarnings("ignore::UserWarning:captum")

# Each attribution and its further arguments.
COMPONENTS: dict[str, tuple[Callable[[SmallNet], Attribution], dict[str, Any]]] = {
    "grad_cam_of_another_layer": (lambda net: LayerGradCam(net, net.stem), {}),
    "gradient_x_activation": (lambda net: LayerGradientXActivation(net, net.features), {}),
    "guided_grad_cam": (lambda net: GuidedGradCam(net, net.features), {"interpolate_mode": "bilinear"}),
    "integrated_gradients": (lambda net: IntegratedGradients(net), {"n_steps": 7}),
    "occlusion": (lambda net: Occlusion(net), {"sliding_window_shapes": (3, 5, 4), "strides": (3, 2, 2)}),
    "noise_tunnel": (lambda net: NoiseTunnel(Saliency(net)), {"nt_samples": 3, "stdevs": 0.5, "abs": False}),
    "score_cam": (lambda net: LayerScoreCam(net, net.stem), {"relu_attributions": True}),
    "x_grad_cam": (lambda net: LayerXGradCam(net, net.features), {}),
    "group_cam": (lambda net: LayerGroupCam(net, net.features, groups=3), {}),
    "union_cam": (lambda net: LayerUnionCam(net, net.features), {"percentile": 40.0}),
    "finer_cam": (lambda net: LayerFinerCam(net, net.features), {}),
    "rise": (lambda net: Rise(net, samples=10), {}),
    "fused_attributions": (
        lambda net: FusedAttributions([LayerGradCam(net, net.stem), LayerXGradCam(net, net.features)], "product"),
        {},
    ),
    "augmentation_tunnel": (lambda net: AugmentationTunnel(LayerScoreCam(net, net.features)), {"baselines": 0.5}),
}


# Each in one of the two roles, which differ in the order of interpolation and ReLU alone.
@CAPTUMS_WARNINGS
@pytest.mark.parametrize(("name", "role"), zip(COMPONENTS, cycle(["gradient", "region"])))
def test_any_attribution_can_be_a_component(net: SmallNet, images: Tensor, name: str, role: str) -> None:
    # Captum refuses guided backpropagation through layers that work in place.
    net.relu = nn.ReLU()
    make, arguments = COMPONENTS[name]
    torch.manual_seed(1)
    alone = make(net).attribute(images, target=[0, 1, 2], **arguments)
    fusion_cam = LayerFusionCam(net, net.features, **{f"{role}_method": make(net)})
    torch.manual_seed(1)  # For the noise.
    _, stages = fusion_cam.attribute(images, target=[0, 1, 2], return_stages=True, **{f"{role}_kwargs": arguments})
    for ours, attribution in zip(getattr(stages, role), alone.detach().double().numpy(), strict=True):
        to_map = straight_line.component if role == "gradient" else straight_line.region_component
        expected = to_map(attribution.sum(0), (12, 10))
        assert expected.max() == 1
        np.testing.assert_allclose(ours[0], expected, atol=1e-5)


def test_two_chosen_components_are_fused(net: SmallNet, images: Tensor) -> None:
    fusion_cam = LayerFusionCam(
        net, net.features, gradient_method=LayerXGradCam(net, net.stem), region_method=Occlusion(net)
    )
    _, stages = fusion_cam.attribute(
        images, target=1, return_stages=True, region_kwargs={"sliding_window_shapes": (3, 4, 4)}
    )
    for example, x in enumerate(images.split(1)):
        maps = (getattr(stages, name)[example, 0].double().numpy() for name in ("gradient", "region"))
        with torch.no_grad():
            probability = straight_line.probability(net, 1)
            expected = straight_line.fusion_cam(*maps, probability, x, torch.zeros(1), 10.0, "raw")
        for stage, value in stages._asdict().items():
            np.testing.assert_allclose(value[example].squeeze(0), expected[stage], atol=1e-5, err_msg=stage)


@CAPTUMS_WARNINGS
def test_a_noise_tunnel_around_a_layer_method_gets_the_target(net: SmallNet, images: Tensor) -> None:
    still = {"stdevs": 0.0, "nt_samples": 2}
    noisy = LayerFusionCam(net, net.features, gradient_method=NoiseTunnel(LayerGradCam(net, net.features)))
    plain = LayerFusionCam(net, net.features).attribute(images, target=[0, 1, 2])
    torch.testing.assert_close(noisy.attribute(images, target=[0, 1, 2], gradient_kwargs=still), plain)
    assert not torch.allclose(noisy.attribute(images, target=[0, 1, 2], gradient_kwargs={"stdevs": 1.0}), plain)


class Recording(Attribution):
    """Gives the inputs back as their attributions and keeps what it was called with."""

    @log_usage()  # As Captum's own; a NoiseTunnel calls what it wraps.
    def attribute(
        self,
        inputs: Tensor,
        target: object = None,
        additional_forward_args: object = None,
        baselines: object = None,
        attribute_to_layer_input: bool = False,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        extra: str = "",
    ) -> Tensor:
        self.given = {name: value for name, value in locals().items() if name not in ("self", "inputs")}
        return inputs


class RecordingLess(Attribution):
    """Takes nothing but the target."""

    def attribute(self, inputs: Tensor, target: object = None) -> Tensor:
        self.given = {"target": target}
        return inputs


def scaled(net: SmallNet) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, scale: net(x) * scale[:, None]


@pytest.mark.parametrize(("role", "tunnel"), [("gradient", True), ("region", False)])
def test_arguments_reach_the_components_that_take_them(
    net: SmallNet, images: Tensor, role: str, tunnel: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = scaled(net)
    recording = Recording(forward)
    method = NoiseTunnel(recording) if tunnel else recording
    scale = torch.tensor([1.0, 2.0, 3.0])
    samples = {"nt_samples": 1, "stdevs": 0.0} if tunnel else {}
    _, stages = LayerFusionCam(forward, net.features, **{f"{role}_method": method}).attribute(
        images,
        target=[0, 1, 2],
        additional_forward_args=(scale,),
        baselines=0.25,
        attribute_to_layer_input=True,
        perturbations_per_eval=2,
        show_progress=True,
        return_stages=True,
        **{f"{role}_kwargs": {"extra": "further"} | samples},
    )
    capsys.readouterr()
    assert list(recording.given.pop("target")) == [0, 1, 2]
    (reached,) = recording.given.pop("additional_forward_args")
    assert torch.equal(reached, scale)
    assert recording.given == {
        "baselines": (0.25,) if tunnel else 0.25,  # A NoiseTunnel makes a tuple of them.
        "attribute_to_layer_input": True,
        "perturbations_per_eval": 2,
        "show_progress": True,
        "extra": "further",
    }
    for ours, x in zip(getattr(stages, role), images, strict=True):
        expected = straight_line.component(x.double().numpy().sum(0), (12, 10))
        np.testing.assert_allclose(ours[0], expected, atol=1e-5)


def test_a_component_keeps_its_own_defaults(net: SmallNet, images: Tensor) -> None:
    recording = Recording(net)
    LayerFusionCam(net, net.features, region_method=recording).attribute(images, target=1)
    # None among Fusion-CAM's arguments means its own default, which is no value for another method.
    defaults = {"additional_forward_args": None, "baselines": None, "perturbations_per_eval": 1, "extra": ""}
    assert recording.given.items() >= (defaults | {"target": 1}).items()
    less = RecordingLess(net)
    LayerFusionCam(net, net.features, region_method=less).attribute(
        images, target=1, baselines=0.5, perturbations_per_eval=3
    )
    assert less.given == {"target": 1}


def test_a_component_may_change_what_it_is_given(net: SmallNet, images: Tensor) -> None:
    class Destructive(Attribution):
        def attribute(self, inputs: Tensor, target: int) -> Tensor:
            return inputs.fill_(target)

    before = images.clone()
    default = LayerFusionCam(net, net.features).attribute(images, target=1, return_stages=True)[1]
    fusion_cam = LayerFusionCam(net, net.features, gradient_method=Destructive(net))
    stages = fusion_cam.attribute(images, target=1, return_stages=True)[1]
    assert torch.equal(images, before)
    assert torch.equal(stages.region, default.region)


def test_a_component_for_several_inputs(images: Tensor) -> None:
    """If there is one attribution for each input, that of the first masked input counts."""
    net = SmallNet().eval()

    def forward(table: Tensor, image: Tensor) -> Tensor:
        return net(image) + table

    inputs = (torch.randn(3, 3), images)
    fusion_cam = LayerFusionCam(forward, net.features, gradient_method=IntegratedGradients(forward))
    _, stages = fusion_cam.attribute(inputs, target=2, return_stages=True, gradient_kwargs={"n_steps": 5})
    _, alone = IntegratedGradients(forward).attribute(inputs, target=2, n_steps=5)
    for ours, attribution in zip(stages.gradient, alone.double().numpy(), strict=True):
        np.testing.assert_allclose(ours[0], straight_line.component(attribution.sum(0), (12, 10)), atol=1e-5)


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


def test_refuses_bad_options_before_any_forward_pass(net: SmallNet, images: Tensor) -> None:
    def forward(_: Tensor) -> Tensor:
        raise AssertionError

    for options, message in [
        ({"percentile": 100}, r"percentile is 100; expected a number in \[0, 100\)"),
        ({"percentile": -1}, "percentile is -1"),
        ({"percentile": float("nan")}, "percentile is nan"),
        ({"weighting": "fair"}, "weighting is 'fair'; expected one of"),
        ({"perturbations_per_eval": 0}, "perturbations_per_eval is 0; expected at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            LayerFusionCam(forward, net.features).attribute(images, target=0, **options)
    with pytest.raises(ValueError, match="activation is 'relu'; expected one of"):
        LayerFusionCam(net, net.features, activation="relu")


@pytest.mark.parametrize("role", ["gradient_method", "region_method"])
def test_refuses_a_component_that_cannot_be_one(net: SmallNet, images: Tensor, role: str) -> None:
    for component in ("grad-cam", LayerGradCam, nn.Identity(), lambda x: x):
        with pytest.raises(TypeError, match=rf"{role} is .*; expected an instance of captum\.attr\.Attribution"):
            LayerFusionCam(net, net.features, **{role: component})
    other = SmallNet().eval()
    for wrap in (lambda method: method, NoiseTunnel):
        message = f"{role} explains another SmallNet .*expected attributions of the same model"
        with pytest.raises(ValueError, match=message):
            LayerFusionCam(net, net.features, **{role: wrap(LayerGradCam(other, other.features))})
        # A part of the model and the model in a wrapper are no other model.
        for same in (nn.DataParallel(net), net.features):
            LayerFusionCam(net, net.features, **{role: wrap(Saliency(same))})
    fusion_cam = LayerFusionCam(net, net.features, **{role: LayerActivation(net, net.head)})
    message = r"Layer Activation gave attributions of shape \(3, 3\) for inputs of shape \(3, 3, 12, 10\)"
    with pytest.raises(ValueError, match=message + "; expected the same number of examples and of spatial axes"):
        fusion_cam.attribute(images, target=0)
