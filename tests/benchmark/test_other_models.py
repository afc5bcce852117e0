"""Models whose layers give tokens, and whose scores are no softmax's."""

from pathlib import Path

import pytest
from captum.attr import LayerGradCam

from captum_fusion import last_feature_map
from captum_fusion._app.models.loading import load_classifier
from captum_fusion.metrics import confidence_drop
from tests.benchmark.conftest import bench, preprocessed, records

QUICK = {"methods": ["grad-cam"], "metrics": ["confidence_drop"], "limit": 2}


def test_tokens(pictures: Path, tmp_path: Path) -> None:
    options = QUICK | {"models": ["timm:test_vit"], "weights": ["none"]}
    bench(pictures, tmp_path / "out", **options)
    classifier = load_classifier("timm:test_vit", "none")
    for record in records(tmp_path / "out"):
        inputs = preprocessed(classifier, pictures / record["image"])
        with last_feature_map(classifier.model, inputs).view() as layer:
            grad_cam = LayerGradCam(classifier.model, layer).attribute(inputs, record["target"])
        expected = confidence_drop(classifier.model, inputs, grad_cam, target=record["target"]).item()
        assert record["confidence_drop"] == pytest.approx(expected, abs=1e-5)
        assert record["layer"] == "blocks.5.norm1"
    # A grid belongs to the settings of a record, also where it is the one that follows from the input.
    with pytest.raises(ValueError, match=r"holds records with grid = None, not \[10, 10\]; expected the same"):
        bench(pictures, tmp_path / "out", layers=["blocks.5.norm1"], grid=(10, 10), **options)


def test_a_sigmoid(pictures: Path, tmp_path: Path) -> None:
    options = QUICK | {"models": ["tests.app.test_cli:binary"], "layers": ["relu"]}
    bench(pictures, tmp_path / "out", activation="sigmoid", **options)
    classifier = load_classifier("tests.app.test_cli:binary", activation="sigmoid")
    for record in records(tmp_path / "out"):
        inputs = preprocessed(classifier, pictures / record["image"])
        grad_cam = LayerGradCam(classifier.model, classifier.model.relu).attribute(inputs, 0)
        expected = confidence_drop(classifier.model, inputs, grad_cam, target=0, activation="sigmoid").item()
        assert record["confidence_drop"] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="or the activation sigmoid"):
        bench(pictures, tmp_path / "other", **options)
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        bench(pictures, tmp_path / "other", activation="tanh", **options)
