"""Values at the edge of the floating-point range, and weights computed from others."""

from typing import Any

import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from captum_fusion import (
    LayerEigenCam,
    LayerFinerCam,
    LayerGradCamPlusPlus,
    LayerGroupCam,
    LayerScoreCam,
    Rise,
)
from captum_fusion._engine.surrogate import Surrogate
from captum_fusion.functional import (
    gaussian_blur,
    random_masks,
)
from captum_fusion.metrics import (
    saliency_map,
    weight_randomization,
)
from tests.assumptions.networks import cnn


class Needy(nn.Linear):
    """Its parameters cannot be reset without an argument."""

    def reset_parameters(self, gain: float | None = None) -> None:
        if gain is None:
            super().reset_parameters()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm],
    ids=["hooked weight", "hooked spectral", "weight", "spectral"],
)
def test_weights_that_are_made_of_others_are_randomized(wrap: Any) -> None:
    net = cnn()
    net[0] = wrap(net[0])
    net.eval()
    x = torch.rand(1, 3, 8, 8)
    net(x)
    before, weights = net[0].weight.detach().clone(), []
    net[0].register_forward_hook(lambda module, *_: weights.append(module.weight.detach().clone()))
    found = weight_randomization(LayerGradCam(net, net[1]), x, target=1, randomization="independent")
    assert list(found) == ["4", "0"]
    assert not torch.allclose(weights[-1], before, atol=1e-2)
    assert torch.equal(net[0].weight, before)


def test_parameters_that_stay_are_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    with pytest.warns(UserWarning, match="did not change the weights of '1'"):
        weight_randomization(LayerGradCam(net, net[2]), torch.rand(1, 3, 8, 8), target=1)


def test_the_regression_is_the_same_at_any_scale_and_under_autocast() -> None:
    maps = torch.relu(torch.randn(60, 5, 5, generator=torch.Generator().manual_seed(0)))
    scores = torch.linspace(-1, 1, 60)[:, None]

    def weights(scale: float) -> Tensor:
        surrogate = Surrogate(maps * scale, torch.zeros(1), torch.ones(1), 0.05)
        for _ in range(3):
            channels = surrogate.propose()
            surrogate.observe(channels, scores[channels])
        assert surrogate.errors.isfinite().all()
        return surrogate.weights

    expected = weights(1.0)
    for scale in (2.0**100, 2.0**-100):
        torch.testing.assert_close(weights(scale), expected)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(weights(1.0), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_masks_and_blurs_are_the_same_at_any_precision_of_the_caller() -> None:
    grids, shifts, images = (torch.rand(3, 1, 7, 7) > 0.5).float(), torch.rand(3, 2), torch.rand(2, 3, 40, 40)
    rise = Rise(lambda x: x.mean((2, 3)), samples=8, activation=None)

    def results() -> list[Tensor]:
        masks = random_masks(grids, shifts, (40, 40))
        return [masks, gaussian_blur(images, 11, 5.0), rise.attribute(images, target=1)]

    expected, before = results(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for found, right in zip(results(), expected, strict=True):
                assert torch.equal(found, right)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_estimate_that_is_no_number_is_not_0() -> None:
    maps = torch.relu(torch.randn(40, 5, 5, generator=torch.Generator().manual_seed(0)))
    surrogate = Surrogate(maps, torch.zeros(1), torch.full((1,), 3e38), 0.3)
    channels = surrogate.propose()
    surrogate.observe(channels, torch.full((len(channels), 1), -3e38))
    assert surrogate.errors.item() == 1


def test_classes_that_are_ruled_out_are_no_references() -> None:
    net, x = cnn(), torch.rand(1, 3, 8, 8)

    def ruled_out(x: Tensor) -> Tensor:
        return net(x).masked_fill(torch.tensor([False, False, True, False]), -torch.inf)

    found = LayerFinerCam(ruled_out, net[1]).attribute(x, target=1)
    torch.testing.assert_close(found, LayerFinerCam(lambda x: net(x)[:, [0, 1, 3]], net[1]).attribute(x, target=1))


@pytest.mark.parametrize("algorithm", [LayerGradCamPlusPlus, LayerScoreCam, LayerEigenCam, LayerGroupCam])
@pytest.mark.parametrize("part", ["activations", "gradients"])
def test_a_layer_that_holds_no_numbers_is_refused(algorithm: Any, part: str) -> None:
    net, layer = cnn(), nn.Identity()

    def forward(x: Tensor) -> Tensor:
        features = net[:2](x)
        if part == "activations":
            return net[2:](layer(features.log()).nan_to_num(0, 0, 0))
        return net[2:](layer(features * 0).sqrt())

    if part == "gradients" and algorithm in (LayerScoreCam, LayerEigenCam):
        assert algorithm(forward, layer).attribute(torch.rand(1, 3, 8, 8), target=1).isfinite().all()
        return
    with pytest.raises(RuntimeError, match=f"The layer's {part} hold NaN or infinity for 1 of 1 examples"):
        algorithm(forward, layer).attribute(torch.rand(1, 3, 8, 8), target=1)


@pytest.mark.parametrize("value", [torch.inf, 3e38])
def test_attributions_without_an_order_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="attributions hold infinity, or overflow"):
        saliency_map(torch.full((1, 3, 4, 4), value), (4, 4))
