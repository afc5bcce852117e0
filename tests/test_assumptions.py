"""Models, inputs and outputs that are not as they are taken for: right or refused, one section for each kind."""

import warnings
from collections import namedtuple
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients, LayerGradCam, Saliency
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from torchvision.tv_tensors import BoundingBoxes

from captum_fusion import (
    AugmentationTunnel,
    FusedAttributions,
    LayerAblationCam,
    LayerEigenCam,
    LayerFinerCam,
    LayerFusionCam,
    LayerGradCamPlusPlus,
    LayerGroupCam,
    LayerHiResCam,
    LayerScoreCam,
    LayerUnionCam,
    Rise,
    last_feature_map,
    layer_run,
    spatial_view,
)
from captum_fusion._engine.surrogate import Surrogate
from captum_fusion.functional import (
    combine,
    contribution_weights,
    denoise,
    denoised_gradient_map,
    fuse,
    gaussian_blur,
    normalize,
    random_masks,
    upsample,
    weighted,
    weighted_sum,
)
from captum_fusion.metrics import (
    adcc,
    complexity,
    confidence_drop,
    confidence_increase,
    deletion,
    energy_pointing_game,
    insertion,
    instances_reached,
    pointing_game,
    road,
    saliency_map,
    weight_randomization,
)
from captum_fusion.targets import box_score, region_scores


def scorer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    features = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()


# 1. Which dimension is the channels


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


# 2. Tokens that are not in row order


class Ordered(nn.Module):
    """Patches as tokens, in an order that is a choice, with a number of others after them."""

    def __init__(self, order: Tensor | None = None, after: int = 0, amid: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.norm, self.head = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6), nn.Linear(6, 3)
        self.order, self.after, self.amid = order, after, amid

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.cut(x).flatten(2).mT
        tokens = tokens if self.order is None else tokens[:, self.order]
        tokens = torch.cat([tokens, tokens.new_ones(len(x), self.after, 6)], dim=1)
        if self.amid:
            tokens = torch.cat([tokens[:, : self.amid], tokens.new_ones(len(x), 1, 6), tokens[:, self.amid :]], dim=1)
        return self.head(self.norm(tokens).tanh().mean(1))


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

    with (
        spatial_view(model.norm) as view,
        pytest.warns(UserWarning, match="no module that contains it takes"),
    ):
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


# 3. Inputs by keyword and in containers


