from itertools import cycle
from typing import Any

import pytest
import torch
from captum.attr import (
    GuidedGradCam,
    IntegratedGradients,
    LayerGradCam,
    LayerGradientXActivation,
    Occlusion,
    Saliency,
)
from torch import Tensor

from captum_fusion import LayerFusionCam
from captum_fusion.metrics import confidence_drop, confidence_increase, deletion, insertion
from tests.conftest import SmallNet
from tests.methods import KINDS

METRICS = [confidence_drop, confidence_increase, insertion, deletion]


def two_pixels(x: Tensor) -> Tensor:
    """The probability of class 0 is 0.2 + 0.4 left + 0.3 right."""
    first = 0.2 + 0.4 * x[:, 0, 0] + 0.3 * x[:, 0, 1]
    return torch.stack([first, 1 - first], dim=1)


def test_worked_out_by_hand() -> None:
    # P(x) = 0.9. Masks: left alone keeps 0.6, right alone 0.5, the right one and half of the left one 0.7.
    x = torch.ones(3, 1, 2)
    attributions = torch.tensor([[[1.0, 0.0]], [[0.0, 5.0]], [[0.5, 1.0]]])
    attributions = torch.cat([attributions, torch.tensor([[[0.5, 1.0]]])])
    x = torch.ones(4, 1, 2)
    x[3, 0, 0] = -1  # P(x) = 0.1; keeping the right pixel alone raises it.
    drop = confidence_drop(two_pixels, x, attributions, target=0, activation=None)
    torch.testing.assert_close(drop, torch.tensor([3 / 9, 4 / 9, 4 / 9, 0.0]))
    increase = confidence_increase(two_pixels, x, attributions, target=0, activation=None)
    assert increase.tolist() == [0, 0, 0, 1]


def test_baselines_fill_what_is_masked() -> None:
    x = torch.ones(1, 1, 2)
    left = torch.tensor([[[1.0, 0.0]]])
    drop = confidence_drop(two_pixels, x, left, baselines=0.5, target=0, activation=None)
    torch.testing.assert_close(drop, torch.tensor([0.15 / 0.9]))


def test_all_ones_lose_and_gain_nothing(net: SmallNet, images: Tensor) -> None:
    ones = torch.ones_like(images)
    assert confidence_drop(net, images, ones, target=1).eq(0).all()
    assert confidence_increase(net, images, ones, target=1).eq(0).all()


