import contextlib
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_fusion import LayerFusionCam
from tests.conftest import SmallNet
from tests.methods import METHODS


class TrainingNet(nn.Module):
    """Everything that a forward pass may disturb: statistics, chance, and its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.features = nn.Conv2d(3, 4, 3)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return self.head(self.dropout(self.features(self.norm(x)).relu().mean((2, 3))))


def snapshot(model: nn.Module, images: Tensor) -> list[object]:
    hooks = [
        len(getattr(module, name))
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ]
    global_hooks = len(nn.modules.module._global_forward_hooks) + len(nn.modules.module._global_forward_pre_hooks)
    tensors = [*model.state_dict().values(), images, torch.get_rng_state()]
    gradients = [(parameter.requires_grad, parameter.grad) for parameter in [*model.parameters(), images]]
    modes = [module.training for module in model.modules()]
    chance = [random.getstate(), np.random.get_state()[1].tolist()]
    return [
        hooks,
        chance,
        global_hooks,
        [tensor.tolist() for tensor in tensors],
        gradients,
        modes,
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: lambda x: model(x)], ids=["module", "closure"])
@pytest.mark.parametrize("target", [1, 99], ids=["success", "failure"])
def test_nothing_is_disturbed(
    images: Tensor, method: type[LayerAttribution], wrap: Callable[[nn.Module], nn.Module], target: int
) -> None:
    model = TrainingNet()
    model.head.bias.grad = torch.ones(3)
    before = snapshot(model, images)
    buffers = list(model.buffers())
    fails = target == 99
    expectation = pytest.raises(ValueError, match="target 99") if fails else contextlib.nullcontext()
    with expectation, pytest.warns(UserWarning, match=r"model.eval\(\)"):
        method(wrap(model), model.features).attribute(images, target=target)
    assert snapshot(model, images) == before
    assert all(kept is buffer for kept, buffer in zip(model.buffers(), buffers, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_disturbed_by_an_error_in_the_layer(
    net: SmallNet, images: Tensor, method: type[LayerAttribution]
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("broken")

    net.features.forward = fail
    before = snapshot(net, images)
    with pytest.raises(KeyError, match="broken"):
        method(net, net.features).attribute(images, target=0)
    assert snapshot(net, images) == before


def test_a_model_in_training_mode_is_warned_about_once(images: Tensor) -> None:
    model = TrainingNet()
    with pytest.warns(UserWarning, match="training mode and holds BatchNorm2d, Dropout, so that") as warnings:
        LayerFusionCam(model, model.features).attribute(images, target=0)
    assert len(warnings) == 1


@pytest.mark.filterwarnings("error")
def test_no_warning_in_evaluation_mode(images: Tensor) -> None:
    model = TrainingNet().eval()
    LayerFusionCam(model, model.features).attribute(images, target=0)