@pytest.mark.parametrize("container", ["keyword", "list", "dictionary"])
def test_the_image_is_found_by_keyword_and_in_containers(container: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Ordered()

        def forward(self, pixels: Any) -> Tensor:
            return self.inner(
                pixels[0] if isinstance(pixels, list) else pixels["x"] if isinstance(pixels, dict) else pixels
            )

    model, image = Model().eval(), torch.rand(1, 3, 32, 48)
    ways = {"keyword": lambda x: model(pixels=x), "list": lambda x: model([x]), "dictionary": lambda x: model({"x": x})}
    feature_map = last_feature_map(model, image, ways[container])
    assert (feature_map.name, feature_map.shape) == ("inner.norm", (6, 8, 12))


@pytest.mark.parametrize("kind", ["list", "named tuple", "dictionary"])
def test_the_first_tensor_of_a_container_is_viewed(kind: str) -> None:
    Pair = namedtuple("Pair", ["tokens", "grid"])

    class Wraps(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"list": [x, 1], "named tuple": Pair(x, 1), "dictionary": {"tokens": x, "grid": 1}}[kind]

    cut, wraps = nn.Conv2d(3, 6, 4, 4), Wraps()
    types: list[type] = []

    def forward(x: Tensor) -> Tensor:
        output = wraps(cut(x).flatten(2).mT)
        types.append(type(output))
        return next(iter(output.values() if kind == "dictionary" else output)).square().mean(1)

    plain = wraps(torch.rand(1, 4, 6))
    with spatial_view(wraps, (4, 4)) as view:
        assert LayerGradCam(forward, view).attribute(torch.rand(1, 3, 16, 16), target=1).shape == (1, 1, 4, 4)
    assert set(types) == {type(plain)}


@pytest.mark.parametrize("kind", ["list", "dictionary", "named tuple", "keyword"])
def test_a_layer_of_one_tensor_in_a_container(kind: str) -> None:
    One = namedtuple("One", ["map"])

    class Layer(nn.Module):
        def forward(self, features: Tensor) -> Any:
            return {"list": [features], "dictionary": {"map": features}, "named tuple": One(features)}.get(
                kind, features
            )

    net, layer, x = cnn(), Layer(), torch.rand(2, 3, 8, 8)

    def forward(x: Tensor) -> Tensor:
        output = layer(features=net[:2](x)) if kind == "keyword" else layer(net[:2](x))
        (features,) = output.values() if kind == "dictionary" else (output,) if kind == "keyword" else output
        return net[2:](features)

    for algorithm in (LayerGradCamPlusPlus, LayerScoreCam, LayerAblationCam, LayerFusionCam):
        found = algorithm(forward, layer).attribute(x, target=1, attribute_to_layer_input=kind == "keyword")
        torch.testing.assert_close(found, algorithm(net, net[1]).attribute(x, target=1), msg=algorithm.__name__)
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks


# 4. A layer that runs several times


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


# 5. A component of several inputs


def test_each_input_keeps_its_own_map() -> None:
    net = cnn()
    inputs = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 6, 10)
    method = InputXGradient(lambda a, b: net(a) * net(b))
    fused = FusedAttributions([method]).attribute(inputs, target=1)
    own = method.attribute(tuple(x.clone().requires_grad_() for x in inputs), target=1)
    for found, attribution, x in zip(fused, own, inputs, strict=True):
        torch.testing.assert_close(found[:, :1], saliency_map(attribution, tuple(x.shape[2:])))
    alone = FusedAttributions([method]).attribute((inputs[0][:1], inputs[1][:1] * 0), target=1)
    batch = FusedAttributions([method]).attribute(
        (inputs[0], inputs[1] * torch.tensor([0, 1]).reshape(2, 1, 1, 1)), target=1
    )
    torch.testing.assert_close([part[:1] for part in batch], list(alone))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("algorithm", [LayerFusionCam, LayerUnionCam])
def test_a_fusion_masks_each_input_by_its_own_map(algorithm: Any, given: bool) -> None:
    net = cnn()
    inputs = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 6, 10)

    def forward(a: Tensor, b: Tensor) -> Tensor:
        return net(a).exp() * b.square().mean((1, 2, 3))[:, None]

    method = InputXGradient(forward)
    regions = method.attribute(tuple(x.clone().requires_grad_() for x in inputs), target=1)
    components = {} if given else {"region_method": method}
    options = {"region_attributions": regions} if given else {}
    attributions = algorithm(forward, net[1], activation=None, **components).attribute(inputs, target=1, **options)

    # The equations, in which a score is that of both inputs, each masked by its own map.
    def gain(maps: list[Tensor]) -> Tensor:
        return forward(*(m * x for m, x in zip(maps, inputs, strict=True)))[:, 1].detach()

    activations = net[:2](inputs[0]).detach().requires_grad_()
    gradients = torch.autograd.grad(
        (net[2:](activations).exp() * inputs[1].square().mean((1, 2, 3))[:, None])[:, 1].sum(), activations
    )[0]
    if algorithm is LayerFusionCam:
        grad_cam = torch.relu(weighted_sum(activations, gradients.mean((2, 3))))
        layer_maps = [denoise(normalize(grad_cam), 10)] * 2
    else:
        layer_maps = [denoised_gradient_map(gradients, activations, 10)] * 2
    denoised = [normalize(upsample(m, x.shape[2:])) for m, x in zip(layer_maps, inputs, strict=True)]
    region = [normalize(torch.relu(part.sum(dim=1, keepdim=True))) for part in regions]
    weights = gain(denoised), gain(region)
    combined = [combine(d, r, *weights) for d, r in zip(denoised, region, strict=True)]
    better = gain(combined) > gain(region)
    for found, c, r in zip(attributions, combined, region, strict=True):
        fused = fuse(c, r, gain(combined), gain(region))
        chosen = torch.where(better[:, None, None, None], c, r)
        torch.testing.assert_close(found[:, :1], (fused if algorithm is LayerFusionCam else chosen).detach())


