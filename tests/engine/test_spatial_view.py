from itertools import product
from threading import Thread

import pytest
import timm
import torch
from captum.attr import LayerAttribution, LayerGradCam, LayerGradientXActivation
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from captum_fusion import LayerFusionCam, LayerScoreCam, spatial_view
from tests.conftest import SmallNet
from tests.methods import KINDS, LAYER_KINDS, has_input_shape


def vit() -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    model = VisionTransformer(48, 16, 2, 4, 32, 64, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts from zeros, which leave no gradient.
    return model.eval(), model.encoder.layers[-1].ln_1, (3, 3)


def swin() -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    # swin_t, but narrower and with two stages.
    model = SwinTransformer([4, 4], 16, [2, 2], [2, 2], [3, 3], num_classes=5).eval()
    return model, model.features[-1], (6, 6)


def convnext() -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    model = ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=5).eval()
    # Inside a block, after the permutation.
    return model, model.features[3][0].block[2], (6, 6)


NETWORKS = [vit, swin, convnext]


@pytest.fixture(params=NETWORKS, ids=lambda network: network.__name__)
def attach_view(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, tuple[int, ...], Tensor]:
    return *request.param(), torch.randn(2, 3, 48, 48)


@pytest.mark.parametrize(
    ("attach_view", "algorithm"),
    [
        *product(NETWORKS[:1], [*LAYER_KINDS, LayerGradCam, LayerGradientXActivation]),
        *product(NETWORKS[1:], [LayerScoreCam, LayerFusionCam]),
    ],
    indirect=["attach_view"],
)
def test_every_layer_method_works_on_a_view(
    algorithm: type[LayerAttribution], attach_view: tuple[nn.Module, nn.Module, tuple[int, ...], Tensor]
) -> None:
    model, layer, grid, images = attach_view
    options = {"perturbations_per_eval": 16} if algorithm is LayerScoreCam else {}
    with spatial_view(layer) as view:
        attributions = algorithm(model, view).attribute(images, target=1, **options)
    channels = 1 if algorithm is not LayerGradientXActivation else attributions.shape[1]
    assert attributions.shape == (images.shape if has_input_shape(algorithm) else (2, channels, *grid))
    assert attributions.isfinite().all()
    assert attributions.any()


def test_the_network_computes_the_same_and_nothing_remains(
    attach_view: tuple[nn.Module, nn.Module, tuple[int, ...], Tensor],
) -> None:
    model, layer, _, images = attach_view
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            before = model(images)
            with spatial_view(layer):
                assert torch.equal(model(images), before)
            assert torch.equal(model(images), before)
    assert not any(module._forward_hooks for module in model.modules())
    assert not nn.modules.module._has_any_global_hook()


def test_gradients_and_activations_are_the_layers_own() -> None:
    model, layer, grid = vit()
    images = torch.randn(2, 3, 48, 48)
    on_tokens = LayerGradientXActivation(model, layer).attribute(images, target=1)
    with spatial_view(layer) as view:
        on_view = LayerGradientXActivation(model, view).attribute(images, target=1)
    # One class token, then the grid row by row.
    for row in range(grid[0]):
        for column in range(grid[1]):
            assert torch.equal(on_view[:, :, row, column], on_tokens[:, 1 + row * grid[1] + column])


def test_channels_last_maps_are_moved() -> None:
    model, layer, _ = swin()
    images = torch.randn(1, 3, 48, 48)
    plain = LayerGradientXActivation(model, layer).attribute(images, target=1)
    with spatial_view(layer) as view:
        attach_view = LayerGradientXActivation(model, view).attribute(images, target=1)
    assert torch.equal(attach_view, plain.permute(0, 3, 1, 2))


@pytest.mark.parametrize("algorithm", KINDS)
def test_a_layer_that_needs_no_view(algorithm: type[LayerAttribution], net: SmallNet, images: Tensor) -> None:
    """A view of a plain feature map through to_map and from_map explains what the layer itself does."""
    expected = algorithm(net, net.features).attribute(images, target=1)
    with spatial_view(net.features, to_map=lambda output: output, from_map=lambda attach_view, _: attach_view) as view:
        torch.testing.assert_close(algorithm(net, view).attribute(images, target=1), expected)


