"""One picture explained from Python."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from PIL import Image
from torch import Tensor, nn

from captum_fusion import LayerFusionCam
from captum_fusion.explain import explain
from captum_fusion.metrics import saliency_map
from tests.conftest import SmallNet

MEAN, STD = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)


@pytest.fixture
def photograph() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def test_it_is_what_the_classes_give(net: SmallNet, photograph: Image.Image) -> None:
    explanation = explain(
        photograph, model=net, target=2, methods=["Grad-CAM", "fusion-cam:raw"], size=24, mean=MEAN, std=STD
    )
    assert (explanation.model, explanation.layer, explanation.weights) == ("SmallNet", "relu", "default")
    assert (explanation.target, explanation.category) == (2, "2")
    assert list(explanation.maps) == list(explanation.kept) == ["grad-cam", "fusion-cam:raw"]
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    inputs = (explanation.pixels - mean) / std
    with torch.no_grad():
        probabilities = net(inputs).softmax(1)[0]
    torch.testing.assert_close(explanation.probabilities, probabilities)
    assert explanation.probability == pytest.approx(probabilities[2].item())
    assert [index for index, _, _ in explanation.top(2)] == probabilities.argsort(descending=True)[:2].tolist()
    grad_cam = saliency_map(LayerGradCam(net, net.relu).attribute(inputs, target=2), (24, 24))
    torch.testing.assert_close(explanation.maps["grad-cam"], grad_cam)
    fused, stages = LayerFusionCam(net, net.relu).attribute(inputs, target=2, weighting="raw", return_stages=True)
    torch.testing.assert_close(explanation.maps["fusion-cam:raw"], fused[:, :1])
    kept = explanation.stages["fusion-cam:raw"]
    torch.testing.assert_close(kept.denoised, stages.denoised)
    torch.testing.assert_close(kept.region_contribution, stages.region_contribution)
    for name, values in explanation.maps.items():
        with torch.no_grad():
            remains = net(inputs * values).softmax(1)[0, 2].item()
        assert explanation.kept[name] == pytest.approx(remains, abs=1e-6)
    assert explanation.notes == ()


def test_without_methods_the_stages_of_fusion_cam(net: SmallNet, photograph: Image.Image) -> None:
    explanation = explain(photograph, model=net, size=24)
    assert list(explanation.maps) == ["Grad-CAM", "Denoised Grad-CAM", "Score-CAM", "Combined", "Fusion-CAM"]
    assert explanation.target == explanation.probabilities.argmax()
    assert explanation.maps["Combined"] is explanation.stages["fusion-cam"].combined
    # The picture is resized to 36 by 27 pixels, of which 24 by 24 from 6 and 2 (half of 3, to even) are seen.
    assert explanation.frame == pytest.approx((6 * 40 / 36, 2 * 30 / 27, 30 * 40 / 36, 26 * 30 / 27))


@pytest.mark.parametrize("method", ["score-cam", "union-cam", "fusion-cam", "fusion(grad-cam,score-cam)"])
def test_score_cam_within_a_tolerance_alone_or_fused(photograph: Image.Image, method: str) -> None:
    model = SmallNet(channels=150).eval()
    rows = 0

    def count(_: object, args: tuple[Tensor, ...]) -> None:
        nonlocal rows
        rows += len(args[0])

    model.register_forward_pre_hook(count)
    exact = explain(photograph, model=model, layer="features", size=24, methods=[method])
    all_rows, rows = rows, 0
    quick = explain(photograph, model=model, layer="features", size=24, methods=[method], tolerance=0.1)
    assert rows < all_rows / 2
    (expected,), (found,) = exact.maps.values(), quick.maps.values()
    assert 0 < (expected - found).abs().max() < 0.2
    with pytest.raises(ValueError, match=r"tolerance is -1; expected a number in \[0, 1\)"):
        explain(photograph, model=model, tolerance=-1)


def test_a_model_that_is_given_stays_as_it_was(net: SmallNet, photograph: Image.Image) -> None:
    net.train()
    net.stem.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    explain(photograph, model=net, size=24, methods=["score-cam"])
    with pytest.raises(RuntimeError, match="group-cam fails"):
        explain(photograph, model=Failing(net), layer="net.relu", size=24, methods=["group-cam"])
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.equal(torch.get_rng_state(), state)


class Failing(nn.Module):
    """Fails where gradients are wanted."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise MemoryError("full")
        result: Tensor = self.net(x)
        return result


def test_it_takes_files_and_names(photograph: Image.Image, tmp_path: Path) -> None:
    photograph.save(tmp_path / "a.png")
    options: dict[str, Any] = {"model": "tests.test_cli:small_net", "size": 24, "methods": ["grad-cam"]}
    from_file = explain(str(tmp_path / "a.png"), **options)
    assert from_file.image == str(tmp_path / "a.png")
    torch.testing.assert_close(from_file.maps, explain(photograph, **options).maps)
    assert from_file.model == "tests.test_cli:small_net"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "none"}, "weights is 'none' for a model that is given itself"),
        ({"device": "cpu"}, "device is 'cpu' for a model that is given itself"),
        ({"layer": "head"}, "'head' gives shape"),
        ({"target": 3}, "target is 3; expected an index below 3"),
        ({"target": -1}, "target is '-1', but SmallNet has no category names"),
        ({"methods": ["gradcom"]}, "no method 'gradcom'. Close: grad-cam"),
    ],
)
def test_what_cannot_be(net: SmallNet, photograph: Image.Image, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(photograph, model=net, **{"size": 24, **options})
