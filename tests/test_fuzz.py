"""Random networks, inputs and targets; with ``--hypothesis-profile=fuzz``, others in each run."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_fusion import (
    FullGrad,
    LayerAblationCam,
    LayerEigenCam,
    LayerEigenGradCam,
    LayerFEM,
    LayerFinerCam,
    LayerFusionCam,
    LayerGradCamElementWise,
    LayerGradCamPlusPlus,
    LayerGroupCam,
    LayerHiResCam,
    LayerISCam,
    LayerKPCACam,
    LayerLayerCam,
    LayerScoreCam,
    LayerShapleyCam,
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


class Case(NamedTuple):
    network: nn.Sequential
    inputs: Tensor
    targets: list[int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
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
    return Case(network.double(), inputs.double(), targets)


class Example(NamedTuple):
    """One example of a case, with what the straight-line computations start from."""

    attribution: Tensor
    x: Tensor
    target: int
    activations: straight_line.Array
    gradients: straight_line.Array
    logit: straight_line.Score
    probability: straight_line.Score
    blank: Tensor
    # The largest number that the network handles, and the largest activation, which errors are in proportion to.
    scale: float
    largest: float


def examples(case: Case, attributions: Tensor) -> list[Example]:
    network, inputs, targets = case
    result = []
    for attribution, x, target in zip(attributions, inputs.split(1), targets, strict=True):
        activations, gradients = straight_line.activations_and_gradients(network, network[1], x, target)
        scale = max(x.abs().max().item(), network(x).abs().max().item())
        logit, probability = straight_line.logit(network, target), straight_line.probability(network, target)
        largest, blank = max(1.0, np.abs(activations).max()), torch.zeros_like(x)
        result.append(
            Example(attribution, x, target, activations, gradients, logit, probability, blank, scale, largest)
        )
    return result


def assert_layer_map(attribution: LayerAttribution, case: Case, straight: Callable[[Example], object]) -> None:
    """The map is the layer's size, the straight-line one for each example, and the same alone as in a batch."""
    network, inputs, targets = case
    attributions = attribution.attribute(inputs, target=targets).detach()
    with torch.no_grad():
        assert attributions.shape == (len(inputs), 1, *network[:2](inputs).shape[2:])
    assert attributions.isfinite().all()
    for example in examples(case, attributions):
        np.testing.assert_allclose(example.attribution[0], straight(example), atol=1e-5 * example.largest)
        alone = attribution.attribute(example.x, target=example.target).detach()
        torch.testing.assert_close(alone[0], example.attribution)


@given(cases())
def test_score_cam(case: Case) -> None:
    assert_layer_map(
        LayerScoreCam(case.network, case.network[1]),
        case,
        lambda example: straight_line.score_cam(example.activations, example.logit, example.x, example.blank),
    )


@given(cases(), st.integers(1, 3))
def test_is_cam(case: Case, samples: int) -> None:
    assert_layer_map(
        LayerISCam(case.network, case.network[1], samples=samples),
        case,
        lambda example: straight_line.is_cam(example.activations, example.logit, example.x, example.blank, samples),
    )


@given(cases(), st.sampled_from(["normalized", "raw", "released"]), st.sampled_from([0.0, 10.0, 37.5, 99.0]))
def test_fusion_cam(case: Case, weighting: str, percentile: float) -> None:
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
    for index, example in enumerate(examples(case, attributions)):
        # From the component maps, since rounding may decide on which side of the percentile a value lies.
        expected = straight_line.fusion_cam(
            stages.gradient[index, 0].numpy(),
            stages.region[index, 0].numpy(),
            example.probability,
            example.x,
            example.blank,
            percentile,
            weighting,
            example.scale,
        )
        assume(not expected["unsure"])
        for name, values in stages._asdict().items():
            np.testing.assert_allclose(values[index].squeeze(0), expected[name], atol=1e-5, err_msg=name)


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
    algorithm: type[LayerAttribution], straight: Callable[..., straight_line.Array], case: Case
) -> None:
    def expected(example: Example) -> straight_line.Array:
        if straight in (straight_line.eigen_cam, straight_line.eigen_grad_cam):
            # Which direction varies most, and its sign, may be a matter of rounding.
            factors = example.gradients if straight is straight_line.eigen_grad_cam else 1
            assume(straight_line.has_a_principal_component(example.activations * factors))
        return straight(example.activations, example.gradients)

    assert_layer_map(algorithm(case.network, case.network[1]), case, expected)


@given(cases())
def test_fem(case: Case) -> None:
    def expected(example: Example) -> straight_line.Array:
        for channel in example.activations:
            threshold = channel.mean() + 2 * channel.std()
            # Rounding may decide whether a pixel exceeds its threshold.
            near = np.abs(channel - threshold).min() < 1e-9 * max(1, np.abs(channel).max())
            assume(not near or np.ptp(channel) < 1e-12 * np.abs(channel).max())
        return straight_line.fem(example.activations, example.gradients)

    assert_layer_map(LayerFEM(case.network, case.network[1]), case, expected)


@given(cases())
def test_kpca_cam(case: Case) -> None:
    def expected(example: Example) -> straight_line.Array:
        points = example.activations.reshape(len(example.activations), -1).T
        points = points - points.mean(0)
        kernel = np.tanh(points @ points.T / points.shape[1] + 1)
        centring = np.eye(len(points)) - 1 / len(points)
        sizes, vectors = np.linalg.eigh(centring @ kernel @ centring)
        # Which component is the first one, and its sign, may be a matter of rounding.
        assume(sizes[-1] > 1e-9 and (len(sizes) < 2 or sizes[-1] - sizes[-2] > 1e-6 * sizes[-1]))
        along = vectors[:, -1] @ points.sum(1)
        assume(abs(along) > 1e-6 * np.abs(points).sum())
        return straight_line.kpca_cam(example.activations, example.gradients)

    assert_layer_map(LayerKPCACam(case.network, case.network[1]), case, expected)


