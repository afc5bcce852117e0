"""Networks of the paper's kinds with random weights, and the straight-line maps of two images each."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vgg import VGG, make_layers

from tests import straight_line

TARGETS = [3, 5]


def vgg() -> nn.Module:
    # Narrower than VGG-11, and with one layer in the head, whose hundred million weights are slow to make.
    model = VGG(make_layers([16, "M", 24, "M", 32]), init_weights=False)
    model.classifier = nn.Linear(32 * 7 * 7, 7)
    return model


def resnet() -> nn.Module:
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7)


def mobilenet_v2() -> nn.Module:
    return models.mobilenet_v2(num_classes=7, width_mult=0.35)


# With 16, 64 and 24 channels, the last of which have negative values; and the height of the images.
NETWORKS = {
    "vgg": (vgg, "features.2", 32),
    "resnet": (resnet, "layer1", 24),
    "mobilenet_v2": (mobilenet_v2, "features.8", 32),
}
NAMES = list(NETWORKS)


class Case(NamedTuple):
    model: nn.Module
    layer: nn.Module
    images: Tensor
    grad_cams: list[straight_line.Array]
    score_cams: list[straight_line.Array]


@cache
def case(name: str) -> Case:
    # The random state of a test does not depend on which test made the case.
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return _case(name)


def _case(name: str) -> Case:
    build, layer, size = NETWORKS[name]
    model = build()
    # In double precision, where sums of signed channels do not cancel out and rounding decides nothing.
    model.eval().double()
    with torch.no_grad():
        # Random weights hardly tell images apart; a steeper head makes contributions that are worth dividing.
        next(module for module in reversed(list(model.modules())) if isinstance(module, nn.Linear)).weight *= 20
    result = Case(model, model.get_submodule(layer), torch.randn(2, 3, size, size + 8).double(), [], [])
    for x, target in zip(result.images.split(1), TARGETS, strict=True):
        activations, gradients = straight_line.activations_and_gradients(model, result.layer, x, target)
        result.grad_cams.append(straight_line.grad_cam(activations, gradients))
        with torch.no_grad():
            score = straight_line.logit(model, target)
            result.score_cams.append(straight_line.score_cam(activations, score, x, torch.zeros_like(x)))
    return result
