"""Maps at the layer's resolution equal the straight-line computation."""

from collections.abc import Callable
from functools import partial
from itertools import cycle

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_fusion import (
    LayerAblationCam,
    LayerEigenCam,
    LayerEigenGradCam,
    LayerFEM,
    LayerGradCamElementWise,
    LayerGradCamPlusPlus,
    LayerHiResCam,
    LayerISCam,
    LayerKPCACam,
    LayerLayerCam,
    LayerScoreCam,
    LayerSegEigenCam,
    LayerXGradCam,
)
from tests import straight_line
from tests.cases import TARGETS, case
from tests.conftest import SmallNet

GRADIENT_CAMS = {
    LayerGradCamPlusPlus: straight_line.grad_cam_plus_plus,
    LayerXGradCam: straight_line.x_grad_cam,
    LayerLayerCam: straight_line.layer_cam,
    LayerHiResCam: straight_line.hi_res_cam,
    LayerGradCamElementWise: straight_line.grad_cam_element_wise,
    LayerEigenCam: straight_line.eigen_cam,
    LayerEigenGradCam: straight_line.eigen_grad_cam,
    LayerSegEigenCam: straight_line.seg_eigen_cam,
    LayerFEM: straight_line.fem,
    LayerKPCACam: straight_line.kpca_cam,
}


def expected_map(
    algorithm: Callable[..., LayerAttribution], model: nn.Module, layer: nn.Module, x: Tensor, target: int, by: float
) -> straight_line.Array:
    activations, gradients = straight_line.activations_and_gradients(model, layer, x, target)
    score, baseline = straight_line.logit(model, target), torch.full_like(x, by)
    with torch.no_grad():
        if algorithm is LayerAblationCam:
            return straight_line.ablation_cam(model, layer, x, target, activations)
        if algorithm is LayerScoreCam:
            return straight_line.score_cam(activations, score, x, baseline)
        if isinstance(algorithm, partial):
            return straight_line.is_cam(activations, score, x, baseline, algorithm.keywords["samples"])
        return GRADIENT_CAMS[algorithm](activations, gradients)


# tests/test_fuzz.py draws small networks of one to three axes.
@pytest.mark.parametrize(
    ("algorithm", "name"),
    # The first one's layer has negative values.
    zip([*GRADIENT_CAMS, LayerScoreCam, LayerAblationCam], cycle(["mobilenet_v2", "vgg", "resnet"])),
)
def test_the_papers_kinds_of_networks(algorithm: type[LayerAttribution], name: str) -> None:
    model, layer, images, _, _ = case(name)
    attributions = algorithm(model, layer).attribute(images, target=TARGETS)
    for attribution, x, target in zip(attributions, images.split(1), TARGETS, strict=True):
        expected = expected_map(algorithm, model, layer, x, target, 0)
        np.testing.assert_allclose(attribution[0].detach(), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("algorithm", [LayerScoreCam, partial(LayerISCam, samples=4)], ids=str)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_signed_and_constant_channels_with_a_baseline(algorithm: type[LayerAttribution], axes: int) -> None:
    model = SmallNet(axes).eval().double()
    images = torch.randn(2, 3, *(9, 6, 7)[:axes]).double()
    attributions = algorithm(model, model.features).attribute(images, target=1, baselines=0.5)
    assert attributions.shape == (2, 1, *model.features(model.stem(images)).shape[2:])
    for attribution, x in zip(attributions, images.split(1), strict=True):
        expected = expected_map(algorithm, model, model.features, x, 1, 0.5)
        np.testing.assert_allclose(attribution[0].detach(), expected, atol=1e-5 * np.abs(expected).max())
