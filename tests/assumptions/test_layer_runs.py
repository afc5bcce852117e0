"""A layer that runs several times: one run is explained, and a warning says so."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_fusion import (
    LayerFusionCam,
    LayerGradCamPlusPlus,
    LayerHiResCam,
    LayerScoreCam,
    layer_run,
)
from tests.assumptions.networks import cnn


@pytest.mark.parametrize("algorithm", [LayerGradCamPlusPlus, LayerScoreCam])
def test_layers_of_two_tensors_are_refused(algorithm: Any) -> None:
    """By keyword Captum's hooks see none of them, and in a tuple one that nothing follows from has no gradients."""

    class Sum(nn.Module):
        def forward(self, *, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
            return first + second, second * 2

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.sum = cnn(), Sum()

        def forward(self, x: Tensor) -> Tensor:
            features = self.net[:2](x)
            return self.net[2:](self.sum(first=features, second=features)[0])

    model = Model().eval()
    method = algorithm(model, model.sum)
    with pytest.raises(ValueError, match="takes 2 tensors by keyword"):
        method.attribute(torch.rand(2, 3, 16, 16), target=1, attribute_to_layer_input=True)
    with pytest.raises(ValueError, match="output has 2 values"):
        method.attribute(torch.rand(2, 3, 16, 16), target=1)


class Twice(nn.Module):
    """One encoder for two images, of which the scores read the first one alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), nn.Linear(8, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(self.encoder(a).mean((2, 3))) + 0 * self.encoder(b).mean((1, 2, 3))[:, None]


def test_a_wrong_number_of_runs_is_refused_though_two_passes_make_a_multiple() -> None:
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(self.layer(x))).mean((2, 3))

    model = Thrice().eval()
    with layer_run(model.layer, 1, of=2) as run, pytest.raises(RuntimeError, match="ran 3 times; expected 2 runs"):
        LayerScoreCam(model, run).attribute(torch.rand(1, 3, 8, 8), target=1)
    with layer_run(model.layer, 1, of=3) as run:
        assert LayerScoreCam(model, run).attribute(torch.rand(1, 3, 8, 8), target=1).shape == (1, 1, 8, 8)


def test_runs_are_added_up_and_each_input_is_masked_by_its_own() -> None:
    model = Twice().eval()
    a, b = torch.rand(2, 1, 3, 8, 8)

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        return (model.encoder(a) * model.encoder(b)).sum((2, 3))

    with layer_run(model.encoder, 0, of=2) as first, layer_run(model.encoder, 1, of=2) as second:
        runs = [LayerScoreCam(similarity, layer).attribute((a, b), target=1) for layer in (first, second)]
        gradients = [LayerHiResCam(similarity, layer).attribute((a, b), target=1) for layer in (first, second)]
        fusion = LayerFusionCam(similarity, second, activation=None)
        of_a, of_b = fusion.attribute(
            (a, b), target=1, gradient_attributions=tuple(gradients), region_attributions=tuple(runs)
        )
    # Each run's gradient is the other's value, so that both runs have the same product.
    torch.testing.assert_close(sum(gradients), 2 * (model.encoder(a) * model.encoder(b))[:, 1:2])
    assert not torch.equal(runs[0], runs[1])
    assert not torch.equal(of_a, of_b)


def test_a_run_can_be_named_and_the_last_one_is_warned_of() -> None:
    model = Twice().eval()
    a, b = torch.rand(2, 1, 3, 8, 8)
    expected = LayerGradCamPlusPlus(lambda x: model.head(model.encoder(x).mean((2, 3))), model.encoder).attribute(
        a, target=1
    )
    with layer_run(model.encoder, 0, of=2) as first:
        found = LayerGradCamPlusPlus(model, first).attribute(a, target=1, additional_forward_args=b)
    torch.testing.assert_close(found, expected)
    with pytest.warns(UserWarning, match="ran 2 times in the forward pass; its last run is explained, which may be"):
        LayerGradCamPlusPlus(model, model.encoder).attribute((a, b), target=1)
    with pytest.raises(RuntimeError, match="ran 2 times; expected 3 runs in each"), layer_run(model.encoder, 0, of=3):
        model(a, b)


def test_a_checkpointed_layer_runs_once_in_the_forward_pass() -> None:
    net, images = cnn(), torch.rand(2, 3, 16, 16)

    def forward(x: Tensor) -> Tensor:
        return net[2:](checkpoint(net[:2], x, use_reentrant=False))

    right = LayerGradCamPlusPlus(net, net[0]).attribute(images, target=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(LayerGradCamPlusPlus(forward, net[0]).attribute(images, target=1), right)
    whole = nn.Module()
    whole.net, whole.forward = net, forward  # type: ignore[assignment]
    with layer_run(net[0], 0, of=1) as layer:
        for _ in range(2):
            assert torch.equal(LayerGradCamPlusPlus(whole, layer).attribute(images, target=1), right)
