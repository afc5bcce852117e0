"""The table of layers in the README: every family of torchvision's classifiers, and the layer to explain."""

import re
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from captum.attr import LayerGradCam
from torch import nn
from torchvision import models

from captum_fusion import LayerFusionCam, LayerXGradCam, spatial_view

README = Path(__file__).parents[1] / "README.md"
# The smallest sizes whose feature map has more than one pixel, or that the network takes; 96 for all others.
SIZES = {"inception_v3": 128, "maxvit_t": 224}


class Row(NamedTuple):
    families: list[str]
    examples: list[str]
    layer: str
    viewed: bool


@cache
def table() -> list[Row]:
    section = README.read_text().partition("\n## Where to look\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+) \| (.+) \| `(.+)` \| (yes|no) \|$", section, re.MULTILINE)
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
    vit = name.startswith("vit")
    model = models.get_model(name, weights=None, **{"image_size": size} if vit else {}).eval()
    if vit:
        nn.init.normal_(model.heads.head.weight)  # torchvision starts from zeros, which leave no gradient.
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        target = int(model(image).argmax())  # SqueezeNet's scores pass a ReLU, which leaves a low one no gradient.
    layer = model.get_submodule(row.layer)
    with spatial_view(layer) if row.viewed else nullcontext(layer) as explained:
        grad_cam = LayerGradCam(model, explained).attribute(image, target=target)
        fusion_cam = LayerFusionCam(model, explained, region_method=LayerXGradCam(model, explained))
        attributions = fusion_cam.attribute(image, target=target)
    assert grad_cam.shape[:2] == (1, 1)
    assert grad_cam.dim() == 4
    assert grad_cam.numel() > 1
    assert grad_cam.any()
    assert attributions.shape == image.shape
    assert attributions.isfinite().all()
