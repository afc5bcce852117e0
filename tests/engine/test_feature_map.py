"""The layer to explain: of every family in the guide's table, and of small networks of each kind."""

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import transformers
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torchvision import models

from captum_fusion import last_feature_map
from tests.engine.test_forward_pass import TrainingNet, snapshot

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "layer.md"
# The smallest sizes whose feature map has more than one pixel, or that the network takes; 96 for all others.
SIZES = {"inception_v3": 128, "maxvit_t": 224}
# The slower half of making VGG's hundred million weights.
OPTIONS = {"vgg11": {"init_weights": False}, "vit_b_16": {"image_size": 96}}


class Row(NamedTuple):
    families: list[str]
    examples: list[str]
    layer: str
    attach_view: bool


@cache
def table() -> list[Row]:
    rows = re.findall(r"^\| (.+) \| (.+) \| `(.+)` \| (yes|no) \|$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    return [Row(row[0].split(", "), re.findall(r"`(\w+)`", row[1]), row[2], row[3] == "yes") for row in rows]


def plain(name: str) -> str:
    """The family in the name of a model: "Wide ResNet" begins wide_resnet50_2."""
    return re.sub(r"[ _]", "", name).lower()


def row_of(name: str) -> Row:
    """The row of the longest family that begins the name."""
    begun = [(len(family), row) for row in table() for family in row.families if plain(name).startswith(plain(family))]
    assert begun, name
    return max(begun, key=lambda pair: pair[0])[1]


def test_the_table_covers_torchvision_and_nothing_else() -> None:
    names = models.list_models(module=models)
    for name in names:
        row_of(name)
    for row in table():
        assert len(row.examples) == len(row.families)
        for family, example in zip(row.families, row.examples, strict=True):
            assert plain(example).startswith(plain(family))
            assert row_of(example) is row
            assert example in names


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize("name", [example for row in table() for example in row.examples])
def test_the_layer_can_be_explained(name: str) -> None:
    row = row_of(name)
    size = SIZES.get(name, 96)
    model = models.get_model(name, weights=None, **OPTIONS.get(name, {})).eval()
    if name.startswith("vit"):
        nn.init.normal_(model.heads.head.weight)  # torchvision starts from zeros, which leave no gradient.
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        target = int(model(image).argmax())  # SqueezeNet's scores pass a ReLU, which leaves a low one no gradient.
    feature_map = last_feature_map(model, image)
    assert feature_map.name == row.layer
    assert feature_map.layer is model.get_submodule(row.layer)
    assert feature_map.form == ("tokens" if row.attach_view else "channels first")
    with feature_map.view() as layer:
        grad_cam = LayerGradCam(model, layer).attribute(image, target=target)
    assert grad_cam.shape == (1, 1, *feature_map.shape[1:])
    assert grad_cam.numel() > 1
    assert grad_cam.any()


def of_timm(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=5, **options)


VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2}
HUGGING_FACE = {
    "num_labels": 5,
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SWIN = {"image_size": 64, "num_labels": 5, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}

# What their documentation and their users explain: the class token reads the others last in the last attention, a mean
# over tokens is taken of the last normalization.
TRANSFORMERS = {
    "class token": (lambda: of_timm("vit_tiny_patch16_224", **VIT), "blocks.2.norm1", (32, 4, 4), "tokens"),
    "mean": (lambda: of_timm("vit_medium_patch16_gap_240", **VIT), "norm", (32, 4, 4), "tokens"),
    "attention pool": (lambda: of_timm("vit_base_patch16_siglip_224", **VIT), "norm", (32, 4, 4), "tokens"),
    "registers": (
        lambda: of_timm("vit_small_patch14_reg4_dinov2", **VIT),
        "blocks.2.norm1",
        (32, 4, 4),
        "tokens",
    ),
    "distilled": (lambda: of_timm("deit_tiny_distilled_patch16_224", **VIT), "blocks.2.norm1", (32, 4, 4), "tokens"),
    "CaiT": (lambda: of_timm("cait_xxs24_224", **VIT), "blocks_token_only.1.norm1", (32, 4, 4), "tokens"),
    "PiT": (
        lambda: of_timm("pit_ti_224", img_size=64, base_dims=(16, 16, 16), depth=(1, 1, 1), heads=(2, 2, 2)),
        "transformers.2.blocks.0.norm1",
        (32, 2, 2),
        "tokens",
    ),
    "Swin": (
        lambda: of_timm(
            "swin_tiny_patch4_window7_224", img_size=64, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4
        ),
        "norm",
        (32, 8, 8),
        "channels last",
    ),
    "MambaOut": (
        lambda: of_timm("mambaout_femto", depths=(1, 1), dims=(16, 32)),
        "stages",
        (32, 8, 8),
        "channels last",
    ),
    "Hugging Face ViT": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**HUGGING_FACE)),
        "vit.layers.1.layernorm_before",
        (32, 4, 4),
        "tokens",
    ),
    "Hugging Face Swin": (
        lambda: transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN)),
        "swin.layernorm",
        (32, 8, 8),
        "tokens",
    ),
}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers(kind: str) -> None:
    build, name, shape, form = TRANSFORMERS[kind]
    model, image = build().eval(), torch.randn(2, 3, 64, 64)
    feature_map = last_feature_map(model, image)
    assert (feature_map.name, feature_map.shape, feature_map.form) == (name, shape, form)
    assert str(feature_map) == f"{name}, {shape[0]} channels of {shape[1]}x{shape[2]}, a view of {form}"

    def forward(x: Tensor) -> Tensor:
        output = model(x)
        return getattr(output, "logits", output)

    with feature_map.view() as layer:
        assert LayerGradCam(forward, layer).attribute(image, target=1).shape == (2, 1, *shape[1:])