# 6. The axis of the softmax


def test_probabilities_are_told_to_use_no_activation() -> None:
    net, x = nn.Sequential(cnn(), nn.Softmax(1)).eval(), torch.rand(2, 3, 8, 8)
    maps = torch.rand(2, 1, 8, 8)
    with pytest.warns(UserWarning, match="Pass activation=None for probabilities"):
        insertion(net, x, maps, target=1, steps=2)
    insertion(net, x, maps, target=1, steps=2, activation=None)


@pytest.mark.parametrize(
    ("size", "shape", "known"),
    [
        ((8, 12), (4,), True),
        ((8, 12), (4, 1, 1), True),
        ((8, 12), (4, 8, 12), True),
        ((8, 12), (3, 6, 10), True),
        ((9, 13), (4, 3, 5), True),
        ((8, 12), (3, 5), False),
        ((8, 12), (8, 12, 4), False),
        ((8, 12), (4, 6, 5), False),
        ((8, 8), (8, 8, 8), False),
        ((12,), (4, 12), True),
        ((12,), (3, 4), False),
        ((12,), (12, 4), False),
        ((12,), (12, 12), False),
    ],
)
def test_the_softmax_is_over_classes_that_are_known_to_be_classes(size: Any, shape: Any, known: bool) -> None:
    def forward(x: Tensor) -> Tensor:
        return x.flatten(1).mean(1).reshape(-1, *(1,) * len(shape)) * torch.arange(prod(shape)).reshape(shape)

    x, maps, target = torch.rand(1, 3, *size), torch.rand(1, 1, *size), (1, *(0,) * (len(shape) - 1))
    if known:
        found = confidence_drop(forward, x, saliency_map(maps, size), target=target)
        whole, masked = (forward(y).softmax(1)[(0, *target)] for y in (x, x * saliency_map(maps, size)))
        torch.testing.assert_close(found[0], torch.relu(whole - masked) / whole)
    else:
        with pytest.raises(ValueError, match="may have its classes in another one"):
            confidence_drop(forward, x, maps, target=target)


# 7. Augmentation turns the picture, not the target


@pytest.mark.parametrize("kind", ["region", "pixel", "mask", "mask without channels", "mask in a dictionary"])
def test_what_is_explained_is_mirrored_with_the_input(kind: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).eval()
    x, place = torch.rand(1, 3, 8, 10), torch.zeros(8, 10)
    place[2, 1] = 1

    def expected(place: Tensor, x: Tensor) -> Tensor:
        return LayerHiResCam(region_scores(net, place), net[1]).attribute(x, target=2)

    right = (expected(place, x) + expected(place.flip(-1), x.flip(-1)).flip(-1)) / 2
    forward, options = {
        "region": (region_scores(net, place), {"target": 2}),
        "pixel": (net, {"target": (2, 2, 1)}),
        "mask": (
            lambda x, where: (net(x) * where).sum((2, 3)),
            {"target": 2, "additional_forward_args": place[None, None]},
        ),
        "mask without channels": (
            lambda x, where: (net(x) * where[:, None]).sum((2, 3)),
            {"target": 2, "additional_forward_args": place[None]},
        ),
        "mask in a dictionary": (
            lambda x, where: (net(x) * where["mask"][0]).sum((2, 3)),
            {"target": 2, "additional_forward_args": {"mask": [place[None, None]]}},
        ),
    }[kind]
    found = AugmentationTunnel(LayerHiResCam(forward, net[1])).attribute(x, factors=[1.0], **options)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("kind", ["shared mask", "boxes"])
