"""Networks of the paper's kinds with random weights, and the straight-line maps of two images each."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models

from tests import straight_line

TARGETS = [3, 5]
# With 64, 64 and 24 channels.
LAYERS = {"vgg11": ("features.2", 32), "resnet18": ("layer1", 24), "mobilenet_v2": ("features.8", 32)}
# torchvision's head for VGG holds a hundred million weights, which are slow to make and to multiply.
OPTIONS = {"vgg11": {"init_weights": False}, "resnet18": {}, "mobilenet_v2": {"width_mult": 0.35}}
NAMES = list(LAYERS)


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
    layer, size = LAYERS[name]
    model = models.get_model(name, weights=None, num_classes=7, **OPTIONS[name])
    if name == "vgg11":
        model.classifier = nn.Linear(512 * 7 * 7, 7)
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
