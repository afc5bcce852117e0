"""Classifiers of timm by name, with the smallest that timm has, and random weights."""

import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode

from captum_fusion._app.models.loading import load_classifier
from captum_fusion._app.models.preprocessing import GREY, Preprocessing
from captum_fusion._app.models.timm import preprocessing_of
from captum_fusion.explain import explain

PICTURE = Image.fromarray(
    (255 * np.stack(np.broadcast_arrays(*np.mgrid[0:1:300j, 0:1:400j], 0.5), axis=-1)).astype(np.uint8)
)


@pytest.mark.parametrize("changes", [{}, {"crop_mode": "squash", "crop_pct": 0.9}, {"interpolation": "bilinear"}])
def test_a_picture_is_prepared_as_timm_does(changes: dict[str, object]) -> None:
    config = timm.data.resolve_data_config(timm.create_model("test_vit").pretrained_cfg) | changes
    expected = timm.data.create_transform(**config, is_training=False)(PICTURE)[None]
    preprocessing = preprocessing_of("timm:test_vit", config)
    torch.testing.assert_close(preprocessing.normalize(preprocessing.crop(PICTURE)), expected, atol=0.02, rtol=0)
    frame = preprocessing.frame(*PICTURE.size)
    # The picture's red is its row, its green its column, and both go from 0 to 1.
    pixels = preprocessing.crop(PICTURE)[0]
    assert pixels[0, 0, 0] == pytest.approx(frame.y1 / 300, abs=0.01)
    assert pixels[0, -1, 0] == pytest.approx(frame.y2 / 300, abs=0.01)
    assert pixels[1, 0, -1] == pytest.approx(frame.x2 / 400, abs=0.01)


def test_other_crops_are_refused() -> None:
    with pytest.raises(ValueError, match="timm:x takes inputs of 3x224x224, cropped by 'border'; expected"):
        preprocessing_of("timm:x", {"crop_mode": "border"})
    with pytest.raises(ValueError, match="timm:x takes inputs of 1x28x28"):
        preprocessing_of("timm:x", {"input_size": (1, 28, 28)})


def test_a_model_with_its_categories() -> None:
    classifier = load_classifier("timm:test_vit", "none")
    assert (classifier.name, classifier.preprocessing.size) == ("timm:test_vit", 160)
    assert classifier.category(281) == "tabby"
    assert not classifier.model.training
    again = load_classifier("timm:test_vit", "none").model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in classifier.model.state_dict().items())


def test_a_model_object_brings_its_own_preprocessing() -> None:
    for options in ({}, {"size": 96}, {"mean": (0.1, 0.2, 0.3)}):
        expected = load_classifier("timm:test_vit", "none", **options).preprocessing
        model = timm.create_model("test_vit")
        assert load_classifier(model, **options).preprocessing == expected
    # A fine-tuned model has what its configuration says.
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "input_size": (3, 64, 64), "crop_pct": 1.0}
    assert load_classifier(model).preprocessing == Preprocessing(
        64, 64, (0.5,) * 3, (0.25,) * 3, InterpolationMode.BICUBIC
    )
    # One of grey pictures keeps the configuration of the coloured one that it was made from.
    grey = load_classifier(timm.create_model("test_resnet", in_chans=1)).preprocessing
    assert grey == GREY


def test_weights_of_ones_own(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit", num_classes=7).state_dict(), tmp_path / "weights.pt")
    classifier = load_classifier("timm:test_vit", str(tmp_path / "weights.pt"))
    assert classifier.scores(torch.rand(2, 3, 160, 160)).shape == (2, 7)
    assert classifier.categories is None


def test_names_that_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"timm .* has no model 'resnet5'\. Did you mean .*'resnet50'"):
        load_classifier("timm:resnet5", "none")
    with pytest.raises(
        ValueError, match=r"Unknown torchvision classifier 'vit_tiny_patch16_224'\..* pass timm:vit_tiny_patch16_224\."
    ):
        load_classifier("vit_tiny_patch16_224", "none")
    with pytest.raises(ValueError, match=r"For a model of Hugging Face, pass hf:google/vit-base-patch16-224\."):
        load_classifier("google/vit-base-patch16-224")
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ValueError, match=r"timm cannot build test_vit with its weights: .* Pass --weights FILE, or"):
        load_classifier("timm:test_vit")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm:test_vit needs the package timm: pip install '.\[timm\]'"):
        load_classifier("timm:test_vit", "none")


def unreachable(*_: object, **__: object) -> None:
    raise ConnectionError("the network is unreachable")


def test_explained() -> None:
    explanation = explain(PICTURE, model="timm:test_vit", weights="none", methods=["grad-cam", "score-cam"])
    assert str(explanation.feature_map) == "blocks.5.norm1, 64 channels of 10x10, a view of tokens"
    assert explanation.maps["grad-cam"].shape == (1, 1, 160, 160)
    assert explanation.maps["grad-cam"].any()
