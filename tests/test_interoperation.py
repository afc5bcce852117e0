"""Other packages' maps and metrics: the same values where the definitions agree, and judging our maps."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor

from captum_fusion import (
    LayerAblationCam,
    LayerEigenCam,
    LayerEigenGradCam,
    LayerFinerCam,
    LayerFusionCam,
    LayerGradCamElementWise,
    LayerGradCamPlusPlus,
    LayerHiResCam,
    LayerKPCACam,
    LayerLayerCam,
    LayerSegEigenCam,
    LayerShapleyCam,
    LayerXGradCam,
)
from captum_fusion.metrics import confidence_drop, confidence_increase, deletion, insertion, saliency_map
from tests import cases
from tests.conftest import SmallNet

# The packages are imported by the tests that use them: that takes longer than the tests.
TARGETS = [0, 1, 2]
torchcam_runs = pytest.mark.skipif(sys.version_info < (3, 11), reason="torchcam needs Python 3.11")


@pytest.fixture
def random_images() -> Tensor:
    return 3 * torch.randn(3, 3, 24, 20)


def test_pytorch_grad_cam_drops_are_absolute(net: SmallNet, random_images: Tensor) -> None:
    """Its drop is max(0, Y - O), which Grad-CAM++ divides by Y."""
    from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence, IncreaseInConfidence
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

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


@torchcam_runs
def test_torchcam_agrees_on_drop_and_increase(net: SmallNet, random_images: Tensor) -> None:
    from torchcam.methods import GradCAM
    from torchcam.metrics import ClassificationMetric

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


@torchcam_runs
def test_torchcam_agrees_on_insertion_and_deletion(net: SmallNet, random_images: Tensor) -> None:
    from torchcam.methods import GradCAM
    from torchcam.metrics import DeletionInsertionMetric

    attributions = torchcam_map(net, random_images)
    with GradCAM(net, net.features) as extractor:
        metric = DeletionInsertionMetric(extractor, partial(torch.softmax, dim=-1), steps=20)
        metric.update(random_images, TARGETS)
        theirs = metric.summary()
    arguments = {"target": TARGETS, "steps": 20, "baselines": 0}
    for name, metric in (("insertion", insertion), ("deletion", deletion)):
        ours = metric(net, random_images, attributions, **arguments).mean().item()
        peer = next(value for key, value in theirs.items() if name in key)
        # Rounding may order pixels of nearly the same importance differently.
        assert ours == pytest.approx(peer, abs=1e-3)


def test_quantus_judges_fusion_cam(net: SmallNet, random_images: Tensor) -> None:
    import quantus

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


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


def test_pytorch_grad_cam_agrees() -> None:
    """On principal components but for their signs: it leaves these to the decomposition, which has none."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, layer, images, _, _ = cases.case("resnet")
    for algorithm, peer in [
        (LayerGradCamPlusPlus, "GradCAMPlusPlus"),
        (LayerXGradCam, "XGradCAM"),
        (LayerLayerCam, "LayerCAM"),
        (LayerHiResCam, "HiResCAM"),
        (LayerGradCamElementWise, "GradCAMElementWise"),
        (LayerEigenCam, "EigenCAM"),
        (LayerEigenGradCam, "EigenGradCAM"),
        (LayerSegEigenCam, "SegEigenCAM"),
        (LayerKPCACam, "KPCA_CAM"),
    ]:
        ours = algorithm(model, layer).attribute(images, target=cases.TARGETS).detach()
        with getattr(pytorch_grad_cam, peer)(model, [layer]) as cam:
            theirs = cam(images, [ClassifierOutputTarget(target) for target in cases.TARGETS])
        signs = (1, -1) if peer in ("EigenCAM", "EigenGradCAM", "KPCA_CAM") else (1,)
        maps = [algorithm.interpolate((sign * ours).relu(), images.shape[2:], "bilinear") for sign in signs]
        for example in range(len(images)):
            assert max(correlation(map_[example].numpy(), theirs[example]) for map_ in maps) > 0.999, peer


def test_pytorch_grad_cam_agrees_on_shapley_cam() -> None:
    for utility in ["rest", "score"]:
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputReST, ClassifierOutputTarget

        model, layer, images, _, _ = cases.case("mobilenet_v2")
        ours = LayerShapleyCam(model, layer, utility=utility).attribute(images, target=cases.TARGETS).detach()
        utilities = [(ClassifierOutputReST if utility == "rest" else ClassifierOutputTarget)(t) for t in cases.TARGETS]
        with pytorch_grad_cam.ShapleyCAM(model, [layer]) as cam:
            theirs = cam(images, utilities)
        maps = LayerShapleyCam.interpolate(ours.relu(), images.shape[2:], "bilinear")
        for example in range(len(images)):
            assert correlation(maps[example].numpy(), theirs[example]) > 0.999


def test_pytorch_grad_cam_agrees_on_ablation_cam() -> None:
    """For a score above 0, by which it divides, and after a ReLU: elsewhere it puts -1e7 where the paper puts 0."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, layer, images, _, _ = cases.case("resnet")
    with torch.no_grad():
        targets = model(images).argmax(1).tolist()
        assert model(images).amax(1).gt(0).all()
        activations = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(images)))))
    ours = LayerAblationCam(model, layer).attribute(images, target=targets, attr_dim_summation=False)
    chosen = [ClassifierOutputTarget(target) for target in targets]
    with pytorch_grad_cam.AblationCAM(model, [layer], batch_size=32) as cam:
        weights = cam.get_cam_weights(images, layer, chosen, activations.numpy(), None)
    theirs = weights[:, :, None, None] * activations.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@torchcam_runs
def test_torchcam_agrees_on_finer_cam() -> None:
    """But over its Grad-CAM++, which differs; pytorch-grad-cam weights the other classes by their softmax."""
    import torchcam.methods

    model, layer, images, _, _ = cases.case("resnet")
    for method, peer in [(None, "GradCAM"), (LayerGradCamPlusPlus, "GradCAMpp"), (LayerLayerCam, "LayerCAM")]:
        ours = LayerFinerCam(model, layer, method=method)
        maps = ours.attribute(images, target=cases.TARGETS, relu_attributions=True).detach()
        base = getattr(torchcam.methods, peer)
        with torchcam.methods.FinerCAM(model, layer, base_method=base) as extractor:
            theirs = extractor(cases.TARGETS, model(images))[0]
        agree = [correlation(maps[example].numpy(), theirs[example].numpy()) > 0.999 for example in range(len(images))]
        assert all(agree) == (method is not LayerGradCamPlusPlus), peer
