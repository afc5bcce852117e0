"""Reduced precision and compiled models."""

from typing import Any

import pytest
import torch
from torch import Tensor

from captum_fusion import LayerFusionCam, LayerScoreCam
from captum_fusion.functional import gaussian_blur
from captum_fusion.metrics import insertion
from tests.conftest import SmallNet

METHODS = [LayerScoreCam, LayerFusionCam]


def correlation(first: Tensor, second: Tensor) -> float:
    return torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()


@pytest.mark.parametrize("method", METHODS)
def test_autocast_gives_float32_maps(net: SmallNet, images: Tensor, method: type[LayerScoreCam]) -> None:
    exact = method(net, net.features).attribute(images, target=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(images).dtype == torch.bfloat16
        attributions = method(net, net.features).attribute(images, target=0)
    assert attributions.dtype == torch.float32
    assert correlation(attributions, exact) > 0.99


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision_give_float32_maps(
    net: SmallNet, images: Tensor, method: type[LayerScoreCam], dtype: torch.dtype
) -> None:
    exact = method(net, net.features).attribute(images, target=0)
    net.to(dtype)
    attributions = method(net, net.features).attribute(images.to(dtype), target=0)
    assert attributions.dtype == torch.float32
    assert correlation(attributions, exact) > 0.99


@pytest.mark.parametrize("method", METHODS)
def test_double_precision_stays(net: SmallNet, images: Tensor, method: type[LayerScoreCam]) -> None:
    exact = method(net.double(), net.features).attribute(images.double(), target=0)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(method(net.float(), net.features).attribute(images, target=0), exact.float())


@pytest.mark.parametrize("how", ["a module", "in place", "a function"])
def test_a_compiled_model_explains_the_original_layer_with_one_number_of_rows(
    net: SmallNet, images: Tensor, how: str
) -> None:
    graphs, sizes = [], []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        graphs.append(graph)

        def run(*args: Tensor) -> tuple[Tensor, ...]:
            outputs = graph(*args)
            sizes.append(len(outputs[0]))
            return outputs

        return run

    expected = LayerFusionCam(net, net.features).attribute(images[:1], target=0)
    torch.compiler.reset()
    forward: Any = torch.compile(net if how == "a module" else net.forward, backend=backend)
    if how == "in place":
        net.compile(backend=backend)
        forward = net
    fusion_cam = LayerFusionCam(forward, net.features)
    if not hasattr(torch.compiler, "set_stance"):  # Before torch 2.6 the hooks cannot be made to run.
        forward(images)
        with pytest.raises(ValueError, match="a compiled model, whose hooks torch"):
            fusion_cam.attribute(images, target=0)
        return
    # Channels, two maps with the blank, and one map more: three scorings of three sizes.
    torch.testing.assert_close(fusion_cam.attribute(images[:1], target=0), expected)
    assert len(sizes) >= 3, "the masked passes were not compiled"
    assert len(set(sizes)) == 1
    assert len(graphs) == 1


def test_a_traced_copy_without_the_layer_is_refused(net: SmallNet, images: Tensor) -> None:
    traced = torch.jit.trace(net, images)
    with pytest.raises(ValueError, match=r"not a module of forward_func; .* A traced, exported"):
        LayerScoreCam(traced, net.features).attribute(images, target=0)
    with pytest.raises(ValueError, match=r"did not run in the forward pass"):
        LayerScoreCam(lambda x: traced(x), net.features).attribute(images, target=0)


def test_insertion_blurs_in_full_precision_under_autocast(net: SmallNet, images: Tensor) -> None:
    maps = torch.rand(3, 1, 4, 4)
    blurred = gaussian_blur(images, 11, 5.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            insertion(net, images, maps, target=0, steps=4), insertion(net, images, maps, blurred, target=0, steps=4)
        )
