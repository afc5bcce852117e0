"""Scores and maps for which a softmax, a drop or an order is not defined."""

from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.tv_tensors import BoundingBoxes

from captum_fusion import (
    LayerHiResCam,
)
from captum_fusion.functional import (
    contribution_weights,
    normalize,
    weighted,
)
from captum_fusion.metrics import (
    complexity,
    confidence_drop,
    deletion,
    energy_pointing_game,
    insertion,
    instances_reached,
    pointing_game,
    saliency_map,
)
from tests.assumptions.networks import cnn


def test_probabilities_are_told_to_use_no_activation() -> None:
    net, x = nn.Sequential(cnn(), nn.Softmax(1)).eval(), torch.rand(2, 3, 8, 8)
    maps = torch.rand(2, 1, 8, 8)
    with pytest.warns(UserWarning, match="Pass activation=None for probabilities"):
        insertion(net, x, maps, target=1, steps=2)
    insertion(net, x, maps, target=1, steps=2, activation=None)


def test_any_activation_of_probabilities_is_warned_of_however_few_they_are() -> None:
    """A softmax or sigmoid is seen when it is computed; logits in [0, 1] and log-probabilities are none."""
    x = torch.rand(1, 3, 8, 8)
    maps = torch.rand(1, 1, 8, 8)

    def labels(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0].mean((1, 2)), x[:, 1].mean((1, 2))], dim=1)

    def probability(x: Tensor) -> Tensor:
        return labels(x).sigmoid()[:, 0]

    for forward_func, target, activation in (
        (probability, None, "sigmoid"),
        (lambda x: labels(x).sigmoid(), 1, "sigmoid"),
        (lambda x: labels(x).sigmoid(), 1, "softmax"),
        (lambda x: labels(x).repeat(1, 4), 1, "sigmoid"),
        # An average that rounding takes above 1.
        (lambda x: torch.cat([labels(x).repeat(1, 4), torch.full((len(x), 1), 1.000001)], dim=1), 1, "sigmoid"),
    ):
        options: dict[str, Any] = {"target": target, "steps": 2}
        with pytest.warns(UserWarning, match=f"the {activation} is applied to them. Pass activation=None"):
            insertion(forward_func, x, maps, activation=activation, **options)
        insertion(forward_func, x, maps, activation=None, **options)
    insertion(labels, x, maps, target=1, steps=2, activation="sigmoid")
    insertion(lambda x: labels(x).log_softmax(1), x, maps, target=1, steps=2)
    insertion(lambda x: labels(x).sigmoid() * 3, x, maps, target=1, steps=2)


@pytest.mark.parametrize(
    ("size", "shape", "known"),
    [
        ((8, 12), (4,), True),
        ((8, 12), (4, 1, 1), True),
        ((8, 12), (4, 8, 12), True),
        ((8, 12), (3, 6, 10), True),
        ((9, 13), (4, 3, 5), True),
        ((8, 12), (3, 5), False),
        ((8, 12), (8, 12, 4), False),
        ((8, 12), (4, 6, 5), False),
        ((8, 8), (8, 8, 8), False),
        ((12,), (4, 12), True),
        ((12,), (3, 4), False),
        ((12,), (12, 4), False),
        ((12,), (12, 12), False),
    ],
)
def test_the_softmax_is_over_classes_that_are_known_to_be_classes(size: Any, shape: Any, known: bool) -> None:
    def forward(x: Tensor) -> Tensor:
        return x.flatten(1).mean(1).reshape(-1, *(1,) * len(shape)) * torch.arange(prod(shape)).reshape(shape)

    x, maps, target = torch.rand(1, 3, *size), torch.rand(1, 1, *size), (1, *(0,) * (len(shape) - 1))
    if known:
        found = confidence_drop(forward, x, saliency_map(maps, size), target=target)
        whole, masked = (forward(y).softmax(1)[(0, *target)] for y in (x, x * saliency_map(maps, size)))
        torch.testing.assert_close(found[0], torch.relu(whole - masked) / whole)
    else:
        with pytest.raises(ValueError, match="may have its classes in another one"):
            confidence_drop(forward, x, maps, target=target)


