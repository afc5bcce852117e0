"""The axis of the channels, and inputs without a batch: the same map, or a refusal."""

import warnings
from typing import Any

import pytest
import torch
from captum.attr import InputXGradient
from torch import Tensor, nn

from captum_fusion import (
    AugmentationTunnel,
    FusedAttributions,
    LayerEigenCam,
    LayerFusionCam,
    LayerGradCamPlusPlus,
    LayerGroupCam,
    LayerScoreCam,
    LayerUnionCam,
    Rise,
    last_feature_map,
    spatial_view,
)
from captum_fusion.metrics import (
    adcc,
    complexity,
    confidence_drop,
    confidence_increase,
    deletion,
    energy_pointing_game,
    insertion,
    road,
)
from tests.assumptions.networks import cnn


def test_a_channels_first_layer_needs_no_view() -> None:
    net = cnn()
    with spatial_view(net[1]), pytest.raises(ValueError, match="already is a channels-first map"):
        net(torch.rand(1, 3, 16, 24))


def test_frames_before_channels_are_refused_where_the_layer_is_longer_than_the_colours() -> None:
    video = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    frames = torch.rand(1, 8, 3, 12, 12)
    with pytest.raises(ValueError, match=r"expected \(N, C, \*S\), or channel_dim=2"):
        LayerScoreCam(lambda x: video(x.transpose(1, 2)), video[0]).attribute(frames, target=1)
    with pytest.warns(UserWarning, match=r"looks like \(N, T, C, H, W\)"):
        Rise(lambda x: video(x.transpose(1, 2)), samples=2).attribute(frames, target=1)