@pytest.mark.parametrize("algorithm", KINDS)
def test_maxvit_needs_no_view(algorithm: type[LayerAttribution]) -> None:
    # maxvit_t, but smaller.
    model = MaxVit((64, 64), 8, 4, [8, 16], [1, 1], 8, 0.0, num_classes=5).eval()
    # Probabilities sum to 1, so that a mask which changes them raises that of some class.
    images = torch.randn(1, 3, 64, 64).repeat(5, 1, 1, 1)
    attributions = algorithm(model, model.blocks[-1]).attribute(images, target=list(range(5)))
    assert attributions.shape == (images.shape if has_input_shape(algorithm) else (5, 1, 8, 8))
    assert attributions.any()


class Tokens(nn.Module):
    """Gives any number of tokens with some in front."""

    def __init__(self, in_front: int, grid: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.in_front = in_front
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        tokens = nn.functional.interpolate(x, self.grid).flatten(2).transpose(1, 2)
        tokens = self.layer(torch.cat([tokens.new_ones(len(x), self.in_front, tokens.shape[2]), tokens], dim=1))
        return (tokens * torch.arange(tokens.shape[1]).view(1, -1, 1)).sum(1)


@pytest.mark.parametrize("in_front", [0, 1, 2])
def test_the_grid_is_inferred_when_square_or_given(in_front: int) -> None:
    model = Tokens(in_front, (4, 4))
    with spatial_view(model.layer) as view:
        assert LayerGradCam(model, view).attribute(torch.rand(1, 3, 8, 8), target=1).shape == (1, 1, 4, 4)
    model = Tokens(in_front, (2, 5))
    with spatial_view(model.layer, grid=(2, 5)) as view:
        assert LayerFusionCam(model, view).attribute(torch.rand(1, 3, 8, 8), target=1).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((4, 4), r"11 tokens do not fit the grid \(4, 4\); expected the tokens of the grid and fewer than 9 in front"),
        ((1, 2), r"11 tokens do not fit the grid \(1, 2\); expected the tokens of the grid and fewer than 9 in front"),
        ((3, 3), "not in row order"),
    ],
)
def test_a_grid_that_does_not_match(grid: tuple[int, ...], message: str) -> None:
    model = Tokens(1, (2, 5)).eval()
    with spatial_view(model.layer, grid=grid), pytest.raises(ValueError, match=message):
        model(torch.rand(1, 3, 8, 8))


class Patches(nn.Module):
    """A network of patches of 16 pixels, as ViT is: each token holds its row and its column."""

    def __init__(self, in_front: int = 1, convolved: bool = True, pad: bool = False) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 2, 16, 16, padding=8 * pad) if convolved else None
        self.front = nn.Parameter(torch.zeros(1, in_front, 2))
        self.layer = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.cut is None:
            rows, columns = x.shape[2] // 16, x.shape[3] // 16
        else:
            rows, columns = self.cut(x).shape[2:]
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(x) * (1 + 0 * x.mean())
        tokens = torch.cat([self.front.expand(len(x), -1, -1), places.expand(len(x), -1, -1)], dim=1)
        return self.layer(tokens).sum(1)


class Recorder(LayerGradientXActivation):
    """The activation of the layer, with its rows and columns."""

    def attribute(self, inputs: Tensor) -> Tensor:
        values = []
        with torch.no_grad(), self.layer.register_forward_hook(lambda _, __, output: values.append(output)):
            self.forward_func(inputs)
        return values[0]


def shows_its_places(activation: Tensor, rows: int, columns: int) -> bool:
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")).float()
    return activation.shape[2:] == (rows, columns) and torch.allclose(activation[0], places)


@pytest.mark.parametrize("in_front", [0, 1, 5])
@pytest.mark.parametrize("convolved", [True, False])
def test_the_grid_follows_the_input(in_front: int, convolved: bool) -> None:
    for rows, columns in ((8, 10), (10, 8), (2, 10), (9, 8)):
        model = Patches(in_front, convolved)
        with spatial_view(model.layer) as view:
            activation = Recorder(model, view).attribute(torch.rand(2, 3, 16 * rows, 16 * columns))
        assert shows_its_places(activation, rows, columns), (rows, columns)


