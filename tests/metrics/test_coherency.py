from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam, Saliency
from torch import Tensor

from captum_fusion import LayerFusionCam
from captum_fusion.functional import correlation
from captum_fusion.metrics import adcc, arcc, coherency, complexity, confidence_drop, road, saliency_map
from tests.conftest import SmallNet


def test_complexity_worked_out_by_hand() -> None:
    attributions = torch.tensor([[[0.0, 1.0, 4.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]], [[2.0, 2.0, 2.0, 2.0]]])
    assert complexity(attributions).tolist() == [0.3125, 0, 1]
    assert complexity(-attributions, sign="negative").tolist() == [0.3125, 0, 1]


def test_coherency_worked_out_by_hand() -> None:
    # What is kept of (4, 2, 0) by its own map (1, 1/2, 0) is (4, 1, 0), whose map is (1, 1/4, 0).
    x = torch.tensor([[[4.0, 2.0, 0.0]]])
    r = np.corrcoef([1, 0.5, 0], [1, 0.25, 0])[0, 1]
    found = coherency(lambda inputs, **_: inputs, x, x)
    torch.testing.assert_close(found, torch.tensor([(1 + r) / 2], dtype=torch.float32))
    # By a baseline of 4 what is masked comes back: (4, 3, 4), whose map is (1, 0, 1).
    r = np.corrcoef([1, 0.5, 0], [1, 0, 1])[0, 1]
    found = coherency(lambda inputs, **_: inputs, x, x, baselines=4)
    torch.testing.assert_close(found, torch.tensor([(1 + r) / 2], dtype=torch.float32))


@pytest.mark.parametrize(("again", "expected"), [(1, 1.0), (-1, 0.0), (0, 0.5)])
def test_the_same_map_the_opposite_one_and_none(again: int, expected: float) -> None:
    x = torch.tensor([[[1.0, 0.5, 0.0]]])
    found = coherency(lambda *_, **__: again * x, x, x, sign="all")
    assert found.item() == pytest.approx(expected)


def test_a_constant_map_that_stays_is_coherent() -> None:
    x = torch.ones(1, 1, 4)
    assert coherency(lambda *_, **__: x, x, x).item() == 1
    assert coherency(lambda *_, **__: torch.tensor([[[0.0, 1.0, 0.0, 0.0]]]), x, x).item() == 0.5


def test_correlation_is_numpys() -> None:
    first, second = torch.randn(2, 3, 50)
    for found, a, b in zip(correlation(first, second), first, second, strict=True):
        assert found.item() == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)


@pytest.mark.parametrize("layers", [False, True])
def test_equals_the_computation_in_single_steps(layers: bool, net: SmallNet, images: Tensor) -> None:
    method = LayerGradCam(net, net.features) if layers else LayerFusionCam(net, net.features)
    attributions = method.attribute(images, target=[0, 1, 2])
    coherent = coherency(method, images, attributions, target=[0, 1, 2])
    covered = complexity(attributions, (12, 10))
    drop = confidence_drop(net, images, attributions, target=[0, 1, 2])
    together = adcc(net, method, images, attributions, target=[0, 1, 2])
    removed = road(net, images, attributions, target=[0, 1, 2], fractions=[0.2, 0.4, 0.6, 0.8])
    imputed = arcc(net, method, images, attributions, target=[0, 1, 2])
    for example in range(3):
        x = images[example : example + 1]
        mask = saliency_map(attributions[example : example + 1], (12, 10))
        again = saliency_map(method.attribute(mask * x, target=example), (12, 10))
        r = np.corrcoef(mask.detach().flatten(), again.detach().flatten())[0, 1]
        assert coherent[example].item() == pytest.approx((1 + r) / 2, abs=1e-5)
        assert covered[example].item() == pytest.approx(float(mask.sum()) / 120, abs=1e-6)
        parts = [1 - drop[example].item(), coherent[example].item(), 1 - covered[example].item()]
        expected = 3 / sum(1 / part for part in parts) if min(parts) > 0 else 0
        assert together[example].item() == pytest.approx(expected, abs=1e-5)
        parts[0] = min(max(2 * removed[example].item(), 0), 1)
        expected = 3 / sum(1 / part for part in parts) if min(parts) > 0 else 0
        assert imputed[example].item() == pytest.approx(expected, abs=1e-5)


def test_every_kind_of_explanation_is_taken(net: SmallNet, images: Tensor) -> None:
    saliency = Saliency(net)
    attributions = saliency.attribute(images, target=1)
    expected = coherency(saliency, images, attributions, target=1)
    assert torch.equal(coherency(saliency.attribute, images, attributions, target=1), expected)
    signed = coherency(saliency, images, attributions, target=1, explanation_kwargs={"abs": False})
    assert not torch.equal(signed, expected)

    def forward(x: Tensor, table: Tensor, power: int) -> Tensor:
        return net(x) * table**power

    table = torch.rand(3, 3)
    grad_cam = LayerGradCam(forward, net.features)
    arguments: dict[str, Any] = {"target": 1, "additional_forward_args": 2}
    maps = grad_cam.attribute((images, table), **arguments)
    found = coherency(grad_cam, (images, table), maps, **arguments)
    assert found.shape == (3,)
    assert adcc(forward, grad_cam, (images, table), maps, **arguments).shape == (3,)


def test_nothing_is_left_changed(images: Tensor) -> None:
    attributions = torch.rand_like(images)
    before = images.clone(), torch.get_rng_state()

    def explain(inputs: Tensor, target: int) -> Tensor:
        inputs.mul_(2)
        return inputs * torch.rand_like(inputs) * target

    coherency(explain, images, attributions, target=1)
    assert torch.equal(images, before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_refuses(net: SmallNet, images: Tensor) -> None:
    grad_cam = LayerGradCam(net, net.features)
    with pytest.raises(ValueError, match="sign is 'both'; expected one of"):
        coherency(grad_cam, images, images, target=0, sign="both")
    with pytest.raises(TypeError, match="cannot be masked"):
        coherency(grad_cam, (255 * images).long(), images, target=0)
    with pytest.raises(ValueError, match=r"attributions have shape \(2, 3, 12, 10\)"):
        adcc(net, grad_cam, images, images[:2], target=0)
