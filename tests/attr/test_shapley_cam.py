"""Shapley-CAM: second derivatives of the utility by the layer's value."""

from itertools import product

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn

from captum_fusion import LayerShapleyCam, spatial_view
from tests import straight_line
from tests.conftest import SmallNet

pytestmark = pytest.mark.every_device


class CurvedNet(nn.Module):
    """Scores that are no linear function of the features; the features change in place."""

    def __init__(self, axes: int = 2) -> None:
        super().__init__()
        self.features = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](3, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mul_(1.5).sigmoid().square().flatten(2).mean(2))


def test_worked_out_by_hand() -> None:
    # Channels [a, b] = [1, 3] and [c, d] = [2, 1], f = a^2 + b c. g = [2a, c], [b, 0] = [2, 2], [3, 0], and
    # H A = [2a, c], [b, 0] = [2, 2], [3, 0]: weights (1 + 1) / 2 = 1 and 1.5 / 2.
    x = torch.tensor([[[1.0, 3.0], [2.0, 1.0]]])
    identity = nn.Identity()

    def forward(inputs: Tensor) -> Tensor:
        values = identity(inputs)
        return values[:, 0, 0] ** 2 + values[:, 0, 1] * values[:, 1, 0]

    attributions = LayerShapleyCam(forward, identity, utility="score").attribute(x)
    torch.testing.assert_close(attributions, torch.tensor([[[1 + 1.5, 3 + 0.75]]]))


@pytest.mark.parametrize("utility", ["rest", "score"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_equals_the_straight_line_computation(axes: int, utility: str) -> None:
    model = CurvedNet(axes).eval().double()
    images = 3 * torch.randn(2, 3, *(6, 5, 4)[:axes]).double()
    attributions = LayerShapleyCam(model, model.features, utility=utility).attribute(images, target=[0, 2])
    for x, target, attribution in zip(images.split(1), [0, 2], attributions, strict=True):
        expected = straight_line.shapley_cam(model, model.features, x, target, utility)
        np.testing.assert_allclose(attribution[0].detach(), expected, atol=1e-7 * np.abs(expected).max())


def test_a_score_that_is_linear_in_the_layer_gives_grad_cam(images: Tensor) -> None:
    convolution = nn.Conv2d(3, 4, 3)
    for frozen in (False, True):
        model = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
        model = model.to(images.device).requires_grad_(not frozen)
        ours = LayerShapleyCam(model, convolution, utility="score").attribute(images, target=1)
        torch.testing.assert_close(ours, LayerGradCam(model, convolution).attribute(images, target=1))
        assert not torch.allclose(LayerShapleyCam(model, convolution).attribute(images, target=1), ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_second_derivatives_too(dtype: torch.dtype, images: Tensor) -> None:
    model = CurvedNet().eval().to(images.device)
    exact = LayerShapleyCam(model, model.features, utility="score").attribute(images, target=1)
    model.to(dtype)
    ours = LayerShapleyCam(model, model.features, utility="score").attribute(images.to(dtype), target=1)
    torch.testing.assert_close(ours, exact, atol=0.05 * float(exact.detach().abs().max()), rtol=0)
    assert ours.dtype == torch.float32


def test_the_layers_input_and_its_last_run(images: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(3 * self.act(x)).square().mean((2, 3))

    model = Twice()
    once = LayerShapleyCam(lambda x: model.act(x).square().mean((2, 3)), model.act).attribute(
        3 * images.sigmoid(), target=1, attribute_to_layer_input=True
    )
    with pytest.warns(UserWarning, match="ran 2 times"):
        ours = LayerShapleyCam(model, model.act).attribute(images, target=1, attribute_to_layer_input=True)
    torch.testing.assert_close(ours, once)


def test_tokens_through_attention(images: Tensor) -> None:
    """Attention whose fused kernels have no second derivative."""

    class TokenNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 2, stride=2)
            self.norm = nn.LayerNorm(8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.norm(self.stem(x).flatten(2).mT)
            return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))

    model = TokenNet().eval().to(images.device)
    with spatial_view(model.norm) as view:
        attributions = LayerShapleyCam(model, view).attribute(images, target=1)
    assert attributions.shape == (3, 1, 6, 5)
    assert attributions.isfinite().all()


def test_the_graph_is_captums_grad_cams(images: Tensor) -> None:
    for requires_grad, create_graph in product((True, False), repeat=2):
        net = CurvedNet().eval().to(images.device).requires_grad_(False)
        inputs = images.clone().requires_grad_(requires_grad)
        options = {"grad_kwargs": {"create_graph": create_graph}}
        ours = LayerShapleyCam(net, net.features).attribute(inputs, 1, **options)
        captums = LayerGradCam(net, net.features).attribute(inputs, 1, **options)
        assert ours.requires_grad == captums.requires_grad
        if requires_grad:
            (gradient,) = torch.autograd.grad(ours.square().sum(), inputs)
            assert gradient.any()


def test_refuses(net: SmallNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match="utility is 'logit'; expected"):
        LayerShapleyCam(net, net.features, utility="logit")
    with pytest.raises(ValueError, match=r"output of shape \(3,\); expected logits.*utility='score'"):
        LayerShapleyCam(lambda x: net(x)[:, 0], net.features).attribute(images)
