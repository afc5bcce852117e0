"""Random networks, inputs and targets; with ``--hypothesis-profile=fuzz``, others in each run."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_fusion import (
    LayerAblationCam,
    LayerEigenCam,
    LayerEigenGradCam,
    LayerFinerCam,
    LayerFusionCam,
    LayerGradCamElementWise,
    LayerGradCamPlusPlus,
    LayerGroupCam,
    LayerHiResCam,
    LayerISCam,
    LayerLayerCam,
    LayerScoreCam,
    LayerUnionCam,
    LayerXGradCam,
    Rise,
)
from tests import straight_line

CLASSES = 3
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TAILS = (nn.ReLU(), nn.SiLU(), nn.Identity())


class Signed(nn.Module):
    """A layer that leaves negative values."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Sequential, int]:
    """A network and the number of its spatial axes; its second part is the layer to explain."""
    axes = draw(st.integers(1, 3))
    channels = draw(st.integers(1, 6))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    convolution = CONVOLUTIONS[axes - 1](2, channels, draw(st.sampled_from([1, 3])), draw(st.integers(1, 3)), padding=1)
    with torch.no_grad():
        for channel in range(channels):
            kind = draw(st.sampled_from(["alive", "alive", "dead", "constant"]))
            if kind != "alive":
                convolution.weight[channel] = 0
                convolution.bias[channel] = -1 if kind == "dead" else 1
    norm = NORMS[axes - 1](channels) if draw(st.booleans()) else nn.Identity()
    if not isinstance(norm, nn.Identity):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    activation = draw(st.sampled_from([nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.SiLU(), Signed()]))
    # Without a tail all pixels of a channel have the same gradient.
    tail: nn.Module = nn.Identity()
    if draw(st.booleans()):
        tail = nn.Sequential(CONVOLUTIONS[axes - 1](channels, channels, 3, padding=1), draw(st.sampled_from(TAILS)))
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[axes - 1](1)
    head = nn.Linear(channels, CLASSES)
    with torch.no_grad():
        head.weight *= draw(st.sampled_from([1.0, 10.0]))
    return nn.Sequential(convolution, nn.Sequential(norm, activation), tail, pool, nn.Flatten(), head).eval(), axes


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.Sequential, Tensor, list[int]]:
    network, axes = draw(networks())
    examples = draw(st.integers(1, 3))
    size = [draw(st.integers(1, 6)) for _ in range(axes)]
    inputs = torch.randn(examples, 2, *size)
    for example in range(examples):
        kind = draw(st.sampled_from(["noise", "noise", "zeros", "constant", "huge", "tiny"]))
        inputs[example] *= {"huge": 1e6, "tiny": 1e-6}.get(kind, 1)
        if kind in ("zeros", "constant"):
            inputs[example] = 0 if kind == "zeros" else 3
    targets = draw(st.lists(st.integers(0, CLASSES - 1), min_size=examples, max_size=examples))
    return network.double(), inputs.double(), targets


@given(cases())
def test_score_cam(case: tuple[nn.Sequential, Tensor, list[int]]) -> None:
    network, inputs, targets = case
    attributions = LayerScoreCam(network, network[1]).attribute(inputs, target=targets)
    with torch.no_grad():
        assert attributions.shape == (len(inputs), 1, *network[:2](inputs).shape[2:])
    for attribution, x, target in zip(attributions, inputs.split(1), targets, strict=True):
        activations, _ = straight_line.activations_and_gradients(network, network[1], x, target)
        with torch.no_grad():
            score = straight_line.logit(network, target)
            expected = straight_line.score_cam(activations, score, x, torch.zeros_like(x))
        np.testing.assert_allclose(attribution[0], expected, atol=1e-5 * max(1, np.abs(activations).max()))
        alone = LayerScoreCam(network, network[1]).attribute(x, target=target)
        torch.testing.assert_close(alone[0], attribution)