@given(cases(), st.sampled_from(["rest", "score"]))
def test_shapley_cam(case: Case, utility: str) -> None:
    # The straight-line derivatives are quotients of differences, which a scale of a million leaves nothing of.
    assume(case.inputs.abs().max() < 100)

    def expected(example: Example) -> straight_line.Array:
        return straight_line.shapley_cam(case.network, case.network[1], example.x, example.target, utility)

    assert_layer_map(LayerShapleyCam(case.network, case.network[1], utility=utility), case, expected)


@given(cases())
def test_full_grad(case: Case) -> None:
    network, inputs, targets = case
    attributions = FullGrad(network).attribute(inputs, target=targets)
    for attribution, x, target in zip(attributions, inputs.split(1), targets, strict=True):
        expected, _ = straight_line.full_grad(network, x, target)
        np.testing.assert_allclose(attribution[0], expected, atol=1e-5)


@given(cases(), st.floats(0, 2), st.integers(1, 3))
def test_finer_cam(case: Case, strength: float, references: int) -> None:
    # Such scores are those of classes that a mask rules out.
    scores = case.network(case.inputs).detach()
    largest = scores.gather(1, torch.tensor(case.targets)[:, None]).abs().clamp(min=500)
    assume(not (scores < -10 * largest).any())

    def expected(example: Example) -> straight_line.Array:
        scores = case.network(example.x)[0].tolist()
        distances = {k: abs(scores[k] - scores[example.target]) for k in range(CLASSES) if k != example.target}
        others = sorted(distances, key=distances.__getitem__)
        near, far = sorted(distances.values())
        # Rounding may decide which of two classes is closer.
        assume(references > 1 or far - near > 1e-9 * far)
        weights = [0.0] * CLASSES
        weights[example.target] = 1.0
        for other in others[:references]:
            weights[other] = -strength / len(others[:references])
        activations, gradients = straight_line.activations_and_gradients(
            case.network, case.network[1], example.x, example.target, weights
        )
        return straight_line.grad_cam(activations, gradients)

    finer_cam = LayerFinerCam(case.network, case.network[1], strength=strength, references=references)
    assert_layer_map(finer_cam, case, expected)


@given(cases(), st.data())
def test_group_cam(case: Case, data: st.DataObject) -> None:
    network, inputs, targets = case
    groups = data.draw(st.integers(1, network[0].out_channels), label="groups")
    group_cam = LayerGroupCam(network, network[1], groups=groups)
    attributions = group_cam.attribute(inputs, target=targets)
    assert attributions.shape == inputs.shape
    assert attributions.isfinite().all()
    assert attributions.ge(0).all()
    for attribution, x, target, activations, gradients, _, probability, *_ in examples(case, attributions):
        blurred = straight_line.blur(x, 51, 50.0)
        expected = straight_line.group_cam(activations, gradients, groups, probability, x, blurred)
        for channel in attribution:
            np.testing.assert_allclose(channel, expected, atol=1e-5)
        torch.testing.assert_close(group_cam.attribute(x, target=target)[0], attribution)


@given(cases(), st.sampled_from([0.0, 10.0, 37.5, 99.0]))
def test_union_cam(case: Case, percentile: float) -> None:
    network, inputs, targets = case
    union_cam = LayerUnionCam(network, network[1])
    attributions = union_cam.attribute(inputs, target=targets, percentile=percentile)
    assert attributions.shape == inputs.shape
    assert attributions.ge(0).all()
    assert attributions.le(1).all()
    for attribution, x, target, activations, gradients, logit, probability, blank, scale, _ in examples(
        case, attributions
    ):
        score_cam = straight_line.score_cam(activations, logit, x, blank)
        region = straight_line.region_component(score_cam, tuple(x.shape[2:]))
        expected, unsure = straight_line.union_cam(
            activations, gradients, region, probability, x, blank, percentile, scale
        )
        assume(not unsure)
        for channel in attribution:
            np.testing.assert_allclose(channel, expected, atol=1e-5)
        torch.testing.assert_close(union_cam.attribute(x, target=target, percentile=percentile)[0], attribution)


@given(cases())
def test_ablation_cam(case: Case) -> None:
    network, inputs, targets = case
    ablation_cam = LayerAblationCam(network, network[1])
    attributions = ablation_cam.attribute(inputs, target=targets)
    for attribution, x, target, activations, _, logit, *_ in examples(case, attributions):
        expected = straight_line.ablation_cam(network, network[1], x, target, activations)
        # Differences of scores, which rounding makes, are divided by the score.
        scale = np.abs(activations).max() / min(abs(logit(x)) or 1.0, 1.0)
        np.testing.assert_allclose(attribution[0], expected, atol=1e-7 * max(1, scale), rtol=1e-5)
        alone = ablation_cam.attribute(x, target=target)
        np.testing.assert_allclose(alone[0], attribution, atol=1e-7 * max(1, scale), rtol=1e-5)


@given(cases(), st.integers(1, 8), st.integers(1, 4))
def test_rise(case: Case, samples: int, grid: int) -> None:
    """Maps are finite, bounded by the mean of the masks over p, and the same alone as in a batch."""
    rise = Rise(case.network, samples=samples, grid=grid)
    attributions = rise.attribute(case.inputs, target=case.targets)
    assert attributions.shape == case.inputs.shape
    assert attributions.ge(0).all()
    assert attributions.le(2 + 1e-9).all()
    for example in examples(case, attributions):
        alone = rise.attribute(example.x, target=example.target)
        torch.testing.assert_close(alone[0], example.attribution)
