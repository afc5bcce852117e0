import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_fusion import LayerScoreCam
from tests import straight_line
from tests.cases import NAMES, TARGETS, case
from tests.conftest import SmallNet


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_straight_line_computation(name: str) -> None:
    model, layer, images, _, expected = case(name)
    attributions = LayerScoreCam(model, layer).attribute(images, target=TARGETS)
    for attribution, score_cam in zip(attributions, expected, strict=True):
        np.testing.assert_allclose(attribution[0], score_cam, atol=1e-5 * np.abs(score_cam).max())


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_signed_and_constant_channels_with_a_baseline_in_one_to_three_dimensions(axes: int) -> None:
    model = SmallNet(axes).eval()
    images = torch.randn(2, 3, *(9, 6, 7)[:axes])
    attributions = LayerScoreCam(model, model.features).attribute(images, target=1, baselines=0.5)
    assert attributions.shape == (2, 1, *model.features(model.stem(images)).shape[2:])
    for attribution, x in zip(attributions, images.split(1), strict=True):
        activations, _ = straight_line.activations_and_gradients(model, model.features, x, 1)
        expected = straight_line.score_cam(activations, straight_line.logit(model, 1), x, torch.full_like(x, 0.5))
        np.testing.assert_allclose(attribution[0], expected, atol=1e-5 * np.abs(expected).max())


def test_weights_worked_out_by_hand() -> None:
    # The layer is the input itself: channels [0, 1] and [1, 0] mask one half each and the third, constant, everything.
    # f = 2 * left + right, so that s = (1 * [0, 1] -> 1, 2 * [1, 0] -> 2, 0).
    x = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]])
    identity = nn.Identity()

    def forward(inputs: Tensor) -> Tensor:
        # The first channel's right pixel counts once, the second one's left pixel twice.
        values = identity(inputs)
        return values[:, 0, 1] + 2 * values[:, 1, 0]

    weights = torch.tensor([1.0, 2.0, 0.0]).softmax(0)
    attributions = LayerScoreCam(forward, identity).attribute(x)
    expected = torch.stack([weights[1] + weights[2], weights[0] + weights[2]])
    torch.testing.assert_close(attributions, expected.reshape(1, 1, 2))


def test_constant_channels_share_one_forward_pass(net: SmallNet, images: Tensor) -> None:
    with torch.no_grad():
        net.features.weight[1:3] = 0
    seen: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        seen.extend(x.clone())
        return net(x)

    LayerScoreCam(forward, net.features).attribute(images, target=0)
    blank = torch.stack(seen).flatten(1).eq(0).all(1)
    assert blank.sum() == len(images)
    # The images as they are, three live channels and one row of the baseline for each, and at most one more as a check.
    assert len(images) * (1 + 3 + 1) <= len(seen) <= len(images) * (1 + 3 + 1) + 1


def test_relu_attributions(net: SmallNet, images: Tensor) -> None:
    signed = LayerScoreCam(net, net.features).attribute(images, target=0)
    assert signed.lt(0).any()
    rectified = LayerScoreCam(net, net.features).attribute(images, target=0, relu_attributions=True)
    assert torch.equal(rectified, signed.clamp(min=0))


def test_a_layer_of_one_pixel_weighs_all_channels_alike(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
    attributions = LayerScoreCam(model, model[1]).attribute(images, target=0)
    torch.testing.assert_close(attributions, model[:2](images).mean(1, keepdim=True))


def test_progress_counts_every_masked_input(net: SmallNet, images: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    LayerScoreCam(net, net.features).attribute(images, target=0, show_progress=True)
    # Five live channels and the baseline for each of three images, and at most one more as a check.
    assert re.search(r"\b(18/18|19/19)\b", capsys.readouterr().err)


def test_coverage_scores_the_fewest_channels_that_hold_the_share() -> None:
    # Total activations 1, 6, 3 and 0 (a constant): six tenths need the second channel, more needs the third as well.
    x = torch.tensor([[[0.0, 1.0], [-6.0, 0.0], [1.0, 2.0], [0.0, 0.0]]])
    identity = nn.Identity()
    seen: list[Tensor] = []

    def forward(inputs: Tensor) -> Tensor:
        seen.extend(identity(inputs).clone())
        return inputs[:, 2, 0] - inputs[:, 1, 0]

    def masked_rows(coverage: float) -> int:
        seen.clear()
        LayerScoreCam(forward, identity, coverage=coverage).attribute(x)
        return sum(not torch.equal(row, x[0]) for row in seen)

    assert [masked_rows(coverage) for coverage in (0.1, 0.6, 0.61, 0.9, 0.91, 1.0)] == [1, 1, 2, 2, 3, 4]
    # The scores of the second and third channel alone: mask [0, 1] leaves 0, mask [0, 1] leaves 0.
    attributions = LayerScoreCam(forward, identity, coverage=0.9).attribute(x)
    torch.testing.assert_close(attributions, torch.tensor([[[-2.5, 1.0]]]))


def test_coverage_is_of_each_example(net: SmallNet, images: Tensor) -> None:
    together = LayerScoreCam(net, net.features, coverage=0.5).attribute(images, target=0)
    for example in range(3):
        alone = LayerScoreCam(net, net.features, coverage=0.5).attribute(images[example : example + 1], target=0)
        torch.testing.assert_close(together[example : example + 1], alone)


def test_coverage_of_a_layer_without_activation(net: SmallNet, images: Tensor) -> None:
    with torch.no_grad():
        net.features.weight.zero_()
        net.features.bias.zero_()
    images = torch.cat([images, images])
    assert LayerScoreCam(net, net.features, coverage=0.5).attribute(images, target=0).eq(0).all()


@pytest.mark.parametrize("coverage", [0.0, -0.5, 1.01, float("nan")])
def test_refuses_coverage_out_of_range(net: SmallNet, coverage: float) -> None:
    with pytest.raises(ValueError, match=r"coverage is .*; expected a number in \(0, 1\]"):
        LayerScoreCam(net, net.features, coverage=coverage)
