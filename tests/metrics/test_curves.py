from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from captum_fusion.metrics import deletion, insertion
from tests import straight_line
from tests.conftest import Counter, SmallNet

WEIGHTS = torch.tensor([0.1, 0.4, 0.2, 0.2])


def linear(x: Tensor) -> Tensor:
    """The probability of class 0 is 0.1 and what each of four pixels adds."""
    first = 0.1 + x[:, 0] @ WEIGHTS.to(x)
    return torch.stack([first, 1 - first], dim=1)


def test_worked_out_by_hand_on_a_linear_model() -> None:
    x = torch.ones(1, 1, 4)
    options = {"baselines": 0, "target": 0, "steps": 4, "activation": None, "return_curve": True}
    area, fractions, probabilities = insertion(linear, x, WEIGHTS.reshape(1, 1, 4), **options)
    assert fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    # Restored in the order 0.4, 0.2 (the first of equals), 0.2, 0.1.
    torch.testing.assert_close(probabilities, torch.tensor([[0.1, 0.5, 0.7, 0.9, 1.0]]))
    torch.testing.assert_close(area, torch.tensor([(0.05 + 0.5 + 0.7 + 0.9 + 0.5) / 4]))
    area, fractions, probabilities = deletion(linear, x, WEIGHTS.reshape(1, 1, 4), **options)
    torch.testing.assert_close(probabilities, torch.tensor([[1.0, 0.6, 0.4, 0.2, 0.1]]))
    torch.testing.assert_close(area, torch.tensor([(0.5 + 0.6 + 0.4 + 0.2 + 0.05) / 4]))


def test_a_perfect_map_a_random_and_a_reversed_one_order_as_they_must() -> None:
    x = torch.ones(3, 1, 4)
    maps = torch.stack([WEIGHTS, torch.tensor([0.3, 0.2, 0.4, 0.1]), -WEIGHTS]).unsqueeze(1)
    options = {"baselines": 0, "target": 0, "steps": 4, "activation": None, "sign": "all"}
    restored = insertion(linear, x, maps, **options)
    assert restored[0] > restored[1] > restored[2]
    removed = deletion(linear, x, maps, **options)
    assert removed[0] < removed[1] < removed[2]


@pytest.mark.parametrize("steps", [1, 7, 30, 300])
@pytest.mark.parametrize("metric", [insertion, deletion])
def test_equals_the_straight_line_computation(metric: Any, steps: int, net: SmallNet, images: Tensor) -> None:
    maps = torch.rand(3, 1, 12, 10)
    area, fractions, probabilities = metric(net, images, maps, target=2, steps=steps, return_curve=True)
    assert probabilities.shape == (3, steps + 1)
    baseline = straight_line.blur(images, 11, 5.0) if metric is insertion else torch.zeros_like(images)
    for example in range(3):
        start, end = (baseline, images) if metric is insertion else (images, baseline)
        order = sorted(range(120), key=lambda pixel: -maps[example].flatten()[pixel].item())
        values = []
        for step in range(steps + 1):
            x = start[example].flatten(1).clone()
            for pixel in order[: step * 120 // steps]:
                x[:, pixel] = end[example].flatten(1)[:, pixel]
            with torch.no_grad():
                values.append(net(x.view(1, 3, 12, 10)).softmax(1)[0, 2].item())
        np.testing.assert_allclose(probabilities[example], values, atol=1e-5)
        assert area[example].item() == pytest.approx(torch.trapezoid(torch.tensor(values), fractions).item(), abs=1e-5)


def test_a_large_value_ties_no_others() -> None:
    """Of a linear score, each pixel's share is known. A heavy tail or a hot pixel makes the other steps small."""
    half_normal = torch.randn(1, 1, 160, 160).abs()
    for weights in (half_normal.index_fill(3, torch.tensor([5]), 1e4), (2.5 * torch.randn(1, 1, 160, 160)).exp()):
        shares = (weights.double() / weights.double().sum()).float()
        area, fractions, scores = deletion(
            lambda x, shares=shares: (x * shares).sum((1, 2, 3)),
            torch.ones(1, 1, 160, 160),
            weights,
            steps=10,
            activation=None,
            return_curve=True,
        )
        ordered = shares.flatten().double().sort(descending=True).values.cumsum(0)
        left = [1.0, *(1 - ordered[step * 2560 - 1].item() for step in range(1, 11))]
        np.testing.assert_allclose(scores[0], left, atol=1e-4)
        assert area.item() == pytest.approx(float(torch.trapezoid(torch.tensor(left), fractions)), abs=1e-4)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("metric", [insertion, deletion])
def test_end_points_in_one_to_three_dimensions(metric: Any, axes: int) -> None:
    model = SmallNet(axes).eval()
    x = torch.randn(2, 3, *(9, 6, 7)[:axes])
    maps = torch.rand(2, 1, *(3, 2, 4)[:axes])
    _, fractions, probabilities = metric(model, x, maps, 0.25, target=1, steps=5, return_curve=True)
    with torch.no_grad():
        whole, nothing = (model(values).softmax(1)[:, 1] for values in (x, torch.full_like(x, 0.25)))
    first, last = (nothing, whole) if metric is insertion else (whole, nothing)
    torch.testing.assert_close(probabilities[:, 0], first)
    torch.testing.assert_close(probabilities[:, -1], last)
    assert (fractions[0], fractions[-1]) == (0, 1)


@pytest.mark.parametrize("metric", [insertion, deletion])
def test_ties_are_broken_in_row_order(metric: Any) -> None:
    seen: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        seen.extend(x.clone())
        return linear(x)

    metric(forward, torch.ones(1, 1, 4), torch.ones(1, 1, 4), 0, target=0, steps=4, activation=None)
    # After the input as it is, which comes once more at the end to see whether scores depend on the batch.
    changed = [(row[0] == (1 if metric is insertion else 0)).tolist() for row in seen[1:6]]
    assert len(seen) <= 1 + 1 + 5
    assert changed == [[pixel < step for pixel in range(4)] for step in range(5)]


def test_memory_is_bounded_by_the_rows_of_one_evaluation(net: SmallNet, images: Tensor) -> None:
    counter = Counter(net)
    few = deletion(counter, images, torch.rand(3, 1, 4, 4), target=0, steps=50, perturbations_per_eval=2)
    assert max(counter.sizes) == 6
    # 153 masked images and one as it is, six at a time.
    assert 3 + 3 * 51 <= counter.rows <= 3 + 6 * 26
    assert few.shape == (3,)


def test_progress_counts_every_step(net: SmallNet, images: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    insertion(net, images, torch.rand(3, 1, 4, 4), target=0, steps=10, show_progress=True)
    shown = capsys.readouterr().err
    assert "Insertion" in shown
    assert "33/33" in shown or "34/34" in shown


@pytest.mark.parametrize("metric", [insertion, deletion])
def test_refuses_steps_below_one(metric: Any, net: SmallNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match="steps is 0; expected at least 1"):
        metric(net, images, torch.rand(3, 1, 4, 4), target=0, steps=0)