def test_a_convolution_gives_the_grid_of_a_size_that_it_does_not_divide() -> None:
    image = torch.rand(1, 3, 100, 170)
    for in_front in (0, 1, 2, 5):
        model = Patches(in_front)
        with spatial_view(model.layer) as view:
            assert shows_its_places(Recorder(model, view).attribute(image), 6, 10), in_front
    model = Patches(0, convolved=False)
    # 6x9 follows from patches of 18 pixels.
    with (
        spatial_view(model.layer) as view,
        pytest.raises(ValueError, match=r"60 tokens may be \(6, 9\) or \(6, 10\) of \(100, 170\)"),
    ):
        model(image)


def test_the_grid_follows_each_input() -> None:
    model = Patches()
    with spatial_view(model.layer) as view:
        for size in [(128, 160), (160, 128), (64, 64)]:
            assert shows_its_places(
                Recorder(model, view).attribute(torch.rand(1, 3, *size)), size[0] // 16, size[1] // 16
            )


def test_a_convolution_with_padding_gives_the_grid() -> None:
    model = Patches(pad=True)
    with spatial_view(model.layer) as view:
        # 9x11, which is neither 8x10 nor 9x10 of the whole numbers.
        assert shows_its_places(Recorder(model, view).attribute(torch.rand(1, 3, 128, 160)), 9, 11)


def test_the_parts_of_a_network_called_one_by_one() -> None:
    """As timm's forward_features is: no module has taken the image in when the layer's own part runs."""
    model = Patches(convolved=False)
    stem, head = nn.Identity(), nn.ConvTranspose2d(2, 2, 32, 32)
    part = nn.Sequential(model.layer)

    def forward(x: Tensor) -> Tensor:
        model.layer = nn.Identity()
        tokens: list[Tensor] = []
        model.layer.register_forward_hook(lambda _, __, output: tokens.append(output))
        model.forward(stem(x))
        attach_view = part(tokens[0])
        # Twice the size of the image.
        head(attach_view[:, 1:].transpose(1, 2).reshape(len(x), 2, x.shape[2] // 16, x.shape[3] // 16))
        return attach_view.sum(1)

    with spatial_view(part[0]) as view:
        for size in [(128, 160), (128, 160)]:
            assert shows_its_places(Recorder(forward, view).attribute(torch.rand(1, 3, *size)), 8, 10)


def test_an_image_that_the_network_resizes() -> None:
    class Resizing(nn.Module):
        def __init__(self, convolved: bool) -> None:
            super().__init__()
            self.inner = Patches(1, convolved)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(nn.functional.interpolate(x, (224, 224)))

    image = torch.rand(1, 3, 300, 400)
    model = Resizing(convolved=True)
    with spatial_view(model.inner.layer) as view:
        assert shows_its_places(Recorder(model, view).attribute(image), 14, 14)
    model = Resizing(convolved=False)
    # 12x16 patches of 25 pixels of the image, and 5 tokens in front, are as possible.
    with (
        spatial_view(model.inner.layer) as view,
        pytest.raises(ValueError, match=r"197 tokens may be \(12, 16\) or \(14, 14\) of \(224, 224\) or \(300, 400\)"),
    ):
        Recorder(model, view).attribute(image)


def test_a_grid_that_does_not_follow() -> None:
    model = Tokens(1, (1, 7))
    with (
        spatial_view(model.layer),
        pytest.raises(
            ValueError, match=r"The grid of 8 tokens cannot be inferred from the input of \(8, 8\); pass the"
        ),
    ):
        model(torch.rand(1, 3, 8, 8))
    sequence = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Identity())
    with (
        spatial_view(sequence[1]),
        pytest.raises(ValueError, match=r"cannot be inferred from the input; .* grid=\(4,\) for a se"),
    ):
        sequence(torch.rand(1, 3, 8))


def test_volumes_have_a_grid() -> None:
    class Tubes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut = nn.Conv3d(3, 4, (2, 8, 8), (2, 8, 8))
            self.layer = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.cut(x).flatten(2).transpose(1, 2)).square().mean(1)

    model = Tubes()
    with spatial_view(model.layer) as view:
        assert LayerGradCam(model, view).attribute(torch.rand(1, 3, 4, 32, 24), target=1).shape == (1, 1, 2, 4, 3)


