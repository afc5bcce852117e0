"""Image classifiers of Hugging Face from a folder, without a network, and with random weights."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from captum_fusion._app.models.hugging_face import _preprocessing
from captum_fusion._app.models.loading import load_classifier
from captum_fusion.explain import Explainer, explain
from tests.app.test_timm import PICTURE

LABELS = {0: "cat", 1: "dog", 2: "owl"}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def config() -> Any:
    return transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=64,
        patch_size=16,
        id2label=LABELS,
        label2id={name: index for index, name in LABELS.items()},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    transformers.ViTForImageClassification(config()).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    return tmp_path


def test_a_model_with_its_categories(folder: Path) -> None:
    classifier = load_classifier(f"hf:{folder}")
    assert classifier.categories == ("cat", "dog", "owl")
    inputs = classifier.preprocessing.normalize(classifier.preprocessing.crop(PICTURE))
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    expected = model(**transformers.AutoImageProcessor.from_pretrained(folder)(PICTURE, return_tensors="pt")).logits
    torch.testing.assert_close(classifier.scores(inputs), expected, atol=1e-2, rtol=1e-2)
    random = load_classifier(f"hf:{folder}", "none")
    assert random.categories == ("cat", "dog", "owl")
    assert not torch.equal(random.scores(inputs), classifier.scores(inputs))


@pytest.mark.parametrize(
    ("changes", "activation"),
    [
        ({}, "softmax"),
        ({"problem_type": "single_label_classification"}, "softmax"),
        ({"problem_type": "multi_label_classification"}, "sigmoid"),
        ({"num_labels": 1}, "sigmoid"),
    ],
)
def test_probabilities_are_those_of_the_models_own_pipeline(
    folder: Path, changes: dict[str, Any], activation: str
) -> None:
    changed = config()
    for name, value in changes.items():
        setattr(changed, name, value)
    transformers.ViTForImageClassification(changed).save_pretrained(folder)
    pipeline = transformers.pipeline("image-classification", model=str(folder), image_processor=str(folder))
    expected = [each["score"] for each in pipeline(PICTURE)]
    explainer = Explainer(f"hf:{folder}")
    prediction = explainer.open(PICTURE).prediction
    assert explainer.classifier.activation == activation
    assert [probability for *_, probability in prediction.top()] == pytest.approx(expected, abs=1e-3)
    # An option wins over the configuration.
    assert load_classifier(f"hf:{folder}", activation="sigmoid").activation == "sigmoid"


def test_a_regression_model_is_refused(folder: Path) -> None:
    changed = config()
    changed.num_labels, changed.problem_type = 1, "regression"
    transformers.ViTForImageClassification(changed).save_pretrained(folder)
    with pytest.raises(ValueError, match="is a regression model; expected an image classifier"):
        load_classifier(f"hf:{folder}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_folders_load_in_single_precision(folder: Path, dtype: torch.dtype) -> None:
    transformers.AutoModelForImageClassification.from_pretrained(folder).to(dtype).save_pretrained(folder)
    classifier = load_classifier(f"hf:{folder}")
    assert {parameter.dtype for parameter in classifier.model.parameters()} == {torch.float32}
    assert classifier.scores(torch.rand(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize(
    "processor",
    [
        transformers.ViTImageProcessor(),
        transformers.ViTImageProcessor(do_normalize=False, resample=3),
        transformers.CLIPImageProcessor(),
        transformers.ConvNextImageProcessor(size={"shortest_edge": 224}),
        transformers.ConvNextImageProcessor(size={"shortest_edge": 384}),
        transformers.LevitImageProcessor(),
        transformers.EfficientNetImageProcessor(size={"height": 100, "width": 100}, rescale_offset=True),
        transformers.MobileNetV2ImageProcessor(),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_a_picture_is_prepared_as_the_processor_does(processor: Any) -> None:
    preprocessing = _preprocessing("x", processor)
    expected = torch.as_tensor(processor(PICTURE, return_tensors="np")["pixel_values"])
    given = preprocessing.normalize(preprocessing.crop(PICTURE))
    torch.testing.assert_close(given, expected, atol=0.03 / min(preprocessing.std), rtol=0)


@pytest.mark.parametrize(
    "processor", [transformers.MobileViTImageProcessor(), transformers.ViTImageProcessor(do_resize=False)]
)
def test_what_a_processor_does_besides_is_not_left_out(processor: Any) -> None:
    with pytest.raises(ValueError, match="of x does more than resize, crop the centre and normalize"):
        _preprocessing("x", processor)


def test_what_is_no_classifier(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.ViTModel(config()).save_pretrained(tmp_path / "features")
    transformers.ViTImageProcessor().save_pretrained(tmp_path / "features")
    with pytest.raises(
        ValueError, match=r"has no weights for classifier\.bias, classifier\.weight of ViTForImageClass"
    ):
        load_classifier(f"hf:{tmp_path / 'features'}")
    with pytest.raises(ValueError, match="Hugging Face cannot load nobody/nothing: "):
        load_classifier("hf:nobody/nothing")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs the package transformers: pip install '.\[hugging-face\]'"):
        load_classifier(f"hf:{folder}")


def test_explained(folder: Path) -> None:
    explanation = explain(PICTURE, model=f"hf:{folder}", target="owl", methods=["fusion-cam"])
    assert str(explanation.feature_map) == "vit.layers.1.layernorm_before, 16 channels of 4x4, a view of tokens"
    assert explanation.target == 2
    named = explain(PICTURE, model=f"hf:{folder}", target="owl", layer="vit.layers.0", methods=["grad-cam"])
    assert named.feature_map.shape == (16, 4, 4)
    asked = explain(
        PICTURE, model=f"hf:{folder}", target="owl", layer="vit.layers.0", grid=(4, 4), methods=["grad-cam"]
    )
    assert asked.feature_map.shape == (16, 4, 4)
    with pytest.raises(ValueError, match=r"17 tokens do not fit the grid \(5, 5\)"):
        explain(PICTURE, model=f"hf:{folder}", layer="vit.layers.0", grid=(5, 5))
    with pytest.raises(ValueError, match=r"The grid is \(4, 4\), but no layer is named"):
        explain(PICTURE, model=f"hf:{folder}", grid=(4, 4))


def test_a_model_that_is_given_may_return_its_scores_among_others(folder: Path) -> None:
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    hooks = len(model._forward_hooks)
    given = explain(PICTURE, model=model, size=64, methods=["grad-cam"], activation="sigmoid")
    assert len(model._forward_hooks) == hooks

    def probabilities(x: Tensor) -> Tensor:
        return model(x).logits.sigmoid()

    pixels = (given.pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    torch.testing.assert_close(given.probabilities, probabilities(pixels)[0].detach(), atol=1e-5, rtol=1e-4)
