"""Insertion, deletion and ROAD with a function that fills removed pixels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from captum_fusion.metrics import deletion, evaluate, insertion, road
from tests.conftest import SmallNet

pytestmark = pytest.mark.every_device

WEIGHTS = torch.tensor([0.1, 0.4, 0.2, 0.3])


def linear(x: Tensor) -> Tensor:
    """The score of class 0 is the weighted sum of four pixels."""
    first = x[:, 0] @ WEIGHTS.to(x)
    return torch.stack([first, 1 - first], dim=1)


def half_everywhere(inputs: Tensor, removed: Tensor) -> Tensor:
    """Changes its arguments in place, and the pixels that are not removed as well."""
    removed.fill_(True)
    return inputs.fill_(0.5)


def test_worked_out_by_hand() -> None:
    x, maps = torch.ones(1, 1, 4), WEIGHTS.reshape(1, 1, 4)
    options: dict[str, Any] = {"target": 0, "activation": None, "replace": half_everywhere}
    # The order is 0.4, 0.3, 0.2, 0.1; a removed pixel gives half of its weight.
    curve = {"steps": 4, "return_curve": True}
    removed = deletion(linear, x, maps, **curve, **options)[2]
    torch.testing.assert_close(removed, torch.tensor([[1.0, 0.8, 0.65, 0.55, 0.5]]))
    restored = insertion(linear, x, maps, **curve, **options)[2]
    torch.testing.assert_close(restored, torch.tensor([[0.5, 0.7, 0.85, 0.95, 1.0]]))
    # Without the first two, and without the last two.
    means = [road(linear, x, maps, fractions=[0.5], order=order, **options) for order in ("most", "least")]
    torch.testing.assert_close(torch.cat(means), torch.tensor([0.65, 0.85]))
    assert x.eq(1).all()


def test_the_function_takes_rows_in_the_layout_of_the_inputs(net: SmallNet, images: Tensor) -> None:
    maps = torch.rand(3, 1, 12, 10, device=images.device)
    expected = deletion(net, images, maps, 0.25, target=1, steps=7)
    shapes = set()

    def fill(inputs: Tensor, removed: Tensor) -> Tensor:
        shapes.add((inputs.shape[1:], removed.shape[1:], removed.dtype))
        return torch.where(removed, 0.25, inputs)

    torch.testing.assert_close(deletion(net, images, maps, target=1, steps=7, replace=fill), expected)
    last = images.movedim(1, -1).contiguous()
    values = deletion(
        lambda x: net(x.movedim(-1, 1)), last, maps.movedim(1, -1), target=1, steps=7, replace=fill, channel_dim=-1
    )
    torch.testing.assert_close(values, expected)
    assert shapes == {((3, 12, 10), (1, 12, 10), torch.bool), ((12, 10, 3), (12, 10, 1), torch.bool)}


def test_gradients_may_be_enabled(net: SmallNet, images: Tensor) -> None:
    """As an adversarial replacement needs them."""

    def step(inputs: Tensor, removed: Tensor) -> Tensor:  # noqa: ARG001
        with torch.enable_grad():
            inputs.requires_grad_()
            (gradient,) = torch.autograd.grad(net(inputs)[:, 1].sum(), inputs)
        return inputs - gradient.sign()

    lowered = deletion(net, images, images, target=1, steps=3, replace=step, return_curve=True)[2]
    assert (lowered[:, -1] < lowered[:, 0]).all()
    assert not images.requires_grad


def test_each_of_several_inputs_is_filled_by_itself(net: SmallNet, images: Tensor) -> None:
    maps = torch.rand_like(images)
    expected = insertion(net, images, maps, torch.zeros_like(images), target=1, steps=4)
    values = insertion(
        lambda x, y: net(x) + 0 * net(y), (images, images), (maps, None), target=1, steps=4, replace=fill_zeros
    )
    torch.testing.assert_close(values, expected)


def fill_zeros(inputs: Tensor, _: Tensor) -> Tensor:
    return torch.zeros_like(inputs)


def test_evaluate_passes_it_on(net: SmallNet, images: Tensor) -> None:
    names = ["insertion", "deletion", "road"]
    values = evaluate(net, images, images, ["confidence_drop", *names], 0.5, target=1, steps=3, replace=fill_zeros)
    for name, metric in zip(names, (insertion, deletion, road), strict=True):
        options = {} if metric is road else {"steps": 3}
        torch.testing.assert_close(values[name], metric(net, images, images, target=1, replace=fill_zeros, **options))


@pytest.mark.parametrize("metric", [insertion, deletion, road])
def test_refuses_what_is_no_replacement(metric: Any, net: SmallNet, images: Tensor) -> None:
    with pytest.raises(TypeError, match=r"replace is 0.5; expected a function"):
        metric(net, images, images, target=1, replace=0.5)
    for result in (None, images[:1, :1]):
        with pytest.raises(ValueError, match=r"replace returned .*; expected a tensor of the shape"):
            metric(net, images, images, target=1, replace=lambda *_, result=result: result)
    if metric is not road:
        with pytest.raises(ValueError, match="replace and baselines are both given"):
            metric(net, images, images, 0, target=1, replace=fill_zeros)
