import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_fusion import Rise
from captum_fusion.functional import random_masks
from tests import straight_line
from tests.conftest import SmallNet

pytestmark = pytest.mark.every_device


def test_masks_equal_the_straight_line_computation() -> None:
    for axes, cells in [(1, 3), (2, 1), (2, 3), (3, 3)]:
        size = (11, 6, 7)[:axes]
        grids = (torch.rand(5, 1, *(cells, 2, 3)[:axes]) < 0.5).double()
        shifts = torch.rand(5, axes).double()
        masks = random_masks(grids, shifts, size)
        for mask, grid, shift in zip(masks, grids, shifts, strict=True):
            expected = straight_line.enlarge_and_crop(grid[0].numpy(), shift.numpy(), size)
            np.testing.assert_allclose(mask[0], expected, atol=1e-12)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_equals_the_straight_line_computation_with_its_own_masks(axes: int) -> None:
    """The masks are what the masked rows of ones hold."""
    model = SmallNet(axes).eval()
    images = torch.randn(2, 3, *(9, 8, 7)[:axes])
    seen: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        seen.extend(x[:, 0].clone())
        return x.flatten(1)[:, :1]

    options = {"samples": 70, "grid": 3, "probability": 0.3, "seed": 3}
    ones = torch.ones_like(images[:1])
    Rise(forward, activation=None, **options).attribute(ones)
    # After the input as it is, which comes once more at the end to see whether scores depend on the batch.
    masks = [row.double().numpy() for row in seen[1:71]]
    assert 71 <= len(seen) <= 72
    attributions = Rise(model, **options).attribute(images, 0.25, target=1)
    assert attributions.shape == images.shape
    for attribution, x in zip(attributions, images.split(1), strict=True):
        with torch.no_grad():
            probability = straight_line.probability(model, 1)
            baseline = torch.full_like(x, 0.25)
            expected = straight_line.rise(masks, 0.3, probability, x, baseline)
        for channel in attribution:
            np.testing.assert_allclose(channel, expected, atol=1e-5)


def test_finds_the_pixels_that_count(device: torch.device) -> None:
    """f is the sum of one quarter of the picture, which masks keep with the probability of the score."""

    def forward(x: Tensor) -> Tensor:
        return x[:, 0, :8, :8].mean((1, 2))

    map_ = Rise(forward, samples=500, activation=None).attribute(torch.ones(1, 1, 16, 16, device=device))[0, 0]
    assert map_[:6, :6].min() > map_[10:, 10:].max()


def test_masks_are_kept_with_their_probability() -> None:
    """A mask is right on average: its mean is p."""
    grids = (torch.rand(4000, 1, 4, 4) < 0.3).float()
    mean = random_masks(grids, torch.rand(4000, 2), (13, 17)).mean(0)
    torch.testing.assert_close(mean, torch.full_like(mean, 0.3), atol=0.05, rtol=0)


def test_the_masks_follow_from_the_seed_alone(net: SmallNet, images: Tensor) -> None:
    first = Rise(net, samples=20).attribute(images, target=[0, 1, 2])
    state = torch.get_rng_state()
    again = Rise(net, samples=20).attribute(images[1:], target=[1, 2], perturbations_per_eval=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(again, first[1:])
    assert not torch.allclose(Rise(net, samples=20, seed=1).attribute(images, target=[0, 1, 2]), first)


def test_properties(net: SmallNet, images: Tensor) -> None:
    rise = Rise(net, samples=5)
    plain = rise.attribute(images, target=1)
    with torch.inference_mode():
        assert torch.equal(rise.attribute(images, target=1), plain)
    assert rise.get_name() == "Rise"
    assert not rise.has_convergence_delta()
    assert rise.multiplies_by_inputs


def test_several_inputs(net: SmallNet, images: Tensor) -> None:
    def forward(table: Tensor, first: Tensor, second: Tensor, tokens: Tensor) -> Tensor:
        return net(first + second) + table + tokens.sum((1, 2, 3)).unsqueeze(1)

    tokens = torch.ones(3, 1, 2, 2, dtype=torch.long, device=images.device)
    inputs = (torch.rand(3, 3, device=images.device), images, images.clone(), tokens)
    rise = Rise(forward, samples=10)
    attributions = rise.attribute(inputs, (0, 0.5, None, 0), target=1)
    assert [value.shape for value in attributions] == [value.shape for value in inputs]
    assert not attributions[0].any()
    assert not attributions[3].any()
    assert torch.equal(attributions[1], attributions[2])
    assert attributions[1].any()


def test_refuses_what_it_cannot_draw() -> None:
    for options, message in [
        ({"samples": 0}, "samples is 0; expected at least 1"),
        ({"grid": 0}, "grid is 0; expected at least 1"),
        ({"probability": 0.0}, r"probability is 0.0; expected a number in \(0, 1\)"),
        ({"probability": 1.0}, r"probability is 1.0; expected a number in \(0, 1\)"),
        ({"activation": "relu"}, "activation is 'relu'; expected one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            Rise(nn.Identity(), **options)


def test_refuses_inputs_without_spatial_axes() -> None:
    for inputs in [torch.rand(2, 3), torch.ones(2, 3, 4, dtype=torch.long), torch.rand(1, 1, 2, 2, 2, 2)]:
        with pytest.raises(ValueError, match="expected one with one to three spatial axes"):
            Rise(lambda x: x.flatten(1).float()).attribute(inputs, target=0)
