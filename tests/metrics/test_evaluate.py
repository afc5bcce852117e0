"""Several metrics at once are the metrics one by one, from fewer passes."""

import pytest
import torch
from torch import Tensor

from captum_fusion.metrics import confidence_drop, confidence_increase, deletion, evaluate, insertion, road
from tests.conftest import Counter, SmallNet

pytestmark = pytest.mark.every_device


@pytest.mark.parametrize("options", [{}, {"baselines": 0.5, "sign": "absolute_value", "activation": "sigmoid"}])
def test_evaluate_is_the_metrics_one_by_one(net: SmallNet, images: Tensor, options: dict[str, object]) -> None:
    counter, maps = Counter(net), torch.randn_like(images)
    values = evaluate(counter, images, maps, target=1, steps=5, **options)
    assert len(counter.sizes) == 1 + 1 + 2 + 1, "the unmasked pass, the masked one, two curves, and both orders of ROAD"
    how = {"target": 1, **options}
    for name, metric in (("confidence_drop", confidence_drop), ("confidence_increase", confidence_increase)):
        torch.testing.assert_close(values.pop(name), metric(net, images, maps, **how))
    for name, curve in (("insertion", insertion), ("deletion", deletion)):
        area, _, probabilities = curve(net, images, maps, **how, steps=5, return_curve=True)
        torch.testing.assert_close(values.pop(name), area)
        torch.testing.assert_close(values.pop(f"{name}_curve"), probabilities)
    how.pop("baselines", None)
    for name, order in (("road", "combined"), ("road_most", "most"), ("road_least", "least")):
        torch.testing.assert_close(values.pop(name), road(net, images, maps, **how, order=order))
    assert not values


def test_metrics_are_computed_as_asked(net: SmallNet, images: Tensor) -> None:
    assert list(evaluate(net, images, images, ["deletion"], target=1, steps=2)) == ["deletion", "deletion_curve"]
    for metrics in ("deletion", ["drop"]):
        with pytest.raises(ValueError, match="expected some of"):
            evaluate(net, images, images, metrics, target=1)