def test_what_an_argument_says_of_places_is_mirrored(kind: str) -> None:
    net, images = scorer(), torch.rand(2, 3, 10, 14)
    mask = torch.rand(10, 14)
    boxes = BoundingBoxes(torch.tensor([[1, 1, 4, 4], [2, 0, 3, 9]]), format="XYWH", canvas_size=(10, 14))
    other = BoundingBoxes(torch.tensor([[9, 1, 4, 4], [9, 0, 3, 9]]), format="XYWH", canvas_size=(10, 14))

    def forward(x: Tensor, place: Tensor) -> Tensor:
        scores = net(x)
        if kind == "shared mask":
            return (scores * place).mean((2, 3))
        rows = zip(scores, place.tolist(), strict=True)
        return torch.stack([row[:, y : y + h, x : x + w].mean((1, 2)) for row, (x, y, w, h) in rows])

    method = LayerHiResCam(forward, net[1])
    place, opposite = (mask, mask.flip(-1)) if kind == "shared mask" else (boxes, other)
    found = AugmentationTunnel(method).attribute(images, factors=[1.0], target=1, additional_forward_args=place)
    mirrored = method.attribute(images.flip(-1), target=1, additional_forward_args=opposite).flip(-1)
    right = (method.attribute(images, target=1, additional_forward_args=place) + mirrored) / 2
    torch.testing.assert_close(found, right)


def test_a_mask_of_another_resolution_is_refused() -> None:
    net = scorer()
    tunnel = AugmentationTunnel(LayerGradCam(lambda x, m: (net(x) * m.mean()).mean((2, 3)), net[1]))
    with pytest.raises(ValueError, match="at another resolution"):
        tunnel.attribute(torch.rand(2, 3, 10, 14), target=1, additional_forward_args=torch.rand(2, 1, 5, 7))


def test_a_target_that_may_name_a_place_is_refused() -> None:
    net = cnn()
    with pytest.raises(ValueError, match="may or may not be a pixel to mirror"):
        AugmentationTunnel(Saliency(lambda x: net(x)[:, :, None])).attribute(torch.rand(1, 3, 8, 8), target=(1, 0))


def test_a_model_that_writes_into_its_input_sees_a_fresh_one() -> None:
    net = cnn()

    class Plain(Saliency):
        def attribute(self, inputs: Tensor, **_: object) -> Tensor:
            result = inputs.clone()
            inputs.zero_()
            return result

    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(AugmentationTunnel(Plain(net)).attribute(x, factors=[1.0]), x)


# 8. Randomization that changes nothing


class Needy(nn.Linear):
    """Its parameters cannot be reset without an argument."""

    def reset_parameters(self, gain: float | None = None) -> None:
        if gain is None:
            super().reset_parameters()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm],
    ids=["hooked weight", "hooked spectral", "weight", "spectral"],
)
def test_weights_that_are_made_of_others_are_randomized(wrap: Any) -> None:
    net = cnn()
    net[0] = wrap(net[0])
    net.eval()
    x = torch.rand(1, 3, 8, 8)
    net(x)
    before, weights = net[0].weight.detach().clone(), []
    net[0].register_forward_hook(lambda module, *_: weights.append(module.weight.detach().clone()))
    found = weight_randomization(LayerGradCam(net, net[1]), x, target=1, randomization="independent")
    assert list(found) == ["4", "0"]
    assert not torch.allclose(weights[-1], before, atol=1e-2)
    assert torch.equal(net[0].weight, before)


def test_parameters_that_stay_are_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    with pytest.warns(UserWarning, match="did not change the weights of '1'"):
        weight_randomization(LayerGradCam(net, net[2]), torch.rand(1, 3, 8, 8), target=1)


# 9. Numbers at the edge


