"""SS-CAM and IS-CAM."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_fusion import LayerISCam, LayerScoreCam, LayerSSCam
from captum_fusion._engine.surrogate import Surrogate, relu_minmax
from tests import straight_line
from tests.conftest import Counter, SmallNet

SAMPLED = [LayerISCam, LayerSSCam]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_ss_cam_equals_the_straight_line_computation_with_its_own_noise(axes: int) -> None:
    """The noise is what the masked rows of ones, whose one channel is constant, hold."""
    model = SmallNet(axes).eval()
    size = (9, 6, 7)[:axes]
    ones = torch.ones(1, 3, *size)
    blank = nn.Identity()
    rows: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        rows.extend(x.clone())
        return blank(x).flatten(1).sum(1)

    LayerSSCam(forward, blank, samples=3, stdev=0.5, seed=7).attribute(ones, perturbations_per_eval=1)
    noises = [row[0].double().numpy() for row in rows[-3:]]
    assert all(abs(noise.std() - 0.5) < 0.3 and abs(noise.mean()) < 0.5 for noise in noises)
    assert not np.allclose(noises[0], noises[1])
    images = torch.randn(2, 3, *size)
    attributions = LayerSSCam(model, model.features, samples=3, stdev=0.5, seed=7).attribute(images, target=1)
    for attribution, x in zip(attributions, images.split(1), strict=True):
        activations, _ = straight_line.activations_and_gradients(model, model.features, x, 1)
        with torch.no_grad():
            score = straight_line.logit(model, 1)
            expected = straight_line.ss_cam(activations, score, x, torch.zeros_like(x), noises)
        np.testing.assert_allclose(attribution[0], expected, atol=1e-5 * np.abs(expected).max())


def test_is_cam_worked_out_by_hand() -> None:
    # The layer is the input: channels [0, 1] and [1, 0] keep one half each; f is the square of 2 left + right, so that
    # over the halves 1/2 and 1 the scores are (1/4 + 1) / 2 and (1 + 4) / 2.
    x = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    identity = nn.Identity()

    def forward(inputs: Tensor) -> Tensor:
        values = identity(inputs)
        return (values[:, 0, 1] + 2 * values[:, 1, 0]).square()

    weights = torch.tensor([0.625, 2.5]).softmax(0)
    attributions = LayerISCam(forward, identity, samples=2).attribute(x)
    torch.testing.assert_close(attributions, weights.flip(0).reshape(1, 1, 2))


def test_one_step_and_no_noise_are_score_cam(net: SmallNet, images: Tensor) -> None:
    expected = LayerScoreCam(net, net.features).attribute(images, target=1)
    torch.testing.assert_close(LayerISCam(net, net.features, samples=1).attribute(images, target=1), expected)
    still = LayerSSCam(net, net.features, samples=3, stdev=0.0)
    torch.testing.assert_close(still.attribute(images, target=1), expected)


def test_the_noise_follows_from_the_seed_alone(net: SmallNet, images: Tensor) -> None:
    first = LayerSSCam(net, net.features, samples=4).attribute(images, target=1)
    state = torch.get_rng_state()
    again = LayerSSCam(net, net.features, samples=4).attribute(images[1:], target=1, perturbations_per_eval=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(again, first[1:])
    other = LayerSSCam(net, net.features, samples=4, seed=1).attribute(images, target=1)
    assert not torch.allclose(other, first)


def test_memory_is_bounded_by_the_rows_of_one_evaluation(net: SmallNet, images: Tensor) -> None:
    for algorithm in SAMPLED:
        counter = Counter(net)
        algorithm(counter, net.features, samples=5).attribute(images, target=0, perturbations_per_eval=2)
        assert max(counter.sizes) == 6
        # Five live channels and the blank for each image and sample.
        assert 3 + 3 * 6 * 5 <= counter.rows <= 3 + 3 * 6 * 5 + 6


def test_within_the_tolerance_in_fewer_passes(images: Tensor) -> None:
    for algorithm in SAMPLED:
        torch.manual_seed(0)
        wide = SmallNet(channels=150).eval()
        options: dict[str, Any] = {"samples": 3} | ({"stdev": 0.3} if algorithm is LayerSSCam else {})
        exact = algorithm(wide, wide.features, **options).attribute(images, target=1)
        counter = Counter(wide)
        attributions, errors = algorithm(counter, wide.features, tolerance=0.1, **options).attribute(
            images, target=1, return_error_estimate=True
        )
        assert counter.rows < 3 * 3 * 120
        assert errors.le(0.1).all()
        assert (relu_minmax(attributions.flatten(1)) - relu_minmax(exact.flatten(1))).abs().amax(1).le(0.1).all()


def test_the_regression_knows_the_mean_score_of_the_whole_input(
    net: SmallNet, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # f(x / 2) and f(x), where Score-CAM has f(x) alone.
    given: list[Tensor] = []

    class Observed(Surrogate):
        def __init__(self, activations: Tensor, blank: Tensor, whole: Tensor, tolerance: float) -> None:
            given.append(whole)
            super().__init__(activations, blank, whole, tolerance)

    monkeypatch.setattr("captum_fusion.attr.score_cam.Surrogate", Observed)
    LayerISCam(net, net.features, samples=2, tolerance=0.1).attribute(images, target=1)
    torch.testing.assert_close(torch.cat(given), (net(images / 2) + net(images))[:, 1].detach() / 2)


def test_refuses(net: SmallNet) -> None:
    for algorithm in SAMPLED:
        for options, message in [
            ({"samples": 0}, "samples is 0; expected at least 1"),
            ({"stdev": -1.0}, "stdev is -1.0; expected a number"),
        ]:
            if algorithm is LayerISCam and "stdev" in options:
                options, message = {"samples": -3}, "samples is -3; expected at least 1"
            with pytest.raises(ValueError, match=message):
                algorithm(net, net.features, **options)
