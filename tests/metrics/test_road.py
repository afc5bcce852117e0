from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor

from captum_fusion.functional import impute
from captum_fusion.metrics import road
from tests import straight_line
from tests.conftest import SmallNet

FRACTIONS = [0.1, 0.4, 0.75]


def linear(x: Tensor) -> Tensor:
    """The probability of class 0 is the mean of four pixels."""
    first = x[:, 0].mean(1)
    return torch.stack([first, 1 - first], dim=1)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_imputation_equals_the_solution_of_each_pixels_equation(axes: int) -> None:
    size = (12, 5, 4)[:axes]
    inputs = torch.randn(3, 2, *size).double()
    kept = torch.rand(3, 1, *size) < torch.tensor([0.8, 0.4, 0.1]).reshape(3, *(1,) * (axes + 1))
    kept.flatten(1)[:, 0] = True
    found = impute(inputs, kept)
    for example in range(3):
        for channel in range(2):
            expected = straight_line.impute(inputs[example, channel].numpy(), kept[example, 0].numpy())
            np.testing.assert_allclose(found[example, channel], expected, atol=1e-4)
    assert torch.equal(torch.where(kept, found, 0), torch.where(kept, inputs, 0))


def test_imputation_of_pytorch_grad_cam_is_the_same() -> None:
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    image = torch.rand(3, 14, 17)
    kept = torch.rand(14, 17) < 0.3
    theirs = NoisyLinearImputer(noise=0.0)(image, kept.float())
    torch.testing.assert_close(impute(image[None], kept[None, None])[0], theirs.float(), atol=1e-4, rtol=0)


def test_imputation_where_nothing_or_everything_is_kept() -> None:
    inputs = torch.rand(2, 3, 4, 5)
    assert torch.equal(impute(inputs, torch.ones(2, 1, 4, 5, dtype=torch.bool)), inputs)
    assert impute(inputs, torch.zeros(2, 1, 4, 5, dtype=torch.bool)).eq(0).all()
    # One value is all that is known.
    one = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    one[:, :, 1, 2] = True
    torch.testing.assert_close(impute(inputs, one), inputs[:, :, 1:2, 2:3].expand_as(inputs), atol=1e-4, rtol=0)
    assert impute(torch.rand(1, 2, 1), torch.zeros(1, 1, 1, dtype=torch.bool)).eq(0).all()


def test_worked_out_by_hand() -> None:
    # Of pixels 0, 0.2, 1, 0.4 with the maximum most and the first least relevant. Without the third, the mean of its
    # neighbours, 0.3, is put: P = (0 + 0.2 + 0.3 + 0.4) / 4. Without the first, its one neighbour, 0.2.
    x = torch.tensor([[[0.0, 0.2, 1.0, 0.4]]])
    relevance = torch.tensor([[[0.0, 1.0, 3.0, 2.0]]])
    options: dict[str, Any] = {"target": 0, "fractions": [0.25], "noise": 0.0, "activation": None}
    most = road(linear, x, relevance, order="most", **options)
    least = road(linear, x, relevance, order="least", **options)
    torch.testing.assert_close(most, torch.tensor([0.225]))
    torch.testing.assert_close(least, torch.tensor([0.45]))
    torch.testing.assert_close(road(linear, x, relevance, **options), (least - most) / 2)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_equals_the_straight_line_computation(axes: int) -> None:
    model = SmallNet(axes).eval()
    size = (9, 6, 7)[:axes]
    images = torch.randn(2, 3, *size)
    maps = torch.rand(2, 1, *size)
    found = {
        order: road(model, images, maps, None, 1, FRACTIONS, order, noise=0.0)
        for order in ("most", "least", "combined")
    }
    pixels = maps[0].numel()
    for example, x in enumerate(images.split(1)):
        order = sorted(range(pixels), key=lambda pixel: -maps[example].flatten()[pixel].item())
        means = []
        for ranked in (order, order[::-1]):
            values = []
            for fraction in FRACTIONS:
                kept = np.ones(pixels, dtype=bool)
                kept[ranked[: int(fraction * pixels)]] = False
                channels = [straight_line.impute(channel.double().numpy(), kept.reshape(size)) for channel in x[0]]
                with torch.no_grad():
                    values.append(straight_line.probability(model, 1)(torch.from_numpy(np.stack(channels))[None].to(x)))
            means.append(sum(values) / len(values))
        most, least = means
        for name, expected in (("most", most), ("least", least), ("combined", (least - most) / 2)):
            assert found[name][example].item() == pytest.approx(expected, abs=1e-4)


def test_the_right_map_is_better_than_the_reversed_one() -> None:
    x = torch.rand(1, 1, 4)
    right, wrong = (road(linear, x, sign * x, target=0, sign="all", activation=None) for sign in (1, -1))
    assert right > 0 > wrong
    torch.testing.assert_close(right, -wrong, atol=0.02, rtol=0)


def test_noise_follows_from_the_seed_alone(net: SmallNet, images: Tensor) -> None:
    maps = LayerGradCam(net, net.features).attribute(images, target=1)
    first = road(net, images, maps, target=1, noise=0.5)
    state = torch.get_rng_state()
    again = road(net, images[1:], maps[1:], target=1, noise=0.5, perturbations_per_eval=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(again, first[1:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(road(net, images, maps, target=1, noise=0.5, seed=1), first)


def test_pytorch_grad_cams_combined_road_is_near(net: SmallNet) -> None:
    """It removes the share that lies above a percentile, and draws other noise for each picture."""
    from pytorch_grad_cam.metrics.road import ROADCombined
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    images = 3 * torch.randn(3, 3, 20, 20)
    maps = torch.rand(3, 1, 20, 20)
    theirs = ROADCombined(percentiles=[20, 50, 80])(
        images, maps[:, 0].numpy(), [ClassifierOutputSoftmaxTarget(target) for target in range(3)], net
    )
    ours = road(net, images, maps, target=[0, 1, 2], fractions=[0.2, 0.5, 0.8])
    np.testing.assert_allclose(ours, theirs, atol=5e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "first"}, "order is 'first'; expected one of"),
        ({"fractions": []}, r"fractions is \[\]; expected at least one number"),
        ({"fractions": [0.5, 1.0]}, r"fractions is \[0.5, 1.0\]; expected"),
        ({"noise": -0.1}, "noise is -0.1; expected a number that is not negative"),
    ],
)
def test_refuses(options: dict[str, Any], message: str, net: SmallNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        road(net, images, images, target=0, **options)