def test_the_regression_is_the_same_at_any_scale_and_under_autocast() -> None:
    maps = torch.relu(torch.randn(60, 5, 5, generator=torch.Generator().manual_seed(0)))
    scores = torch.linspace(-1, 1, 60)[:, None]

    def weights(scale: float) -> Tensor:
        surrogate = Surrogate(maps * scale, torch.zeros(1), torch.ones(1), 0.05)
        for _ in range(3):
            channels = surrogate.propose()
            surrogate.observe(channels, scores[channels])
        assert surrogate.errors.isfinite().all()
        return surrogate.weights

    expected = weights(1.0)
    for scale in (2.0**100, 2.0**-100):
        torch.testing.assert_close(weights(scale), expected)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(weights(1.0), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_masks_and_blurs_are_the_same_at_any_precision_of_the_caller() -> None:
    grids, shifts, images = (torch.rand(3, 1, 7, 7) > 0.5).float(), torch.rand(3, 2), torch.rand(2, 3, 40, 40)
    rise = Rise(lambda x: x.mean((2, 3)), samples=8, activation=None)

    def results() -> list[Tensor]:
        masks = random_masks(grids, shifts, (40, 40))
        return [masks, gaussian_blur(images, 11, 5.0), rise.attribute(images, target=1)]

    expected, before = results(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for found, right in zip(results(), expected, strict=True):
                assert torch.equal(found, right)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_estimate_that_is_no_number_is_not_0() -> None:
    maps = torch.relu(torch.randn(40, 5, 5, generator=torch.Generator().manual_seed(0)))
    surrogate = Surrogate(maps, torch.zeros(1), torch.full((1,), 3e38), 0.3)
    channels = surrogate.propose()
    surrogate.observe(channels, torch.full((len(channels), 1), -3e38))
    assert surrogate.errors.item() == 1


def test_classes_that_are_ruled_out_are_no_references() -> None:
    net, x = cnn(), torch.rand(1, 3, 8, 8)

    def ruled_out(x: Tensor) -> Tensor:
        return net(x).masked_fill(torch.tensor([False, False, True, False]), -torch.inf)

    found = LayerFinerCam(ruled_out, net[1]).attribute(x, target=1)
    torch.testing.assert_close(found, LayerFinerCam(lambda x: net(x)[:, [0, 1, 3]], net[1]).attribute(x, target=1))


@pytest.mark.parametrize("algorithm", [LayerGradCamPlusPlus, LayerScoreCam, LayerEigenCam, LayerGroupCam])
@pytest.mark.parametrize("part", ["activations", "gradients"])
def test_a_layer_that_holds_no_numbers_is_refused(algorithm: Any, part: str) -> None:
    net, layer = cnn(), nn.Identity()

    def forward(x: Tensor) -> Tensor:
        features = net[:2](x)
        if part == "activations":
            return net[2:](layer(features.log()).nan_to_num(0, 0, 0))
        return net[2:](layer(features * 0).sqrt())

    if part == "gradients" and algorithm in (LayerScoreCam, LayerEigenCam):
        assert algorithm(forward, layer).attribute(torch.rand(1, 3, 8, 8), target=1).isfinite().all()
        return
    with pytest.raises(RuntimeError, match=f"The layer's {part} hold NaN or infinity for 1 of 1 examples"):
        algorithm(forward, layer).attribute(torch.rand(1, 3, 8, 8), target=1)


@pytest.mark.parametrize("value", [torch.inf, 3e38])
def test_attributions_without_an_order_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="attributions hold infinity, or overflow"):
        saliency_map(torch.full((1, 3, 4, 4), value), (4, 4))


# 10. A metric outside its domain


def test_a_drop_of_negative_scores_is_refused_and_zero_has_no_sign() -> None:
    def forward(x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))

    x, maps = torch.rand(2, 3, 4, 4), torch.ones(2, 1, 4, 4)
    with pytest.raises(ValueError, match="expected probabilities, which are not negative"):
        confidence_drop(lambda x: forward(x) - 1, x, maps, activation=None)
    assert not confidence_drop(forward, x, maps, activation=None).signbit().any()