@pytest.mark.parametrize("frames", [2, 4])
def test_a_video_of_few_frames_is_no_volume_of_three_slices(frames: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    method = LayerScoreCam(lambda x: net(x.transpose(1, 2)), net[1])
    with pytest.warns(UserWarning, match="channel_dim=2") if frames == 2 else pytest.raises(ValueError, match="=2"):
        method.attribute(torch.rand(1, frames, 3, 8, 8), target=1)


@pytest.mark.parametrize(("features", "refused"), [(3, True), (5, True), (32, False)])
def test_sequences_of_features_are_told_from_channels(features: int, refused: bool) -> None:
    convolution, head = nn.Conv1d(features, 4, 3, padding=1), nn.Linear(4, 3)
    method = LayerScoreCam(lambda x: head(convolution(x.mT).mean(2)), convolution)
    x = torch.rand(1, 20, features)
    with pytest.raises(ValueError, match="channel_dim=-1") if refused else pytest.warns(match="channel_dim=-1"):
        method.attribute(x, target=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.attribute(x, target=1, channel_dim=-1)


@pytest.mark.parametrize("bands", [2, 4, 12])
def test_bands_after_rows_and_columns_are_refused_where_the_layer_is_longer(bands: int) -> None:
    convolution, head = nn.Conv2d(bands, 4, 3, stride=2, padding=1), nn.Linear(4, 3)
    method = LayerScoreCam(lambda x: head(convolution(x.movedim(-1, 1)).mean((2, 3))), convolution)
    with pytest.raises(ValueError, match="channel_dim=-1"):
        method.attribute(torch.rand(1, 32, 32, bands), target=1)


def test_a_channels_last_layer_is_warned_of_without_a_view() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut, self.norm, self.head = nn.Conv2d(3, 12, 4, stride=4), nn.LayerNorm(12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.head(self.norm(self.cut(x).movedim(1, -1)).tanh().mean((1, 2)))
            return scores

    model, x = Rows().eval(), torch.rand(1, 3, 32, 24)
    with pytest.warns(UserWarning, match="looks like a channels-last map"):
        LayerScoreCam(model, model.norm).attribute(x, target=1)
    LayerScoreCam(model, model.cut).attribute(x, target=1)
    with spatial_view(model.norm) as view:
        LayerScoreCam(model, view).attribute(x, target=1)


LAYOUTS = [(nn.Conv1d, (12,), -1), (nn.Conv2d, (8, 10), 3), (nn.Conv2d, (8, 10), -1), (nn.Conv3d, (6, 8, 10), 2)]


@pytest.mark.parametrize(("convolution", "size", "channel_dim"), LAYOUTS)
def test_the_axis_of_the_channels_changes_nothing_else(convolution: Any, size: Any, channel_dim: int) -> None:
    torch.manual_seed(0)
    layer, head = convolution(3, 6, 3, padding=1), nn.Linear(6, 4)

    def first(x: Tensor) -> Tensor:
        return head(layer(x).relu().flatten(2).mean(2))

    def named(x: Tensor) -> Tensor:
        return first(x.movedim(channel_dim, 1))

    x = torch.rand(2, 3, *size)
    moved = x.movedim(1, channel_dim).contiguous()
    methods: list[Any] = [
        lambda f: LayerScoreCam(f, layer),
        lambda f: LayerUnionCam(f, layer),
        lambda f: LayerGroupCam(f, layer),
        lambda f: Rise(f, samples=4),
        lambda f: FusedAttributions([InputXGradient(f), LayerGradCamPlusPlus(f, layer)]),
        lambda f: LayerFusionCam(f, layer, region_method=AugmentationTunnel(LayerFusionCam(f, layer))),
        lambda f: AugmentationTunnel(InputXGradient(f)),
        lambda f: AugmentationTunnel(LayerScoreCam(f, layer)),
    ]
    for method in methods:
        right = method(first).attribute(x, target=1)
        found = method(named).attribute(moved, target=1, channel_dim=channel_dim)
        torch.testing.assert_close(found, right if right.shape[1] == 1 else right.movedim(1, channel_dim))
    attributions = InputXGradient(first).attribute(x, target=1).detach()
    of_layer = LayerScoreCam(first, layer).attribute(x, target=1)
    for ours, theirs in ((attributions, attributions.movedim(1, channel_dim)), (of_layer, of_layer)):
        for metric in (confidence_drop, confidence_increase, insertion, deletion, road):
            right = metric(first, x, ours, target=1)
            torch.testing.assert_close(metric(named, moved, theirs, target=1, channel_dim=channel_dim), right)
        right = adcc(first, InputXGradient(first), x, ours, target=1)
        found = adcc(named, InputXGradient(named), moved, theirs, target=1, channel_dim=channel_dim)
        torch.testing.assert_close(found, right)
    masks = torch.rand(2, *size) > 0.5
    theirs = attributions.movedim(1, channel_dim)
    for of_map in (lambda a, **k: complexity(a, **k), lambda a, **k: energy_pointing_game(a, masks, **k)):
        torch.testing.assert_close(of_map(theirs, channel_dim=channel_dim), of_map(attributions))
    with pytest.raises(ValueError, match="channel_dim is 0 for inputs"):
        LayerScoreCam(named, layer).attribute(moved, target=1, channel_dim=0)


@pytest.mark.parametrize("channel_dim", [2, -1])
def test_tokens_and_layers_of_images_whose_channels_are_not_first(channel_dim: int) -> None:
    torch.manual_seed(0)
    video = channel_dim == 2
    cut = nn.Conv3d(3, 6, (2, 4, 4), (2, 4, 4)) if video else nn.Conv2d(3, 6, 4, 4)
    norm, head = nn.LayerNorm(6), nn.Linear(6, 3)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut, self.norm, self.head = cut, norm, head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.cut(x.movedim(channel_dim, 1)).flatten(2).mT).tanh().mean(1))

    model = Model().eval()
    x = torch.rand(1, 8, 3, 16, 24) if video else torch.rand(1, 16, 24, 3)
    feature_map = last_feature_map(model, x)
    assert (feature_map.name, feature_map.shape[1:]) == ("norm", (4, 4, 6) if video else (4, 6))
    with feature_map.view() as view:
        maps = LayerScoreCam(model, view).attribute(x, target=1, channel_dim=channel_dim)
        with pytest.raises(ValueError, match=f"channel_dim={channel_dim}"):
            LayerScoreCam(model, view).attribute(x, target=1)
    assert maps.shape[2:] == feature_map.shape[1:]


@pytest.mark.parametrize("algorithm", [LayerGradCamPlusPlus, LayerScoreCam, LayerEigenCam])
def test_an_image_without_a_batch_is_refused(algorithm: Any) -> None:
    net = cnn()
    with pytest.raises((RuntimeError, ValueError), match=r"pass image\.unsqueeze\(0\)"):
        algorithm(net, net[1]).attribute(torch.rand(3, 16, 16), target=1)


def test_an_image_without_a_batch_is_refused_where_it_passes_through_the_model() -> None:
    """As many classes as colours look like one score for each, and a fully convolutional network takes any shape."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.features(x).mean((-2, -1)))

    net, image, volume = Pooled().eval(), torch.rand(3, 16, 16), torch.rand(1, 8, 8, 8)
    scores = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    cube = nn.Sequential(nn.Conv3d(1, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    for call in (
        lambda: LayerScoreCam(net, net.features).attribute(image, target=1),
        lambda: LayerFusionCam(net, net.features).attribute(image, target=1),
        lambda: LayerScoreCam(net, net.features).attribute(image),
        lambda: LayerGradCamPlusPlus(scores, scores[1]).attribute(image, target=(1, 5)),
        lambda: confidence_drop(net, image, torch.rand(1, 1, 16, 16), target=1),
        lambda: insertion(net, image, torch.rand(1, 16, 16), target=1),
        lambda: last_feature_map(net, image),
        lambda: LayerScoreCam(cube, cube[0]).attribute(volume, target=1),
        lambda: last_feature_map(cube, volume),
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"pass (image|volume)\.unsqueeze\(0\)"):
            call()