@given(cases(), st.sampled_from(["normalized", "raw", "released"]), st.sampled_from([0.0, 10.0, 37.5, 99.0]))
def test_fusion_cam(case: tuple[nn.Sequential, Tensor, list[int]], weighting: str, percentile: float) -> None:
    network, inputs, targets = case
    attributions, stages = LayerFusionCam(network, network[1]).attribute(
        inputs, target=targets, weighting=weighting, percentile=percentile, return_stages=True
    )
    assert attributions.shape == inputs.shape
    for values in stages:
        assert values.isfinite().all()
    for maps in (attributions, *stages[:5]):
        assert maps.ge(0).all()
        assert maps.le(1).all()
    for example, (x, target) in enumerate(zip(inputs.split(1), targets, strict=True)):
        # The component maps are given, since rounding may decide on which side of the percentile a value lies.
        with torch.no_grad():
            expected = straight_line.fusion_cam(
                stages.gradient[example, 0].numpy(),
                stages.region[example, 0].numpy(),
                straight_line.probability(network, target),
                x,
                torch.zeros_like(x),
                percentile,
                weighting,
            )
        contributions = [float(expected[name]) for name in stages._fields[5:]]
        # Between rounding and nothing, the straight line divides noise by noise.
        assume(all(abs(value) > 1e-9 or value == 0 for value in contributions))
        for name, values in stages._asdict().items():
            np.testing.assert_allclose(values[example].squeeze(0), expected[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("algorithm", "straight"),
    [
        (LayerGradCamPlusPlus, straight_line.grad_cam_plus_plus),
        (LayerXGradCam, straight_line.x_grad_cam),
        (LayerLayerCam, straight_line.layer_cam),
        (LayerHiResCam, straight_line.hi_res_cam),
        (LayerGradCamElementWise, straight_line.grad_cam_element_wise),
        (LayerEigenCam, straight_line.eigen_cam),
        (LayerEigenGradCam, straight_line.eigen_grad_cam),
    ],
)
@given(case=cases())
def test_gradient_cams(
    algorithm: type[LayerAttribution],
    straight: Callable[..., straight_line.Array],
    case: tuple[nn.Sequential, Tensor, list[int]],
) -> None:
    network, inputs, targets = case
    attributions = algorithm(network, network[1]).attribute(inputs, target=targets).detach()
    with torch.no_grad():
        assert attributions.shape == (len(inputs), 1, *network[:2](inputs).shape[2:])
    assert attributions.isfinite().all()
    for attribution, x, target in zip(attributions, inputs.split(1), targets, strict=True):
        activations, gradients = straight_line.activations_and_gradients(network, network[1], x, target)
        if straight in (straight_line.eigen_cam, straight_line.eigen_grad_cam):
            # Which direction varies most, and its sign, may be a matter of rounding.
            channels = activations * gradients if straight is straight_line.eigen_grad_cam else activations
            assume(straight_line.has_a_principal_component(channels))
        expected = straight(activations, gradients)
        np.testing.assert_allclose(attribution[0], expected, atol=1e-5 * max(1, np.abs(activations).max()))
        alone = algorithm(network, network[1]).attribute(x, target=target).detach()
        torch.testing.assert_close(alone[0], attribution)


@given(cases(), st.data())
def test_group_cam(case: tuple[nn.Sequential, Tensor, list[int]], data: st.DataObject) -> None:
    network, inputs, targets = case
    groups = data.draw(st.integers(1, network[0].out_channels), label="groups")
    group_cam = LayerGroupCam(network, network[1], groups=groups)
    attributions = group_cam.attribute(inputs, target=targets)
    assert attributions.shape == inputs.shape
    assert attributions.isfinite().all()
    assert attributions.ge(0).all()
    for attribution, x, target in zip(attributions, inputs.split(1), targets, strict=True):
        activations, gradients = straight_line.activations_and_gradients(network, network[1], x, target)
        with torch.no_grad():
            expected = straight_line.group_cam(
                activations,
                gradients,
                groups,
                straight_line.probability(network, target),
                x,
                straight_line.blur(x, 51, 50.0),
            )
        for channel in attribution:
            np.testing.assert_allclose(channel, expected, atol=1e-5)
        torch.testing.assert_close(group_cam.attribute(x, target=target)[0], attribution)


@given(cases(), st.sampled_from([0.0, 10.0, 37.5, 99.0]))
def test_union_cam(case: tuple[nn.Sequential, Tensor, list[int]], percentile: float) -> None:
    network, inputs, targets = case
    union_cam = LayerUnionCam(network, network[1])
    attributions = union_cam.attribute(inputs, target=targets, percentile=percentile)
    assert attributions.shape == inputs.shape
    assert attributions.ge(0).all()
    assert attributions.le(1).all()
    for attribution, x, target in zip(attributions, inputs.split(1), targets, strict=True):
        activations, gradients = straight_line.activations_and_gradients(network, network[1], x, target)
        with torch.no_grad():
            baseline = torch.zeros_like(x)
            scores = straight_line.score_cam(activations, straight_line.logit(network, target), x, baseline)
            expected, (gain, unevenness, tied) = straight_line.union_cam(
                activations,
                gradients,
                straight_line.component(scores, tuple(x.shape[2:])),
                straight_line.probability(network, target),
                x,
                baseline,
                percentile,
            )
        # Between rounding and nothing, either map may be chosen. Where D = 1 - R, as on layers of two pixels, the sum
        # is constant but for the rounding of each, which normalizing has scaled up with a map that is nearly constant.
        # Gradients that tie but for rounding may fall on either side of their percentile.
        assume((abs(gain) > 1e-12 or gain == 0) and unevenness > 1e-4 and not tied)
        for channel in attribution:
            np.testing.assert_allclose(channel, expected, atol=1e-5)
        torch.testing.assert_close(union_cam.attribute(x, target=target, percentile=percentile)[0], attribution)


@given(cases())
def test_ablation_cam(case: tuple[nn.Sequential, Tensor, list[int]]) -> None:
    network, inputs, targets = case
    attributions = LayerAblationCam(network, network[1]).attribute(inputs, target=targets)
    for attribution, x, target in zip(attributions, inputs.split(1), targets, strict=True):
        activations, _ = straight_line.activations_and_gradients(network, network[1], x, target)
        with torch.no_grad():
            expected = straight_line.ablation_cam(network, network[1], x, target, activations)
            score = abs(straight_line.logit(network, target)(x))
        # Differences of scores, which rounding makes, are divided by the score.
        scale = np.abs(activations).max() / min(score or 1.0, 1.0)
        np.testing.assert_allclose(attribution[0], expected, atol=1e-7 * max(1, scale), rtol=1e-5)
        alone = LayerAblationCam(network, network[1]).attribute(x, target=target)
        np.testing.assert_allclose(alone[0], attribution, atol=1e-7 * max(1, scale), rtol=1e-5)


@given(cases(), st.integers(1, 3))
def test_is_cam(case: tuple[nn.Sequential, Tensor, list[int]], samples: int) -> None:
    network, inputs, targets = case
    attributions = LayerISCam(network, network[1], samples=samples).attribute(inputs, target=targets)
    for attribution, x, target in zip(attributions, inputs.split(1), targets, strict=True):
        activations, _ = straight_line.activations_and_gradients(network, network[1], x, target)
        with torch.no_grad():
            score = straight_line.logit(network, target)
            expected = straight_line.is_cam(activations, score, x, torch.zeros_like(x), samples)
        np.testing.assert_allclose(attribution[0], expected, atol=1e-5 * max(1, np.abs(activations).max()))


@given(cases(), st.floats(0, 2), st.integers(1, 3))
def test_finer_cam(case: tuple[nn.Sequential, Tensor, list[int]], strength: float, references: int) -> None:
    network, inputs, targets = case
    finer_cam = LayerFinerCam(network, network[1], strength=strength, references=references)
    attributions = finer_cam.attribute(inputs, target=targets).detach()
    for attribution, x, target in zip(attributions, inputs.split(1), targets, strict=True):
        with torch.no_grad():
            scores = network(x)[0].tolist()
        others = sorted({0, 1, 2} - {target}, key=lambda k: abs(scores[k] - scores[target]))
        near, far = (abs(scores[k] - scores[target]) for k in others)
        # Rounding may decide which of two classes is closer.
        assume(references > 1 or far - near > 1e-9 * far)
        weights = [0.0, 0.0, 0.0]
        weights[target] = 1.0
        for other in others[:references]:
            weights[other] = -strength / len(others[:references])
        activations, gradients = straight_line.activations_and_gradients(network, network[1], x, target, weights)
        expected = straight_line.grad_cam(activations, gradients)
        np.testing.assert_allclose(attribution[0], expected, atol=1e-5 * max(1, np.abs(activations).max()))


@given(cases(), st.integers(1, 8), st.integers(1, 4))
def test_rise(case: tuple[nn.Sequential, Tensor, list[int]], samples: int, grid: int) -> None:
    """Maps are finite, bounded by the mean of the masks over p, and the same alone as in a batch."""
    network, inputs, targets = case
    rise = Rise(network, samples=samples, grid=grid)
    attributions = rise.attribute(inputs, target=targets)
    assert attributions.shape == inputs.shape
    assert attributions.ge(0).all()
    assert attributions.le(2 + 1e-9).all()
    for attribution, x, target in zip(attributions, inputs.split(1), targets, strict=True):
        torch.testing.assert_close(rise.attribute(x, target=target)[0], attribution)