def test_no_zero_has_a_sign() -> None:
    zeros, minus = torch.zeros(1, 1, 2, 2), -torch.ones(1, 1)
    net = cnn()
    results = [
        weighted(zeros, minus),
        normalize(torch.tensor([[[-0.0, 0.0, 1.0]]])),
        saliency_map(torch.tensor([[[0.0, 2.0, 1.0]]]), (3,), "negative"),
        *contribution_weights(torch.zeros(1), minus[0], "released"),
        LayerHiResCam(net, net[1]).attribute(torch.rand(2, 3, 8, 8), target=1, attr_dim_summation=False),
    ]
    for result in results:
        assert not result[result == 0].signbit().any()


@pytest.mark.parametrize("metric", [confidence_drop, insertion, deletion])
def test_an_input_without_attributions_is_left_as_it_is_in_a_batch_as_alone(metric: Any) -> None:
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([4 * a.mean((1, 2, 3)) + 8 * b.mean((1, 2, 3)), torch.zeros(len(a))], dim=1)

    a, b = torch.rand(2, 2, 3, 8, 8)
    of_a, of_b = torch.rand(2, 2, 1, 8, 8)
    of_b[0] = 0
    batch = metric(forward, (a, b), (of_a, of_b), target=0)
    alone = [
        metric(forward, (a[i : i + 1], b[i : i + 1]), (of_a[i : i + 1], of_b[i : i + 1]), target=0) for i in (0, 1)
    ]
    torch.testing.assert_close(batch, torch.cat(alone))


@pytest.mark.parametrize("metric", [pointing_game, energy_pointing_game, instances_reached])
def test_boxes_of_any_format_and_container(metric: Any) -> None:
    maps = torch.zeros(1, 1, 8, 8)
    maps[0, 0, 6, 6] = 1
    formats = {"XYXY": [5, 4, 7, 8], "XYWH": [5, 4, 2, 4], "CXCYWH": [6, 6, 2, 4]}
    regions: list[Any] = [BoundingBoxes([v], format=name, canvas_size=(8, 8)) for name, v in formats.items()]
    regions += [[[5, 4, 7, 8]], [(5, 4, 7, 8)], np.array([[5, 4, 7, 8]])]
    mask = np.zeros((1, 8, 8), dtype=bool)
    mask[0, 6, 6] = True
    for region in [*regions, mask]:
        assert metric(maps, [region]).item() == 1
    for given in (["box"], [{"box": 1}], 5, "boxes"):
        with pytest.raises(TypeError, match="region"):
            metric(maps, given)
    with pytest.raises(TypeError, match="attributions are a ndarray"):
        metric(maps.numpy(), [mask])


@pytest.mark.parametrize("of_map", [complexity, lambda maps: saliency_map(maps, (4, 4))])
def test_maps_that_are_no_tensors_of_real_numbers_are_refused(of_map: Any) -> None:
    for maps in (np.zeros((1, 1, 4, 4)), None):
        with pytest.raises(TypeError, match="attributions are a"):
            of_map(maps)
    for tensor in (torch.rand(4, 4), torch.rand(1, 1, 4, 4) + 0j):
        with pytest.raises(ValueError, match="attributions have shape"):
            of_map(tensor)


# 11. Needs that are none


def test_eigen_cam_needs_no_gradients() -> None:
    net, x = cnn(), torch.rand(1, 3, 8, 8)

    def in_place(x: Tensor) -> Tensor:
        output = net(x).sigmoid()
        output[:, :2] = output[:, :2] * 2 - 0.5
        return output

    expected = LayerEigenCam(net, net[1]).attribute(x, target=1)
    for forward in (in_place, lambda x: net(x).detach()):
        torch.testing.assert_close(LayerEigenCam(forward, net[1]).attribute(x, target=1), expected)
    with torch.inference_mode():
        torch.testing.assert_close(LayerEigenCam(net, net[1]).attribute(x, target=1), expected)