def convolution(channels: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, channels, 3, stride, 1), nn.ReLU())


class Head(nn.Module):
    """Pools a map and classifies it."""

    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


class Branches(nn.Module):
    """Two branches side by side, whose maps are joined outside of any module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(4)
        self.left = nn.Conv2d(4, 4, 3)
        self.right = nn.Conv2d(4, 4, 3)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat([self.left(x), self.right(x)], dim=1))


class GivesATuple(nn.Module):
    """A block that gives its tokens and their grid."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        return x + self.mix(x), (2, 4)


class TupleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, 8)
        self.block = GivesATuple()
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, _ = self.block(self.stem(x).flatten(2).transpose(1, 2))
        return self.head(x.mean(1)), x


def flat(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules, nn.Flatten())


SMALL = {
    # One pixel, pooling to a fixed size and dropout are no new map; a map that was flattened is none of tokens.
    "pooled": (
        lambda: nn.Sequential(flat(convolution(4), nn.AdaptiveAvgPool2d(2), nn.Dropout()), nn.Linear(16, 5)),
        "0.0",
    ),
    "one pixel": (lambda: nn.Sequential(convolution(4), flat(nn.Conv2d(4, 4, (16, 32))), nn.Linear(4, 5)), "0"),
    "flattened": (
        lambda: nn.Sequential(flat(convolution(128), nn.Flatten(2), nn.AvgPool1d(512)), nn.Linear(128, 5)),
        "0.0",
    ),
    # Maps of the scores say where each class is, not what the network sees.
    "scores": (lambda: flat(convolution(4), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)), "0"),
    "as many channels as scores": (lambda: nn.Sequential(convolution(4), nn.Conv2d(4, 5, 1), Head(5)), "1"),
    "a mask": (lambda: nn.Sequential(convolution(4), nn.Conv2d(4, 5, 1), nn.Upsample(scale_factor=2)), "0"),
    "branches": (Branches, "stem"),
    "a tuple": (TupleNet, "block"),
}


@pytest.mark.parametrize("kind", SMALL)
def test_small_networks(kind: str) -> None:
    build, name = SMALL[kind]
    model, image = build().eval(), torch.randn(1, 3, 16, 32)
    feature_map = last_feature_map(model, image)
    assert feature_map.name == name
    with feature_map.view() as layer:
        forward = (lambda x: model(x)[0]) if kind == "a tuple" else model
        target = (1, 0, 0) if kind == "a mask" else 1
        assert LayerGradCam(forward, layer).attribute(image, target).shape == (1, 1, *feature_map.shape[1:])


def test_a_module_that_runs_twice() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = Head(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.head(self.act(self.conv(x))))

    # Hooks on the activation tell of its last run, which gives the scores.
    assert last_feature_map(Net(), torch.rand(1, 3, 8, 8)).name == "conv"


def test_no_feature_map() -> None:
    dense = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    with pytest.raises(ValueError, match="No single feature map of this Sequential feeds the whole output"):
        last_feature_map(dense, torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"inputs have shapes \[\(1, 3, 8\)\]; expected an image"):
        last_feature_map(nn.Conv1d(3, 4, 3), torch.rand(1, 3, 8))
    with pytest.raises(ValueError, match="The model returned Tensor; expected scores that depend on the inputs"):
        last_feature_map(nn.Sequential(nn.Conv2d(3, 4, 3), Detached()), torch.rand(1, 3, 8, 8))


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.autograd.detect_anomaly])
@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:The model is in training mode")
def test_nothing_is_disturbed(context: type) -> None:
    model, images = TrainingNet(), torch.rand(2, 3, 8, 8)
    model.head.bias.grad = torch.ones(3)
    before = snapshot(model, images)
    with context():
        assert last_feature_map(model, images).name == "features"
    assert snapshot(model, images) == before
    model.head = nn.Linear(7, 3)
    before = snapshot(model, images)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        last_feature_map(model, images)
    assert snapshot(model, images) == before
