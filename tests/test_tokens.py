"""Layers of tokens: never on a grid that was guessed wrong, and told what to do where there is no view."""

import pytest
import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_fusion import LayerFusionCam, LayerGroupCam, LayerScoreCam, LayerXGradCam, spatial_view
from tests.methods import KINDS, has_input_shape


class Patches(nn.Module):
    """Tokens (N, T, C), one for each patch of two pixels along each of one to three axes, after a class token."""

    def __init__(self, axes: int = 2, in_front: int = 1) -> None:
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.patches = convolution(3, 6, 2, stride=2)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)
        self.in_front = in_front

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.new_ones(len(x), self.in_front, 6), tokens], dim=1)
        return self.head(self.norm(tokens).tanh().mean(1))


@pytest.mark.parametrize(("algorithm", "size"), zip(KINDS, [(16, 20), (4, 16), (2, 18)], strict=True))
def test_a_grid_that_is_no_square_is_that_of_the_input_or_asked_for(
    algorithm: type[LayerAttribution], size: tuple[int, int]
) -> None:
    """8 by 10 tokens, which would leave a square of 8 or 9 after some in front."""
    model = Patches().eval()
    images = torch.rand(2, 3, *size)
    grid = (size[0] // 2, size[1] // 2)
    with spatial_view(model.norm, grid) as view:
        expected = algorithm(model, view).attribute(images, target=1)
    try:
        with spatial_view(model.norm) as view:
            ours = algorithm(model, view).attribute(images, target=1)
    except ValueError as refusal:
        assert "grid" in str(refusal)  # noqa: PT017
        return
    assert torch.equal(ours, expected)


# The gradient methods at the layer's resolution never look at the input's axes, as LayerGradCam does not.
@pytest.mark.parametrize("algorithm", [LayerScoreCam, LayerGroupCam, LayerFusionCam])
def test_tokens_of_a_picture_or_a_volume_without_a_view(algorithm: type[LayerAttribution]) -> None:
    for axes, message in ((2, "spatial_view"), (3, r"spatial_view.*grid")):
        model = Patches(axes).eval()
        with pytest.raises(ValueError, match=message):
            algorithm(model, model.norm).attribute(torch.rand(2, 3, *(8, 8, 4)[:axes]), target=1)


@pytest.mark.parametrize(("algorithm", "axes"), zip(KINDS, (1, 3, 3), strict=True))
def test_tokens_of_sequences_and_volumes_in_a_view(algorithm: type[LayerAttribution], axes: int) -> None:
    """64 tokens are a square as well, but not of these: the grid is that of the input or asked for."""
    model = Patches(axes, in_front=0).eval()
    inputs = torch.rand(2, 3, *((128,), (), (8, 8, 8))[axes - 1])
    grid = ((64,), (), (4, 4, 4))[axes - 1]
    with spatial_view(model.norm, grid) as view:
        expected = algorithm(model, view).attribute(inputs, target=1)
    assert expected.shape == (inputs.shape if has_input_shape(algorithm) else (2, 1, *grid))
    try:
        with spatial_view(model.norm) as view:
            ours = algorithm(model, view).attribute(inputs, target=1)
    except ValueError as refusal:
        assert "grid" in str(refusal)  # noqa: PT017
        return
    assert torch.equal(ours, expected)


def test_tokens_that_reach_a_method_by_another_name() -> None:
    """Integers that an embedding turns into tokens have no axes to mask, and nothing but gradients to explain."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Conv1d(5, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).eval()
    tokens = torch.randint(9, (2, 5))
    assert LayerXGradCam(model, model[1]).attribute(tokens, target=0).shape == (2, 1, 2)
    with pytest.raises(TypeError, match=r"int64.*cannot be masked"):
        LayerScoreCam(model, model[1]).attribute(tokens, target=0)