def test_a_mask_among_the_inputs_passes_through() -> None:
    net, x = cnn(), torch.rand(1, 3, 8, 8)
    mask = torch.rand(1, 1, 8, 8) > 0.3

    def forward(x: Tensor, mask: Tensor) -> Tensor:
        return net(x * mask)

    expected = LayerScoreCam(forward, net[1]).attribute(x, target=1, additional_forward_args=mask)
    torch.testing.assert_close(LayerScoreCam(forward, net[1]).attribute((x, mask), target=1), expected)
    with pytest.raises(TypeError, match="additional_forward_args"):
        LayerScoreCam(lambda mask: net(mask.float().expand(-1, 3, -1, -1)), net[1]).attribute(mask, target=1)


@pytest.mark.parametrize("metric", [confidence_drop, insertion, deletion])
def test_one_map_is_for_the_inputs_that_can_be_masked(metric: Any) -> None:
    net, images, mask = cnn(), torch.rand(2, 3, 16, 16), torch.rand(2, 1, 16, 16) > 0.3
    maps = torch.rand(2, 1, 16, 16)
    found = metric(lambda x, m: net(x * m), (images, mask), maps, target=1)
    right = metric(lambda x, m: net(x * m), images, maps, additional_forward_args=mask, target=1)
    assert torch.equal(found, right)


@pytest.mark.parametrize("algorithm", [LayerGradCamPlusPlus, LayerScoreCam, LayerFusionCam])
def test_a_box_that_is_not_found_has_a_map_of_zeros(algorithm: Any) -> None:
    convolution = cnn()[0]

    def detector(images: Tensor) -> list[dict[str, Tensor]]:
        score = torch.relu(convolution(images)).mean((1, 2, 3))
        boxes = torch.tensor([[0.0, 0, 4, 4]])
        return [{"boxes": boxes, "labels": torch.tensor([1]), "scores": s[None]} for s in score]

    forward = box_score(detector, [0, 0, 4, 4], label=2)
    options = {"activation": None} if algorithm is LayerFusionCam else {}
    with pytest.warns(UserWarning, match=r"The examples \[0, 1\] have no detection of the label"):
        maps = algorithm(forward, convolution, **options).attribute(torch.rand(2, 3, 8, 8))
    assert not maps.any()


# 12. Unbatched input


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
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"pass (image|volume)\.unsqueeze\(0\)"):
            call()


# 13. Scores of volumes taken for features


