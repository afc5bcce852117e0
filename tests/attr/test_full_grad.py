"""FullGrad: the straight-line computation, the sum of its terms, and pytorch-grad-cam's."""

from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from captum_fusion import FullGrad
from captum_fusion.attr import full_grad
from captum_fusion.functional import full_grad_map
from tests import straight_line
from tests.conftest import SmallNet

pytestmark = pytest.mark.every_device


class DeepNet(nn.Module):
    """Convolutions with and without a bias, a batch normalization, ReLUs in place, and a layer that runs twice."""

    def __init__(self, axes: int = 2) -> None:
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.stem = convolution(3, 4, 3, padding=1, stride=2)
        self.twice = convolution(4, 4, 3, padding=1)
        self.plain = convolution(4, 5, 3, bias=False)
        self.norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1](5)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(5, 3, bias=False)
        with torch.no_grad():
            for values in (self.norm.running_mean, self.norm.weight, self.norm.bias):
                values.normal_()  # type: ignore[union-attr]
            self.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.twice(self.relu(self.twice(self.relu(self.stem(x))))))
        return self.head(self.relu(self.norm(self.plain(x))).flatten(2).mean(2))


def test_equals_the_straight_line_computation_whose_terms_sum_to_the_score() -> None:
    for axes in [1, 2, 3]:
        model = DeepNet(axes).eval().double()
        images = torch.randn(2, 3, *(9, 8, 10)[:axes]).double()
        attributions = FullGrad(model).attribute(images, target=[0, 2])
        for x, target, attribution in zip(images.split(1), [0, 2], attributions, strict=True):
            expected, terms = straight_line.full_grad(model, x, target)
            assert terms == pytest.approx(model(x)[0, target].item())
            for channel in attribution:
                np.testing.assert_allclose(channel, expected, atol=1e-9)


class Unnamed(nn.Module):
    """A frozen batch normalization without an attribute eps, as in transformers."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach())

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, variance = (value[:, None, None] for value in self.buffers())
        return (x - mean) * weight / (variance + 1e-5).sqrt() + bias


class Cast(nn.BatchNorm2d):
    """A batch normalization with a forward pass of its own that is one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double()).to(x)


class Rectified(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_the_terms_sum_to_the_score_with_norms_of_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = DeepNet().norm
    norms: list[Any] = [nn.BatchNorm2d(5), BatchNormAct2d(5), FrozenBatchNorm2d(5), FrozenBatchNormAct2d(5), Cast(5)]
    for other in norms:
        other.load_state_dict(norm.state_dict(), strict=False)
    products: list[Tensor] = []
    monkeypatch.setattr(full_grad, "full_grad_map", lambda z, size: products.append(z) or full_grad_map(z, size))
    relus = [[nn.ReLU()] * 2, [], [nn.ReLU()], [], [nn.ReLU()], [nn.ReLU()]]
    first, maps = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 5, 3, 2)), []
    images, head = torch.randn(2, 3, 9, 8).double(), nn.Linear(5, 3, bias=False)
    for other, relu in zip([*norms, Unnamed(norm)], relus, strict=True):
        model = nn.Sequential(*first, other, *relu, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval().double()
        maps.append(FullGrad(model).attribute(images, target=1))
        terms = sum(z.flatten(1).sum(1) for z in products)
        torch.testing.assert_close(terms, model(images)[:, 1].detach(), atol=1e-6, rtol=0)
        torch.testing.assert_close(maps[-1], maps[0], atol=1e-6, rtol=0)
        products.clear()
    norms[-1] = Rectified(5)
    norms[-1].load_state_dict(norm.state_dict())
    with pytest.raises(ValueError, match="The Rectified returned something else than its batch normalization"):
        FullGrad(nn.Sequential(*first, norms[-1], *model[4:]).eval().double()).attribute(images, target=1)


def test_worked_out_by_hand() -> None:
    # Of x = [1, -2, 0], y = 2 x + 3, and the score is y_1 + 2 y_3: g of y = [1, 0, 2] and of x = [2, 0, 4], so that
    # |g b| = [3, 0, 6] and |g x| = [2, 0, 0].
    convolution = nn.Conv1d(1, 1, 1)
    with torch.no_grad():
        convolution.weight.fill_(2)
        convolution.bias.fill_(3)  # type: ignore[union-attr]
    weights = torch.tensor([1.0, 0.0, 2.0])
    full_grad = FullGrad(lambda x: convolution(x)[:, 0] @ weights, model=convolution)
    attributions = full_grad.attribute(torch.tensor([[[1.0, -2.0, 0.0]]]))
    torch.testing.assert_close(attributions, torch.tensor([[[0.5 + 1, 0.0, 1.0]]]))


def test_pytorch_grad_cam_agrees() -> None:
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    # Without the layer that runs twice, of which it would take the last run alone.
    model = DeepNet().eval()
    model.twice = nn.AvgPool2d(1)  # type: ignore[assignment]
    images = torch.randn(2, 3, 24, 20)
    ours = FullGrad(model).attribute(images, target=1)
    with pytorch_grad_cam.FullGrad(model, []) as cam:
        theirs = cam(images, [ClassifierOutputTarget(1)] * 2)
    for example in range(2):
        assert np.corrcoef(ours[example, 0].ravel(), theirs[example].ravel())[0, 1] > 0.999


def test_the_model_is_left_as_it_was(images: Tensor) -> None:
    model = DeepNet().eval().to(images.device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    FullGrad(model).attribute(images, target=1)
    with pytest.raises(ValueError, match="does not fit an output"):
        FullGrad(model).attribute(images, target=3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert not images.requires_grad


def test_refuses(net: SmallNet, images: Tensor) -> None:
    with pytest.raises(TypeError, match="forward_func is a function, whose biases are unknown"):
        FullGrad(lambda x: net(x))
    inputs: Any = (images, images)
    with pytest.raises(TypeError, match="inputs are a tuple; expected one tensor"):
        FullGrad(net).attribute(inputs, target=1)
    with pytest.raises(ValueError, match="No convolution or batch normalization with a bias ran"):
        FullGrad(net, model=net.head).attribute(images, target=1)
    bare = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(360, 2))
    with pytest.raises(ValueError, match="has no running statistics"):
        FullGrad(bare.to(images.device).eval()).attribute(images, target=1)