def test_other_threads_do_not_matter() -> None:
    model, other = Patches(convolved=False), nn.Conv2d(3, 2, 16, 16)
    with spatial_view(model.layer) as view:
        # 81 tokens are 9x9 of the other network's and 8x10 with one in front of this one's.
        def run_other(*_: object) -> None:
            thread = Thread(target=lambda: other(torch.rand(1, 3, 144, 144)))
            thread.start()
            thread.join()

        model.layer.register_forward_pre_hook(run_other)
        assert shows_its_places(Recorder(model, view).attribute(torch.rand(1, 3, 128, 160)), 8, 10)


def test_an_error_in_a_module_ends_its_pass() -> None:
    model = Patches(convolved=False)
    broken = nn.Conv2d(3, 2, 16)
    with spatial_view(model.layer) as view:
        for _ in range(2):
            with pytest.raises(RuntimeError):
                nn.Sequential(broken)(torch.rand(1, 3, 8, 8))
            assert shows_its_places(Recorder(model, view).attribute(torch.rand(1, 3, 128, 160)), 8, 10)


@pytest.mark.parametrize(
    ("name", "size", "in_front"),
    [("deit_tiny_distilled_patch16_224", (160, 128), 2), ("vit_small_patch14_reg4_dinov2", (112, 140), 5)],
)
def test_timm(name: str, size: tuple[int, int], in_front: int) -> None:
    model = timm.create_model(name, img_size=size, depth=2).eval()
    rows, columns = model.patch_embed.grid_size
    image = torch.randn(1, 3, *size)
    layer = model.blocks[-1].norm1
    for forward in (model, lambda x: model.forward_head(model.forward_features(x))):
        on_tokens = LayerGradientXActivation(forward, layer).attribute(image, target=1)
        with spatial_view(layer) as view:
            on_view = LayerGradientXActivation(forward, view).attribute(image, target=1)
            assert LayerGradCam(forward, view).attribute(image, target=1).shape == (1, 1, rows, columns)
        assert torch.equal(on_view, on_tokens[:, in_front:].unflatten(1, (rows, columns)).permute(0, 3, 1, 2))


def test_a_view_of_a_layer_that_never_ran(net: SmallNet, images: Tensor) -> None:
    net.unused = nn.ReLU6()
    with (
        pytest.raises(RuntimeError, match="The viewed ReLU6 never ran; expected a forward pass"),
        spatial_view(net.unused),
    ):
        net(images)
    with (
        pytest.raises(ValueError, match="is not a module of forward_func"),
        spatial_view(net.unused) as view,
    ):
        LayerScoreCam(net, view).attribute(images, target=0)


def test_nested_views(net: SmallNet, images: Tensor) -> None:
    with spatial_view(net.features, to_map=lambda output: output, from_map=lambda attach_view, _: attach_view):
        with pytest.raises(ValueError, match="There is a view of this Conv2d already"), spatial_view(net.features):
            pass
        net(images)
    assert not net.features._forward_hooks


def test_bad_arguments(net: SmallNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match="One of to_map and from_map"), spatial_view(net.stem, to_map=lambda x: x):
        pass
    for grid in ((), (0, 4), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match="expected one to three positive numbers"), spatial_view(net.stem, grid):
            pass
    with spatial_view(net.stem, grid=(3, 3)), pytest.raises(ValueError, match=r"returned a map .*; expected None"):
        net(images)
    with (
        spatial_view(net.head),
        pytest.raises(ValueError, match=r"The viewed layer returned \(3, 3\); expected tokens"),
    ):
        net(images)


def test_an_error_inside_leaves_no_hook(net: SmallNet) -> None:
    with pytest.raises(KeyError), spatial_view(net.features):
        raise KeyError("inside")
    assert not net.features._forward_hooks
