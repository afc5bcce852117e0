"""Grad-CAM++ and XGrad-CAM."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import pytorch_grad_cam
import torch
import torchcam.methods
from captum.attr import LayerGradCam
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from captum_fusion import LayerGradCamPlusPlus, LayerXGradCam
from captum_fusion.attr._gradient_cam import GradientCam
from tests import straight_line
from tests.cases import LAYERS, NAMES, TARGETS, case
from tests.conftest import SmallNet

METHODS = [
    (LayerGradCamPlusPlus, straight_line.grad_cam_plus_plus),
    (LayerXGradCam, straight_line.x_grad_cam),
]


@pytest.mark.parametrize(("algorithm", "expected"), METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_straight_line_computation(
    algorithm: type[GradientCam], expected: Callable[..., straight_line.Array], name: str
) -> None:
    # In double precision, since the sums of signed channels all but cancel out.
    model = copy.deepcopy(case(name).model).double()
    layer, images = model.get_submodule(LAYERS[name][0]), case(name).images.double()
    attributions = algorithm(model, layer).attribute(images, target=TARGETS)
    for attribution, x, target in zip(attributions, images.split(1), TARGETS, strict=True):
        theirs = expected(*straight_line.activations_and_gradients(model, layer, x, target))
        np.testing.assert_allclose(attribution[0], theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(("algorithm", "expected"), METHODS)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_signed_layers_in_one_to_three_dimensions(
    algorithm: type[GradientCam], expected: Callable[..., straight_line.Array], axes: int
) -> None:
    model = SmallNet(axes).eval()
    images = torch.randn(2, 3, *(9, 6, 7)[:axes])
    attributions = algorithm(model, model.features).attribute(images, target=1)
    for attribution, x in zip(attributions, images.split(1), strict=True):
        theirs = expected(*straight_line.activations_and_gradients(model, model.features, x, 1))
        np.testing.assert_allclose(attribution[0], theirs, atol=1e-5 * np.abs(theirs).max())


def test_grad_cam_plus_plus_worked_out_by_hand() -> None:
    # The layer is the input, f = 2 (left of channel 0) - (right of channel 0) + (left of channel 1).
    # Channel 0: A = [1, 3], sum 4, g = [2, -1]: alpha = 4 / (8 + 4 * 8) = 1/10, weight 2/10.
    # Channel 1: A = [1, 1], sum 2, g = [1, 0]: alpha = 1 / (2 + 2) = 1/4, weight 1/4.
    x = torch.tensor([[[1.0, 3.0], [1.0, 1.0]]])
    identity = nn.Identity()

    def forward(inputs: Tensor) -> Tensor:
        values = identity(inputs)
        return 2 * values[:, 0, 0] - values[:, 0, 1] + values[:, 1, 0]

    attributions = LayerGradCamPlusPlus(forward, identity).attribute(x)
    torch.testing.assert_close(attributions, torch.tensor([[[0.2 + 0.25, 0.6 + 0.25]]]))


def test_x_grad_cam_of_even_gradients_is_grad_cam(net: SmallNet, images: Tensor) -> None:
    # Global average pooling gives every pixel of a channel the same gradient.
    model = nn.Sequential(net.stem, net.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.head)
    ours = LayerXGradCam(model, net.features).attribute(images, target=0)
    torch.testing.assert_close(ours, LayerGradCam(model, net.features).attribute(images, target=0))


@pytest.mark.parametrize("algorithm", [algorithm for algorithm, _ in METHODS])
def test_a_dead_layer_gives_zeros(algorithm: type[GradientCam], net: SmallNet, images: Tensor) -> None:
    with torch.no_grad():
        net.features.weight.zero_()
        net.features.bias.zero_()
    assert algorithm(net, net.features).attribute(images, target=0).eq(0).all()


@pytest.mark.parametrize("algorithm", [algorithm for algorithm, _ in METHODS])
def test_shape_of_grad_cam_and_its_options(algorithm: type[GradientCam], net: SmallNet, images: Tensor) -> None:
    attributions = algorithm(net, net.features).attribute(images, target=0)
    assert attributions.shape == LayerGradCam(net, net.features).attribute(images, target=0).shape
    assert attributions.lt(0).any()
    rectified = algorithm(net, net.features).attribute(images, target=0, relu_attributions=True)
    assert torch.equal(rectified, attributions.relu())
    to_input = algorithm(net, net.features).attribute(images, target=0, attribute_to_layer_input=True)
    torch.testing.assert_close(to_input, algorithm(net, net.stem).attribute(images, target=0))


@pytest.mark.parametrize("algorithm", [algorithm for algorithm, _ in METHODS])
def test_tokens_as_inputs(algorithm: type[GradientCam]) -> None:
    # Nothing is masked, so that integers are as good as for LayerGradCam.
    model = nn.Sequential(nn.Embedding(9, 4), nn.Conv1d(5, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).eval()
    tokens = torch.randint(9, (2, 5))
    assert algorithm(model, model[1]).attribute(tokens, target=0).shape == (2, 1, 2)


@pytest.mark.parametrize("algorithm", [algorithm for algorithm, _ in METHODS])
def test_refuses_inference_mode(algorithm: type[GradientCam], net: SmallNet, images: Tensor) -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match=f"{algorithm.__name__} needs gradients.*no_grad"):
        algorithm(net, net.features).attribute(images, target=0)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


@pytest.mark.parametrize(
    ("algorithm", "peer"),
    [(LayerGradCamPlusPlus, pytorch_grad_cam.GradCAMPlusPlus), (LayerXGradCam, pytorch_grad_cam.XGradCAM)],
)
def test_pytorch_grad_cam_agrees(algorithm: type[GradientCam], peer: type[pytorch_grad_cam.GradCAM]) -> None:
    model, layer, images, _, _ = case("resnet18")
    ours = algorithm(model, layer).attribute(images, target=TARGETS, relu_attributions=True)
    ours = algorithm.interpolate(ours, images.shape[2:], "bilinear")
    with peer(model, [layer]) as cam:
        theirs = cam(images, [ClassifierOutputTarget(target) for target in TARGETS])
    for example in range(len(images)):
        assert correlation(ours[example].numpy(), theirs[example]) > 0.999


def test_torchcam_agrees_on_x_grad_cam() -> None:
    """On Grad-CAM++ it does not: its division by the denominator works on a copy, so that alpha stays g^2."""
    model, layer, images, _, _ = case("resnet18")
    ours = LayerXGradCam(model, layer).attribute(images, target=TARGETS, relu_attributions=True)
    with torchcam.methods.XGradCAM(model, layer) as extractor:
        theirs = extractor(TARGETS, model(images))[0]
    for example in range(len(images)):
        assert correlation(ours[example].numpy(), theirs[example].numpy()) > 0.999
