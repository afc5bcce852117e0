import re

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from captum_fusion import LayerScoreCam
from captum_fusion.functional import normalize
from tests.conftest import Counter, SmallNet


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


@pytest.fixture
def wide() -> SmallNet:
    """A network whose layer has many channels."""
    return SmallNet(channels=150).eval()


def relu_minmax(attributions: Tensor) -> Tensor:
    return normalize(attributions.relu())


@pytest.mark.parametrize("tolerance", [0.05, 0.2])
def test_within_the_tolerance_in_fewer_passes(wide: SmallNet, images: Tensor, tolerance: float) -> None:
    exact = LayerScoreCam(wide, wide.features).attribute(images, target=0)
    counter = Counter(wide)
    attributions, errors = LayerScoreCam(counter, wide.features, tolerance=tolerance).attribute(
        images, target=0, return_error_estimate=True
    )
    assert attributions.shape == exact.shape
    assert errors.shape == (3,)
    assert errors.le(tolerance).all()
    assert (relu_minmax(attributions) - relu_minmax(exact)).abs().flatten(1).amax(1).le(tolerance).all()
    assert counter.rows < 3 * 149 / 2


def test_every_channel_scored_is_exact_and_says_so(net: SmallNet, images: Tensor) -> None:
    exact = LayerScoreCam(net, net.features).attribute(images, target=0)
    # The five live channels are fewer than the first batch.
    for tolerance in (0, 0.05):
        attributions, errors = LayerScoreCam(net, net.features, tolerance=tolerance).attribute(
            images, target=0, return_error_estimate=True
        )
        torch.testing.assert_close(attributions, exact)
        assert torch.equal(errors, torch.zeros(3))


def test_within_a_tolerance_examples_share_passes_and_each_stops_on_its_own(wide: SmallNet, images: Tensor) -> None:
    counter = Counter(wide)
    score_cam = LayerScoreCam(counter, wide.features, tolerance=0.05)
    together = score_cam.attribute(images, target=[0, 1, 2])
    shared = list(counter.sizes)
    counter.sizes.clear()
    passes = []
    for example, target in enumerate([0, 1, 2]):
        alone = score_cam.attribute(images[example : example + 1], target=target)
        torch.testing.assert_close(together[example : example + 1], alone)
        passes.append(len(counter.sizes) - sum(passes))
    # Scored together are the same rows, in as many passes as the example takes that stops last.
    assert sum(shared) == pytest.approx(counter.rows, abs=3)
    assert len(shared) == max(passes) < sum(passes)


def test_within_a_tolerance_the_same_map_every_time(wide: SmallNet, images: Tensor) -> None:
    score_cam = LayerScoreCam(wide, wide.features, tolerance=0.05)
    first = score_cam.attribute(images, target=0)
    torch.manual_seed(5)
    torch.rand(7)
    assert torch.equal(score_cam.attribute(images, target=0), first)


def test_progress_tells_the_passes_and_the_error(
    wide: SmallNet, images: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    counter = Counter(wide)
    _, errors = LayerScoreCam(counter, wide.features, tolerance=0.1).attribute(
        images, target=0, show_progress=True, return_error_estimate=True
    )
    shown = capsys.readouterr().err
    passes = [int(number) for number in re.findall(r"(\d+)/447", shown)]
    # All but the images as they are and the blank; one row may be a check.
    assert passes[-1] in (counter.rows - 6, counter.rows - 7)
    assert f"error {errors.max():.2g}" in shown


def test_refuses_a_tolerance_out_of_range(net: SmallNet) -> None:
    for tolerance in (-0.1, 1.0, 1.5, float("nan"), True, "0.1", None):
        with pytest.raises(ValueError, match=r"tolerance is .*; expected a number in \[0, 1\)"):
            LayerScoreCam(net, net.features, tolerance=tolerance)


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_several_classes_of_one_image_share_its_passes(wide: SmallNet, images: Tensor, tolerance: float) -> None:
    counter = Counter(wide)
    score_cam = LayerScoreCam(counter, wide.features, tolerance=tolerance)
    image, targets = images[:1], [2, 0, 1, 0]
    attributions, _ = score_cam.attribute(image.expand(4, -1, -1, -1), target=targets, return_error_estimate=True)
    together = counter.rows
    counter.sizes.clear()
    alone = torch.cat([LayerScoreCam(counter, wide.features).attribute(image, target=target) for target in targets])
    # The image is there four times in the first pass; otherwise the rows are those of one class.
    assert together <= 4 + counter.rows / 4 + 1
    if tolerance:
        assert together < counter.rows / 8
        assert (relu_minmax(attributions) - relu_minmax(alone)).abs().flatten(1).amax(1).le(tolerance).all()
    else:
        torch.testing.assert_close(attributions, alone)


def test_classes_within_a_tolerance_take_little_more_passes_than_the_dearest_of_them() -> None:
    torch.manual_seed(0)
    model = resnet18(weights=None).eval()
    model.fc.weight.data *= 10
    image, targets = torch.rand(1, 3, 32, 32), [281, 282, 285, 287, 761]
    counter = Counter(model)
    score_cam = LayerScoreCam(counter, model.layer2, tolerance=0.05)
    alone = []
    for target in targets:
        counter.sizes.clear()
        score_cam.attribute(image, target=target)
        alone.append(counter.rows)
    counter.sizes.clear()
    score_cam.attribute(image.expand(5, -1, -1, -1), target=targets)
    # The unmasked pass has the image five times.
    assert counter.rows - 4 <= 1.25 * max(alone) < sum(alone) / 2


def test_what_differs_in_more_than_its_target_shares_nothing() -> None:
    model = SmallNet(channels=20).eval()

    def forward(x: Tensor, scale: Tensor) -> Tensor:
        return model(x) * scale[:, None]

    image, other = torch.rand(2, 1, 3, 12, 10).unbind(0)
    images = torch.cat([image, image, image, other, image])
    scales, baselines = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.5]), torch.rand(5, 3, 12, 10)
    baselines[1] = baselines[0]
    targets = [0, 1, 1, 2, 2]
    score_cam = LayerScoreCam(forward, model.features)
    together = score_cam.attribute(images, targets, scales, baselines=baselines)
    for example in range(5):
        own = slice(example, example + 1)
        alone = score_cam.attribute(images[own], targets[example], scales[own], baselines=baselines[own])
        torch.testing.assert_close(together[own], alone)
    counter = Counter(forward)
    LayerScoreCam(counter, model.features).attribute(images, targets, scales)
    # Four groups: the first two examples differ in their targets only.
    assert counter.rows in (5 + 4 * 20, 5 + 4 * 20 + 1)
