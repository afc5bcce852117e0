"""Other packages' metrics: the same values where the definitions agree, and judging our maps."""

from functools import partial

import numpy as np
import pytest
import quantus
import torch
from captum.attr import LayerGradCam
from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence, IncreaseInConfidence
from pytorch_grad_cam.metrics.road import ROADCombined
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from torch import Tensor
from torchcam.methods import GradCAM
from torchcam.metrics import ClassificationMetric, DeletionInsertionMetric

from captum_fusion import LayerFusionCam
from captum_fusion.metrics import confidence_drop, confidence_increase, deletion, insertion, saliency_map
from tests.conftest import SmallNet

TARGETS = [0, 1, 2]


@pytest.fixture
def random_images() -> Tensor:
    return 3 * torch.randn(3, 3, 24, 20)


def test_pytorch_grad_cam_drops_are_absolute(net: SmallNet, random_images: Tensor) -> None:
    """Its drop is max(0, Y - O), which Grad-CAM++ divides by Y."""
    attributions = LayerGradCam(net, net.features).attribute(random_images, TARGETS)
    cams = saliency_map(attributions, (24, 20))[:, 0].numpy()
    targets = [ClassifierOutputSoftmaxTarget(target) for target in TARGETS]
    with torch.no_grad():
        whole = net(random_images).softmax(1)[range(3), TARGETS]
    theirs = DropInConfidence()(random_images, cams, targets, net)
    ours = confidence_drop(net, random_images, attributions, target=TARGETS)
    assert theirs.max() > 0
    np.testing.assert_allclose(ours * whole, theirs, atol=1e-5)
    theirs = IncreaseInConfidence()(random_images, cams, targets, net)
    assert confidence_increase(net, random_images, attributions, target=TARGETS).tolist() == theirs.tolist()


def torchcam_map(net: SmallNet, images: Tensor) -> Tensor:
    """torchcam's metrics explain what they measure: the probability. Its hooks do not survive in-place layers."""
    net.relu = torch.nn.ReLU()
    return LayerGradCam(lambda x: net(x).softmax(1), net.features).attribute(images, TARGETS)


def test_torchcam_agrees_on_drop_and_increase(net: SmallNet, random_images: Tensor) -> None:
    attributions = torchcam_map(net, random_images)
    with GradCAM(net, net.features) as extractor:
        metric = ClassificationMetric(extractor, partial(torch.softmax, dim=-1))
        metric.update(random_images, TARGETS)
        theirs = metric.summary()
    # It normalizes before it upsamples: what is upsampled is the map in [0, 1], which need not reach 0 and 1 again.
    layer_maps = saliency_map(attributions, tuple(attributions.shape[2:]))
    masks = torch.nn.functional.interpolate(layer_maps, (24, 20), mode="bilinear")
    with torch.no_grad():
        whole, kept = (net(x).softmax(1)[range(3), TARGETS] for x in (random_images, masks * random_images))
    assert theirs["avg_drop"] == pytest.approx(((whole - kept).relu() / whole).mean().item(), abs=1e-5)
    ours = confidence_drop(net, random_images, attributions, target=TARGETS).mean().item()
    assert ours == pytest.approx(theirs["avg_drop"], abs=0.1)


def test_torchcam_agrees_on_insertion_and_deletion(net: SmallNet, random_images: Tensor) -> None:
    attributions = torchcam_map(net, random_images)
    with GradCAM(net, net.features) as extractor:
        metric = DeletionInsertionMetric(extractor, partial(torch.softmax, dim=-1), steps=20)
        metric.update(random_images, TARGETS)
        theirs = metric.summary()
    arguments = {"target": TARGETS, "steps": 20, "baselines": 0}
    for name, metric in (("insertion", insertion), ("deletion", deletion)):
        ours = metric(net, random_images, attributions, **arguments).mean().item()
        found = next(value for key, value in theirs.items() if name in key)
        # Rounding may order pixels of nearly the same importance differently.
        assert ours == pytest.approx(found, abs=1e-3)


def test_quantus_judges_fusion_cam(net: SmallNet, random_images: Tensor) -> None:
    attributions = LayerFusionCam(net, net.features).attribute(random_images, TARGETS)
    metric = quantus.PixelFlipping(features_in_step=60, abs=False, normalise=False, disable_warnings=True)
    scores = metric(
        model=net,
        x_batch=random_images.numpy(),
        y_batch=np.array(TARGETS),
        a_batch=attributions[:, :1].numpy(),
        device="cpu",
    )
    # A pixel of each channel is a feature.
    assert np.shape(scores) == (3, 3 * 480 // 60)
    assert np.isfinite(scores).all()


def test_road_judges_fusion_cam(net: SmallNet, random_images: Tensor) -> None:
    attributions = LayerFusionCam(net, net.features).attribute(random_images, TARGETS)
    targets = [ClassifierOutputSoftmaxTarget(target) for target in TARGETS]
    scores = ROADCombined(percentiles=[20, 80])(random_images, attributions[:, 0].numpy(), targets, net)
    assert scores.shape == (3,)
    assert np.isfinite(scores).all()
