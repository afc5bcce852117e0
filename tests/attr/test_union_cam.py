import numpy as np
import pytest
import torch
from torch import Tensor

from captum_fusion import LayerFusionCam, LayerUnionCam
from tests import straight_line
from tests.cases import NAMES, TARGETS, case
from tests.conftest import SmallNet


# Each network with another percentile; tests/test_fuzz.py draws them for small networks.
@pytest.mark.parametrize(("name", "percentile"), [*zip(NAMES, (60.0, 0.0, 10.0), strict=True)])
def test_equals_the_straight_line_computation(name: str, percentile: float) -> None:
    model, layer, images, _, score_cams = case(name)
    attributions = LayerUnionCam(model, layer).attribute(images, target=TARGETS, percentile=percentile)
    assert attributions.shape == images.shape
    for example, (x, target) in enumerate(zip(images.split(1), TARGETS, strict=True)):
        activations, gradients = straight_line.activations_and_gradients(model, layer, x, target)
        region = straight_line.region_component(score_cams[example], tuple(x.shape[2:]))
        with torch.no_grad():
            probability = straight_line.probability(model, target)
            expected, _ = straight_line.union_cam(
                activations, gradients, region, probability, x, torch.zeros_like(x), percentile
            )
        for channel in attributions[example]:
            np.testing.assert_allclose(channel, expected, atol=1e-5)


def test_both_choices_occur(net: SmallNet, images: Tensor) -> None:
    chosen = set()
    for target in range(3):
        _, stages = LayerFusionCam(net, net.features).attribute(images, target=target, return_stages=True)
        union = LayerUnionCam(net, net.features).attribute(images, target=target)[:, :1]
        chosen |= set(union.eq(stages.region).flatten(1).all(dim=1).tolist())
    assert chosen == {True, False}


def test_a_constant_layer_gives_maps_of_zeros(net: SmallNet, images: Tensor) -> None:
    with torch.no_grad():
        net.features.weight.zero_()
    assert LayerUnionCam(net, net.features).attribute(images, target=0).eq(0).all()


def test_refuses_a_percentile_out_of_range(net: SmallNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"percentile is 100; expected a number in \[0, 100\)"):
        LayerUnionCam(net, net.features).attribute(images, target=0, percentile=100)