@pytest.mark.parametrize("side", [16, 32])
def test_scores_of_a_cube_are_no_feature_map(side: int) -> None:
    up = nn.ConvTranspose3d(8, 2, 3, 2, padding=1, output_padding=1)
    net = nn.Sequential(nn.Conv3d(1, 8, 3, 2, 1), nn.ReLU(), up).eval()
    feature_map = last_feature_map(
        net, torch.rand(1, 1, side, side, side), region_scores(net, torch.ones(side, side, side))
    )
    assert (feature_map.name, feature_map.shape) == ("1", (8, *(side // 2,) * 3))


# 14. Poor words


def test_a_model_without_values() -> None:
    net = cnn().to("meta")
    with pytest.raises(ValueError, match="on the meta device, which holds no values"):
        LayerScoreCam(net, net[1]).attribute(torch.rand(1, 3, 8, 8, device="meta"), target=1)


@pytest.mark.filterwarnings("ignore:The layer ran 2 times")
def test_a_convergence_delta_is_no_attribution() -> None:
    net = cnn()
    fusion = LayerFusionCam(
        lambda a, b: net(a) + net(b), net[1], gradient_method=IntegratedGradients(lambda a, b: net(a) + net(b))
    )
    inputs = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="Remove arguments such as return_convergence_delta"):
        fusion.attribute(inputs, target=1, gradient_kwargs={"return_convergence_delta": True, "n_steps": 2})


def test_a_sparse_argument() -> None:
    net = cnn()
    with pytest.raises(ValueError, match=r"additional_forward_args\[0\] is a tensor of layout torch.sparse_coo"):
        LayerScoreCam(lambda x, _: net(x), net[1]).attribute(
            torch.rand(2, 3, 8, 8), target=1, additional_forward_args=torch.eye(2).to_sparse()
        )


@pytest.mark.parametrize("inputs", ["sparse", "nested", "meta"])
def test_inputs_without_rows_or_values(inputs: str) -> None:
    net, x = cnn(), torch.rand(2, 3, 8, 8)
    given = {"sparse": x.to_sparse(), "nested": torch.nested.as_nested_tensor([*x]), "meta": x.to("meta")}[inputs]
    for method in (LayerScoreCam(net, net[1]), Rise(net, samples=2)):
        with pytest.raises(ValueError, match=r"inputs\[0\] is a tensor"):
            method.attribute(given, target=1)


@pytest.mark.parametrize("shape", [(), (1, 3, 16, 16)])
def test_a_baseline_without_values(shape: tuple[int, ...]) -> None:
    net, baseline = cnn(), torch.ones(shape, device="meta")
    with pytest.raises(ValueError, match="The baseline of input 0 is a tensor on the meta device"):
        LayerScoreCam(net, net[1]).attribute(torch.rand(2, 3, 16, 16), target=1, baselines=baseline)


def test_a_component_without_a_graph() -> None:
    net = cnn()

    def forward(x: Tensor) -> Tensor:
        return net[2:](checkpoint(net[:2], x, use_reentrant=True))

    with pytest.raises(RuntimeError, match="needs use_reentrant=False"):
        LayerFusionCam(forward, net[1]).attribute(torch.rand(1, 3, 8, 8), target=1)


def test_scores_without_a_graph() -> None:
    net = cnn()
    with pytest.raises(RuntimeError, match="The scores have no gradients at the layer"):
        LayerGradCamPlusPlus(lambda x: net(x).detach(), net[1]).attribute(torch.rand(1, 3, 8, 8), target=1)


@pytest.mark.parametrize("kind", [dict, list])
def test_rows_in_a_container(kind: Any) -> None:
    """They are not repeated, so that one example would be masked with the other one's."""
    net, factors = cnn(), torch.tensor([1.0, 3.0])
    further = {"factor": factors} if kind is dict else [factors]

    def forward(x: Tensor, further: Any) -> Tensor:
        return net(x * further["factor" if kind is dict else 0].reshape(-1, 1, 1, 1))

    with pytest.raises(ValueError, match="expected each tensor as an argument of its own"):
        LayerScoreCam(forward, net[1]).attribute(
            torch.rand(2, 3, 16, 16), 1, additional_forward_args=(further,), perturbations_per_eval=1
        )


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_scores_that_are_no_real_numbers(dtype: torch.dtype) -> None:
    net = cnn()
    with pytest.raises(TypeError, match="expected scores, which are real numbers"):
        Rise(lambda x: net(x)[:, 0].to(dtype), samples=4, activation=None).attribute(torch.rand(2, 3, 16, 16))


def test_scores_in_a_dataclass() -> None:
    @dataclass
    class Output:
        loss: None
        scores: Tensor

    net = cnn()
    with pytest.raises(TypeError, match=r"lambda x: model\(x\)\.scores"):
        LayerScoreCam(lambda x: Output(None, net(x)), net[1]).attribute(torch.rand(2, 3, 16, 16), target=1)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_scripted_model() -> None:
    scripted = torch.jit.script(cnn())
    with pytest.raises(TypeError, match=r"is a module of torch\.jit\.script"):
        LayerScoreCam(scripted, getattr(scripted, "1")).attribute(torch.rand(2, 3, 16, 16), target=1)
    with pytest.raises(TypeError, match=r"is a module of torch\.jit\.script"):
        last_feature_map(scripted, torch.rand(2, 3, 16, 16))


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="compiled models need torch 2.6")
def test_a_compiled_model() -> None:
    net, images = cnn(), torch.rand(2, 3, 16, 16)
    compiled = torch.compile(net, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last_feature_map(compiled, images).name == last_feature_map(net, images).name
    found = weight_randomization(LayerGradCam(compiled, net[1]), images, target=1)
    right = weight_randomization(LayerGradCam(net, net[1]), images, target=1)
    for one, other in zip(found.values(), right.values(), strict=True):
        torch.testing.assert_close(one, other)