@pytest.mark.parametrize(("first", "perturbations_per_eval"), [(0, 1), (1, 2), (0, None), (1, None)])
def test_all_ones_gain_nothing_where_rounding_differs_from_pass_to_pass(
    first: int, perturbations_per_eval: int | None, net: SmallNet, images: Tensor
) -> None:
    """As from batch size to batch size, or on a GPU; logits of 100 carry it into small probabilities."""
    passes = first

    def forward(x: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return (60 * net(x)) * (1 + 1e-4 * (passes % 2))

    for target in range(3):
        increase = confidence_increase(
            forward, images, torch.ones_like(images), target=target, perturbations_per_eval=perturbations_per_eval
        )
        assert increase.eq(0).all()


def test_a_probability_of_zero_has_nothing_to_lose() -> None:
    def never(x: Tensor) -> Tensor:
        return torch.stack([0 * x[:, 0, 0], 1 + 0 * x[:, 0, 0]], dim=1)

    assert confidence_drop(never, torch.ones(1, 1, 2), torch.ones(1, 1, 2), target=0, activation=None).item() == 0


@pytest.mark.parametrize("metric", METRICS)
def test_positive_scaling_changes_nothing(metric: Any, net: SmallNet, images: Tensor) -> None:
    attributions = LayerGradCam(net, net.features).attribute(images, target=0)
    torch.testing.assert_close(
        metric(net, images, attributions, target=0), metric(net, images, 64 * attributions, target=0)
    )


@pytest.mark.parametrize(("metric", "target"), zip(METRICS, cycle([2, [0, 1, 2], torch.tensor([2, 1, 0])])))
def test_a_batch_equals_one_by_one(metric: Any, target: Any, net: SmallNet, images: Tensor) -> None:
    attributions = LayerFusionCam(net, net.features).attribute(images, target=target)
    baselines = torch.rand_like(images)
    together = metric(net, images, attributions, baselines, target=target)
    assert together.shape == (3,)
    for example in range(3):
        one = slice(example, example + 1)
        alone = metric(
            net,
            images[one],
            attributions[one],
            baselines[one],
            target=target if isinstance(target, int) else target[example],
        )
        torch.testing.assert_close(alone, together[one], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.filterwarnings("ignore::UserWarning:captum")
def test_every_kind_of_attribution_is_judged(metric: Any, net: SmallNet, images: Tensor) -> None:
    of_layer = [method(net, net.features) for method in (*KINDS, LayerGradientXActivation, GuidedGradCam)]
    for attributions in (
        *(method.attribute(images, target=0) for method in of_layer),
        Saliency(net).attribute(images, target=0),
        IntegratedGradients(net).attribute(images, target=0, n_steps=4),
        Occlusion(net).attribute(images, (3, 6, 5), target=0, strides=(3, 6, 5)),
    ):
        for sign in ("positive", "absolute_value"):
            values = metric(net, images, attributions, target=0, sign=sign)
            assert values.shape == (3,)
            assert values.ge(0).all()
            assert values.le(1).all()


@pytest.mark.parametrize("metric", METRICS)
def test_several_inputs_and_additional_arguments(metric: Any, net: SmallNet, images: Tensor) -> None:
    def forward(first: Tensor, table: Tensor, second: Tensor, scale: Tensor, power: int) -> Tensor:
        return (net(first) + net(second) + table) * scale.view(-1, 1) ** power

    inputs = (images, torch.randn(3, 3), torch.rand(3, 3, 16, 16))
    scale = torch.rand(3) + 0.5
    maps = (torch.rand(3, 1, 4, 4), None, torch.rand(3, 3, 16, 16))
    arguments = {"additional_forward_args": (scale, 2), "target": [0, 1, 2]}
    together = metric(forward, inputs, maps, **arguments)
    for example in range(3):
        one = slice(example, example + 1)
        alone = metric(
            forward,
            tuple(value[one] for value in inputs),
            tuple(None if value is None else value[one] for value in maps),
            additional_forward_args=(scale[one], 2),
            target=example,
        )
        torch.testing.assert_close(alone, together[one], atol=1e-5, rtol=1e-5)
    # One map serves every image.
    shared = metric(forward, inputs, maps[0], **arguments)
    torch.testing.assert_close(shared, metric(forward, inputs, (maps[0], None, maps[0]), **arguments))


@pytest.mark.parametrize("metric", METRICS)
def test_refuses(metric: Any, net: SmallNet, images: Tensor) -> None:
    maps = torch.rand(3, 1, 4, 4)
    for attributions, message in [
        (maps[:2], r"shape \(2, 1, 4, 4\) for inputs of shapes .*number of examples"),
        (maps[..., 0], r"shape \(3, 1, 4\) for inputs of shapes"),
        (torch.nan * maps, "hold NaN in 3 of 3 examples"),
        ((None,), "at least one such attribution"),
        ((maps, maps), "expected for each input"),
    ]:
        with pytest.raises(ValueError, match=message):
            metric(net, images, attributions, target=0)
    for options, message in [
        ({"activation": "relu"}, "activation is 'relu'; expected one of"),
        ({"sign": "both"}, "sign is 'both'; expected one of"),
        ({"perturbations_per_eval": 0}, "perturbations_per_eval is 0; expected at least 1"),
        ({"target": 7}, "target 7 .*does not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            metric(net, images, maps, **{"target": 0} | options)