def test_a_drop_of_negative_scores_is_refused_and_zero_has_no_sign() -> None:
    def forward(x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))

    x, maps = torch.rand(2, 3, 4, 4), torch.ones(2, 1, 4, 4)
    with pytest.raises(ValueError, match="expected probabilities, which are not negative"):
        confidence_drop(lambda x: forward(x) - 1, x, maps, activation=None)
    assert not confidence_drop(forward, x, maps, activation=None).signbit().any()


def test_no_zero_has_a_sign() -> None:
    zeros, minus = torch.zeros(1, 1, 2, 2), -torch.ones(1, 1)
    net = cnn()
    results = [
        weighted(zeros, minus),
        normalize(torch.tensor([[[-0.0, 0.0, 1.0]]])),
        saliency_map(torch.tensor([[[0.0, 2.0, 1.0]]]), (3,), "negative"),
        *contribution_weights(torch.zeros(1), minus[0], "released"),
        LayerHiResCam(net, net[1]).attribute(torch.rand(2, 3, 8, 8), target=1, attr_dim_summation=False),
    ]
    for result in results:
        assert not result[result == 0].signbit().any()


@pytest.mark.parametrize("metric", [confidence_drop, insertion, deletion])
def test_an_input_without_attributions_is_left_as_it_is_in_a_batch_as_alone(metric: Any) -> None:
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([4 * a.mean((1, 2, 3)) + 8 * b.mean((1, 2, 3)), torch.zeros(len(a))], dim=1)

    a, b = torch.rand(2, 2, 3, 8, 8)
    of_a, of_b = torch.rand(2, 2, 1, 8, 8)
    of_b[0] = 0
    batch = metric(forward, (a, b), (of_a, of_b), target=0)
    alone = [
        metric(forward, (a[i : i + 1], b[i : i + 1]), (of_a[i : i + 1], of_b[i : i + 1]), target=0) for i in (0, 1)
    ]
    torch.testing.assert_close(batch, torch.cat(alone))


@pytest.mark.parametrize("metric", [pointing_game, energy_pointing_game, instances_reached])
def test_boxes_of_any_format_and_container(metric: Any) -> None:
    maps = torch.zeros(1, 1, 8, 8)
    maps[0, 0, 6, 6] = 1
    formats = {"XYXY": [5, 4, 7, 8], "XYWH": [5, 4, 2, 4], "CXCYWH": [6, 6, 2, 4]}
    regions: list[Any] = [BoundingBoxes([v], format=name, canvas_size=(8, 8)) for name, v in formats.items()]
    regions += [[[5, 4, 7, 8]], [(5, 4, 7, 8)], np.array([[5, 4, 7, 8]])]
    mask = np.zeros((1, 8, 8), dtype=bool)
    mask[0, 6, 6] = True
    for region in [*regions, mask]:
        assert metric(maps, [region]).item() == 1
    for given in (["box"], [{"box": 1}], 5, "boxes"):
        with pytest.raises(TypeError, match="region"):
            metric(maps, given)
    with pytest.raises(TypeError, match="attributions are a ndarray"):
        metric(maps.numpy(), [mask])


@pytest.mark.parametrize("of_map", [complexity, lambda maps: saliency_map(maps, (4, 4))])
def test_maps_that_are_no_tensors_of_real_numbers_are_refused(of_map: Any) -> None:
    for maps in (np.zeros((1, 1, 4, 4)), None):
        with pytest.raises(TypeError, match="attributions are a"):
            of_map(maps)
    for tensor in (torch.rand(4, 4), torch.rand(1, 1, 4, 4) + 0j):
        with pytest.raises(ValueError, match="attributions have shape"):
            of_map(tensor)
