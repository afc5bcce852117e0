"""The regression of channel scores: against NumPy, on functions whose smoothness is known, and its choices."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from captum_fusion._engine import surrogate
from captum_fusion._engine.surrogate import Surrogate, features, fit, kernel, most_informative, pooled, relu_minmax

pytestmark = pytest.mark.every_device

Scores = Callable[[Tensor], Tensor]


def activations(seed: int, channels: int = 120, shape: tuple[int, ...] = (5, 5), device: str = "cpu") -> Tensor:
    """Sparse channels, as after a ReLU; every tenth is constant."""
    drawn = torch.randn(channels, *shape, generator=torch.Generator().manual_seed(seed))
    sizes = torch.rand(channels, *(1,) * len(shape), generator=torch.Generator().manual_seed(seed + 1))
    drawn = torch.relu(drawn - 0.5) * sizes
    drawn[::10] = 0
    return drawn.to(device)


def masks_of(maps: Tensor) -> Tensor:
    """N(A_k), and zeros where a channel is constant."""
    flat = maps.flatten(1)
    lowest, highest = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return torch.where(highest > lowest, (flat - lowest) / (highest - lowest).clamp(min=1e-9), 0)


def smooth(seed: int) -> Scores:
    """A random function of the pixels that a mask keeps, which saturates."""
    inner = torch.randn(25, 8, generator=torch.Generator().manual_seed(seed))
    return lambda masks: 3 * torch.tanh(masks.sqrt() @ inner.to(masks) / 3).sum(1)


def explained(maps: Tensor, score: Scores, tolerance: float) -> tuple[Surrogate, Tensor, int]:
    """The surrogate when it is done, the exact scores, and how many were asked for."""
    exact = score(masks_of(maps))
    ends = [score(torch.full((1, maps[0].numel()), value, device=maps.device)) for value in (0.0, 1.0)]
    surrogate = Surrogate(maps, *ends, tolerance)
    asked: list[int] = []
    while not surrogate.done:
        channels = surrogate.propose()
        asked += channels.tolist()
        surrogate.observe(channels, exact[channels, None])
    assert len(set(asked)) == len(asked)
    return surrogate, exact, len(asked)


def error(surrogate: Surrogate, maps: Tensor, exact: Tensor) -> float:
    flat = maps.flatten(1)
    return float((relu_minmax(surrogate.weights[0] @ flat) - relu_minmax(exact.softmax(0) @ flat)).abs().max())


def test_the_kernel_is_the_covariance_of_random_networks() -> None:
    # E[erf(u a + c) erf(u b + c)] for features of one number, summed over a fine grid of the normal u and c.
    nodes = torch.linspace(-8, 8, 801, dtype=torch.float64)
    weights = torch.exp(-(nodes**2) / 2)
    weights = weights / weights.sum()
    slope, a, b = 2.0, 0.7, -0.4
    inner, bias = slope**0.5 * nodes[:, None], surrogate._BIAS**0.5 * nodes
    expected = weights @ (torch.erf(inner * a + bias) * torch.erf(inner * b + bias)) @ weights
    found = kernel(torch.tensor([[a]]).double(), torch.tensor([[b]]).double(), slope)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_fit_is_the_likeliest_gaussian_process() -> None:
    given = torch.randn(20, 4, dtype=torch.float64)
    scores = torch.randn(20, 2, dtype=torch.float64)
    found = fit(given, scores, 1.5, 0.01)
    covariance = kernel(given, given, 1.5).numpy() + 0.01 * np.eye(20)
    inverse, ones = np.linalg.inv(covariance), np.ones(20)
    likelihood = 0.0
    for target, values in enumerate(scores.T.numpy()):
        mean = (ones @ inverse @ values) / (ones @ inverse @ ones)
        variance = (values - mean) @ inverse @ (values - mean) / 20
        assert found.mean[target].item() == pytest.approx(mean)
        assert found.variance[target].item() == pytest.approx(variance)
        # The normal density, but for the constants.
        likelihood -= 0.5 * np.linalg.slogdet(variance * covariance)[1]
    assert found.likelihood == pytest.approx(likelihood)


def test_draws_have_the_posterior_of_numpy() -> None:
    maps, score = activations(0), smooth(0)
    exact = score(masks_of(maps)).double()
    surrogate = Surrogate(maps, *(score(torch.full((1, 25), value)) for value in (0.0, 1.0)), 0.05)
    channels = surrogate.propose()
    surrogate.observe(channels, exact[channels, None])
    live = (maps.flatten(1).amax(1) > 0).nonzero().squeeze(1).tolist()
    known = [live.index(channel) for channel in channels.tolist()] + [len(live), len(live) + 1]
    unknown = [row for row in range(len(live)) if row not in known]
    values = torch.cat([exact[channels], score(torch.zeros(1, 25)), score(torch.ones(1, 25))]).double().numpy()
    slope, noise = surrogate._likeliest
    flat = maps[live].flatten(1).double()
    given = features(flat, flat.amin(1), flat.amax(1))
    every = kernel(given, given, slope).numpy()
    inverse = np.linalg.inv(every[np.ix_(known, known)] + noise * np.eye(len(known)))
    across = every[np.ix_(unknown, known)]
    mean = inverse.sum(0) @ values / inverse.sum()
    variance = (values - mean) @ inverse @ (values - mean) / len(values)
    expected = mean + across @ inverse @ (values - mean)
    covariance = variance * (
        every[np.ix_(unknown, unknown)] + noise * np.eye(len(unknown)) - across @ inverse @ across.T
    )
    found, scale = surrogate._posterior()
    np.testing.assert_allclose(found[0], expected, atol=1e-4)
    drawn = scale[0] * surrogate._draws
    deviations = drawn.std(0).numpy() / np.sqrt(np.diag(covariance))
    assert abs(np.log(deviations)).mean() < 0.1
    found_covariance = np.cov(drawn.numpy().T)
    assert np.corrcoef(found_covariance.ravel(), covariance.ravel())[0, 1] > 0.85


@pytest.mark.parametrize("tolerance", [0.05, 0.3])
def test_smooth_scores_take_few_passes_and_errors_are_covered(tolerance: float, device: torch.device) -> None:
    covered = []
    for seed in range(20):
        maps = activations(seed, channels=200, device=str(device))
        surrogate, exact, asked = explained(maps, smooth(seed), tolerance)
        assert asked < 100
        assert surrogate.errors.item() <= tolerance
        covered.append(error(surrogate, maps, exact) <= surrogate.errors.item())
    assert sum(covered) >= 18


def test_scores_without_smoothness_are_all_asked_for() -> None:
    maps = activations(0)
    rough = torch.randn(120, generator=torch.Generator().manual_seed(1))
    rough[::10] = 0.25
    surrogate, exact, asked = explained(maps, lambda masks: rough if len(masks) > 1 else rough[:1], 0.05)
    assert asked == 108
    assert surrogate.errors.item() == 0
    torch.testing.assert_close(surrogate.weights[0], exact.softmax(0))


def test_scores_that_are_all_the_same_tell_nothing() -> None:
    # A score that is 0 for most masks but not for all, such as one after a ReLU.
    maps = activations(0)
    _, _, asked = explained(maps, lambda masks: torch.zeros(len(masks)), 0.3)
    assert asked == 108


def test_constant_channels_have_the_score_of_the_blank() -> None:
    maps = activations(3)
    maps[20] = 7.0
    surrogate, exact, _ = explained(maps, smooth(3), 0.02)
    torch.testing.assert_close(surrogate.weights[0, ::10], exact.softmax(0)[::10], rtol=0.1, atol=0)
    assert surrogate.weights[0, ::10].unique().numel() == 1
    torch.testing.assert_close(surrogate.weights.sum(1), torch.ones(1))


def test_nothing_is_asked_where_every_channel_is_constant() -> None:
    surrogate = Surrogate(torch.ones(4, 3, 3), torch.tensor([1.0]), torch.tensor([2.0]), 0.1)
    assert surrogate.done
    torch.testing.assert_close(surrogate.weights, torch.full((1, 4), 0.25))


def test_a_score_far_below_all_others_is_no_weight_of_its_own() -> None:
    # Without constant channels, the blank's score has no channel to count for, however high it is.
    maps = activations(5)[1:10]
    surrogate = Surrogate(maps, torch.tensor([500.0]), torch.tensor([0.0]), 0.05)
    scores = torch.arange(9.0)
    while not surrogate.done:
        channels = surrogate.propose()
        surrogate.observe(channels, scores[channels, None])
    torch.testing.assert_close(surrogate.weights[0], scores.softmax(0))


def test_nothing_but_the_scores_decides() -> None:
    maps = activations(7)
    before = torch.random.get_rng_state()
    first, _, _ = explained(maps, smooth(7), 0.05)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(123)
    other = Surrogate(activations(8), torch.zeros(1), torch.ones(1), 0.1)
    second, _, _ = explained(maps, smooth(7), 0.05)
    assert other.propose().numel()
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.errors, second.errors)


def test_several_targets_share_the_channels() -> None:
    maps, targets = activations(9, channels=200), [smooth(seed) for seed in (9, 10, 11)]
    exact = torch.stack([score(masks_of(maps)) for score in targets], dim=1)
    ends = [torch.cat([score(torch.full((1, 25), value)) for score in targets]) for value in (0.0, 1.0)]
    surrogate = Surrogate(maps, *ends, 0.1)
    asked = 0
    while not surrogate.done:
        channels = surrogate.propose()
        asked += len(channels)
        surrogate.observe(channels, exact[channels])
    alone = [explained(maps, score, 0.1)[2] for score in targets]
    assert asked < sum(alone)
    flat = maps.flatten(1)
    differences = (relu_minmax(surrogate.weights @ flat) - relu_minmax(exact.T.softmax(1) @ flat)).abs().amax(1)
    assert (differences <= 0.1).all()


@pytest.mark.parametrize("shape", [(300,), (40, 13), (9, 5, 8)])
def test_layers_of_any_shape(shape: tuple[int, ...]) -> None:
    maps = activations(1, shape=shape)
    assert pooled(maps).shape[1] < maps[0].numel()
    surrogate, exact, _ = explained(maps, lambda masks: 20 * masks[:, ::7].mean(1), 0.1)
    assert error(surrogate, maps, exact) <= 0.1


def test_the_most_telling_channel_and_then_what_it_leaves() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, third, none = torch.randn(4, 400, generator=generator)
    # The maps follow three scores. The last channel nearly repeats the first one and tells nothing after it.
    draws = torch.stack([third, second, first, first + 0.01 * none], dim=1)
    maps = torch.stack([3 * first, 3 * first, second, 0.1 * third], dim=1)
    chosen = most_informative(draws, maps, 3).tolist()
    assert chosen[0] in (2, 3)
    assert chosen[1:] == [1, 0]


@pytest.mark.parametrize("candidates", [12, 6])
def test_each_choice_leaves_the_least_variance(candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surrogate, "_CANDIDATES", candidates)
    generator = torch.Generator().manual_seed(2)
    draws = torch.randn(300, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    maps = draws @ torch.randn(12, 5, generator=generator) + torch.randn(300, 5, generator=generator)
    chosen: list[int] = []
    centred, values = (part - part.mean(0) for part in (draws.double(), maps.double()))

    def left(known: list[int]) -> float:
        return float(np.linalg.lstsq(centred[:, known].numpy(), values.numpy(), rcond=None)[1].sum())

    # Among those that leave least by themselves.
    among = sorted(range(12), key=lambda channel: left([channel]))[:candidates]
    for _ in range(4):
        chosen.append(min(set(among) - set(chosen), key=lambda channel: left([*chosen, channel])))
    assert most_informative(draws, maps, 4).tolist() == chosen


def test_the_blank_and_the_whole_alone_are_not_enough() -> None:
    surrogate = Surrogate(activations(0), torch.tensor([1.0]), torch.tensor([1.001]), 0.9)
    assert not surrogate.done
    assert surrogate.propose().numel() == 8
