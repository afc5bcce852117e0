import numpy as np
import pytest
import torch
from captum.attr import GuidedGradCam, LayerAttribution, LayerGradCam, NoiseTunnel, Saliency
from torch import Tensor, nn

from captum_fusion import FusedAttributions, LayerScoreCam, LayerXGradCam
from captum_fusion.functional import fuse_maps, normalize
from captum_fusion.metrics import saliency_map
from tests import straight_line
from tests.conftest import SmallNet

pytestmark = pytest.mark.every_device


def test_equals_the_straight_line_computation() -> None:
    for fusion, together, axes in [
        ("mean", lambda maps: sum(maps) / 2, 1),
        ("maximum", max, 2),
        ("product", np.prod, 3),
    ]:
        model = SmallNet(axes).eval()
        images = torch.randn(2, 3, *(9, 6, 7)[:axes])
        layers = [model.stem, model.features]
        fused = FusedAttributions([LayerGradCam(model, layer) for layer in layers], fusion)
        attributions = fused.attribute(images, target=1)
        assert attributions.shape == images.shape
        for attribution, x in zip(attributions, images.split(1), strict=True):
            maps = []
            for layer in layers:
                grad_cam = straight_line.grad_cam(*straight_line.activations_and_gradients(model, layer, x, 1))
                maps.append(straight_line.component(grad_cam, tuple(x.shape[2:])))
            expected = np.empty(x.shape[2:])
            for pixel in np.ndindex(expected.shape):
                expected[pixel] = together([map_[pixel] for map_ in maps])
            for channel in attribution:
                np.testing.assert_allclose(channel, straight_line.normalize(expected), atol=1e-5)


def test_worked_out_by_hand() -> None:
    maps = torch.tensor([[[0.0, 0.5, 1.0, 0.0], [0.2, 1.0, 0.5, 0.0]]])
    torch.testing.assert_close(fuse_maps(maps, "mean"), torch.tensor([[[0.1 / 0.75, 1.0, 1.0, 0.0]]]))
    torch.testing.assert_close(fuse_maps(maps, "maximum"), torch.tensor([[[0.2, 1.0, 1.0, 0.0]]]))
    torch.testing.assert_close(fuse_maps(maps, "product"), torch.tensor([[[0.0, 1.0, 1.0, 0.0]]]))


def test_one_attribution_is_its_own_map(net: SmallNet, images: Tensor) -> None:
    x_grad_cam = LayerXGradCam(net, net.features)
    expected = saliency_map(x_grad_cam.attribute(images, target=1), (12, 10))
    for fusion in ("mean", "maximum", "product"):
        ours = FusedAttributions([x_grad_cam], fusion).attribute(images, target=1)
        torch.testing.assert_close(ours, expected.expand_as(images).detach())


def test_arguments_reach_what_takes_them(net: SmallNet, images: Tensor) -> None:
    """Baselines reach Score-CAM, the target everything, the layer's input both layer methods."""
    methods = [LayerScoreCam(net, net.features), Saliency(net), LayerGradCam(net, net.features)]
    ours = FusedAttributions(methods, "maximum").attribute(
        images, [0, 1, 2], None, "nearest", True, baselines=0.5, perturbations_per_eval=3
    )
    maps = [
        methods[0].attribute(images, [0, 1, 2], attribute_to_layer_input=True, baselines=0.5),
        methods[1].attribute(images, [0, 1, 2]),
        methods[2].attribute(images, [0, 1, 2], attribute_to_layer_input=True),
    ]
    together = torch.stack([saliency_map(map_, (12, 10), "positive", "nearest") for map_ in maps]).amax(0)
    torch.testing.assert_close(ours, normalize(together).expand_as(images).detach())


def test_it_is_a_component_of_itself_and_of_tunnels(net: SmallNet, images: Tensor) -> None:
    inner = FusedAttributions([LayerGradCam(net, net.features)])
    outer = FusedAttributions([inner, NoiseTunnel(LayerGradCam(net, net.features))])
    attributions = outer.attribute(images, target=1)
    assert attributions.shape == images.shape
    smoothed = NoiseTunnel(inner).attribute(images, nt_samples=2, stdevs=0.0, target=1)
    torch.testing.assert_close(smoothed, inner.attribute(images, target=1))


def test_inputs_without_spatial_axes_get_zeros(net: SmallNet, images: Tensor) -> None:
    table = torch.rand(3, 3, device=images.device)
    fused = FusedAttributions([LayerGradCam(lambda table, x: net(x) + table, net.features)])
    attributions = fused.attribute((table, images), target=1)
    assert not attributions[0].any()
    assert attributions[1].shape == images.shape
    assert attributions[1].any()


def test_pytorch_grad_cam_takes_the_mean_or_the_product_of_several_layers() -> None:
    """But it normalizes each map before it is brought to the size of the picture, and resizes with OpenCV."""
    import pytorch_grad_cam
    from pytorch_grad_cam.refine_cam import RefineCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    from tests.cases import TARGETS, case

    model, _, images, _, _ = case("resnet")
    layers, targets = [model.layer1, model.layer2], [ClassifierOutputTarget(target) for target in TARGETS]
    with pytorch_grad_cam.GradCAM(model, layers) as cam:
        theirs = {"mean": cam(images, targets)}
    theirs["product"] = RefineCAM(model, layers, base_method=pytorch_grad_cam.GradCAM)(images, targets)
    methods = [LayerGradCam(model, layer) for layer in layers]
    for fusion in ("mean", "product"):
        ours = FusedAttributions(methods, fusion).attribute(images, target=TARGETS)
        for example in range(len(images)):
            assert np.corrcoef(ours[example, 0].numpy().ravel(), theirs[fusion][example].ravel())[0, 1] > 0.99, fusion


def test_refuses(net: SmallNet, images: Tensor) -> None:
    grad_cam = LayerGradCam(net, net.features)
    with pytest.raises(ValueError, match="fusion is 'median'; expected one of"):
        FusedAttributions([grad_cam], "median")
    for nothing in ([], grad_cam):
        with pytest.raises(ValueError, match="expected a list of at least one attribution"):
            FusedAttributions(nothing)
    with pytest.raises(TypeError, match=r"attribution_methods\[1\] is 'grad-cam'; expected an instance"):
        FusedAttributions([grad_cam, "grad-cam"])
    other = SmallNet()
    with pytest.raises(ValueError, match=r"attribution_methods\[1\] explains another SmallNet"):
        FusedAttributions([grad_cam, LayerGradCam(other, other.features)])
    with pytest.raises(ValueError, match="expected one with one to three spatial axes"):
        FusedAttributions([Saliency(nn.Linear(3, 2))]).attribute(torch.rand(2, 3), target=0)
    with pytest.raises(ValueError, match="interpolate_mode"):
        FusedAttributions([grad_cam]).attribute(images, 1, None, True)


def test_guided_grad_cam_is_fused_too(net: SmallNet, images: Tensor) -> None:
    net.relu = nn.ReLU()
    methods = [GuidedGradCam(net, net.features), LayerGradCam(net, net.stem)]
    with pytest.warns(UserWarning, match="backward hooks"):
        attributions = FusedAttributions(methods).attribute(images, target=1)
    assert isinstance(methods[1], LayerAttribution)
    assert attributions.any()
