"""Tokens that are not in row order are refused."""

from typing import Any

import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn

from captum_fusion import (
    spatial_view,
)
from tests.assumptions.networks import Ordered


@pytest.mark.parametrize(
    ("order", "after", "amid"),
    [
        (torch.arange(64).reshape(8, 8).T.flatten(), 0, 0),
        (torch.randperm(64, generator=torch.Generator().manual_seed(0)), 0, 0),
        (None, 1, 0),
        (None, 0, 32),
        (None, 0, 8),
    ],
)
@pytest.mark.parametrize(("grid", "training"), [(None, False), ((8, 8), False), (None, True)])
def test_tokens_in_another_order_are_refused(
    order: Tensor | None, after: int, amid: int, grid: Any, training: bool
) -> None:
    model = Ordered(order, after, amid).train(training)
    with spatial_view(model.norm, grid) as view, pytest.raises(ValueError, match="not in row order"):
        LayerGradCam(model, view).attribute(torch.rand(2, 3, 32, 32), target=1)


def test_patches_that_are_masked_are_refused() -> None:
    model = Ordered(torch.randperm(64, generator=torch.Generator().manual_seed(0))[:49]).eval()
    with spatial_view(model.norm) as view, pytest.raises(ValueError, match="not in row order"):
        LayerGradCam(model, view).attribute(torch.rand(2, 3, 32, 32), target=1)


def test_a_model_in_training_mode_stays_in_it() -> None:
    model = nn.Sequential(Ordered(), nn.Dropout(0.9), nn.BatchNorm1d(3))
    statistics = []
    model[2].register_forward_hook(lambda module, *_: statistics.append(module.training))
    with spatial_view(model[0].norm) as view:
        LayerGradCam(model, view).attribute(torch.rand(2, 3, 32, 32), target=1)
    assert statistics == [True, False]
    assert all(part.training for part in model.modules())


def test_parts_that_are_called_one_by_one_are_warned_of() -> None:
    model = Ordered().eval()

    def forward(x: Tensor) -> Tensor:
        return model.head(model.norm(model.cut(x).flatten(2).mT).tanh().mean(1))

    with spatial_view(model.norm) as view:
        # Again, since nothing was checked the first time.
        for _ in range(2):
            with pytest.warns(UserWarning, match="no module that contains it takes"):
                LayerGradCam(forward, view).attribute(torch.rand(2, 3, 32, 32), target=1)


def test_a_channels_last_map_with_as_many_channels_as_rows_is_no_channels_first_one() -> None:
    class Rows(nn.Module):
        """A map whose values follow from the opposite side of the image, as after a shifted window."""

        def __init__(self) -> None:
            super().__init__()
            self.cut, self.norm, self.head = nn.Conv2d(3, 16, 2, 2), nn.LayerNorm(16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.cut(x).flip(2, 3).permute(0, 2, 3, 1)).mean((1, 2)))

    model, passes = Rows().eval(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    with spatial_view(model.norm) as view:
        assert LayerGradCam(model, view).attribute(torch.rand(1, 3, 32, 32), target=1).shape == (1, 1, 16, 16)
    assert len(passes) == 2


@pytest.mark.parametrize(("side", "channels"), [((96, 128), 4), ((32, 32), 8), ((32, 32), 32)])
def test_a_channels_first_map_whose_channels_look_like_rows_is_refused(side: tuple[int, int], channels: int) -> None:
    """4 channels of 6x8 may be a map of 4x6, and 8 of 8x8 either; then a perturbed pass tells."""
    torch.manual_seed(0)
    cut = nn.Conv2d(3, channels, *(16, 16) if side[0] > 32 else (32 // channels, 32 // channels))
    model = nn.Sequential(cut, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)).eval()
    with spatial_view(model[1]) as view, pytest.raises(ValueError, match="already is a channels-first map"):
        LayerGradCam(model, view).attribute(torch.rand(1, 3, *side), target=1)


def test_patches_that_are_chosen_by_chance_are_refused() -> None:
    class Chosen(Ordered):
        """Each example sees other patches in each pass, as in a masked autoencoder."""

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.cut(x).flatten(2).mT
            order = torch.rand(len(x), 64, 1).argsort(dim=1)[:, :16]
            return self.head(self.norm(tokens.gather(1, order.expand(-1, -1, 6))).tanh().mean(1))

    model, images = Chosen().eval(), torch.rand(2, 3, 32, 32)
    states = []
    model.norm.register_forward_hook(lambda *_: states.append(torch.get_rng_state()))
    with spatial_view(model.norm) as view, pytest.raises(ValueError, match="draws random numbers"):
        LayerGradCam(model, view).attribute(images, target=1)
    assert len(states) == 2
    assert torch.equal(torch.get_rng_state(), states[0])


def test_a_window_that_changes_as_a_whole_is_in_order() -> None:
    class Windowed(nn.Module):
        """Windows of 4x4 tokens, each of which holds a share of its window's mean, as after an attention."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cut, self.norm, self.head = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            maps = self.cut(x)
            means = nn.functional.interpolate(nn.functional.avg_pool2d(maps, 4), scale_factor=4)
            return self.head(self.norm((maps + means).flatten(2).mT).tanh().mean(1))

    model = Windowed().eval()
    with spatial_view(model.norm) as view:
        assert LayerGradCam(model, view).attribute(torch.rand(2, 3, 64, 64), target=1).shape == (2, 1, 16, 16)


def test_tokens_in_order_are_checked_once_and_nothing_is_disturbed() -> None:
    model, images = Ordered().eval(), torch.rand(2, 3, 32, 32)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    state = torch.get_rng_state()
    for _ in range(2):
        with spatial_view(model.norm) as view:
            maps = LayerGradCam(model, view).attribute(images, target=1)
    assert maps.shape == (2, 1, 8, 8)
    assert len(passes) == 3
    assert torch.equal(torch.get_rng_state(), state)
