import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from captum_fusion._app.models.classifier import Classifier
from captum_fusion.benchmark import Settings, _report, run

MODEL = "tests.app.test_cli:small_net"
OPTIONS: dict[str, Any] = {"models": [MODEL], "layers": ["relu"], "methods": ["grad-cam", "fusion-cam"], "steps": 5}
# What needs the fewest forward passes.
QUICK: dict[str, Any] = OPTIONS | {"methods": ["grad-cam"], "metrics": ["confidence_drop"]}


def save_picture(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 240), Image.Resampling.BICUBIC).save(file)


def bench(images: object, output: Path, **options: Any) -> Path:
    return run(Settings(images=str(images), output=output, **options))


def records(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("records-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def write_records(folder: Path, lines: Iterable[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "records-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def preprocessed(classifier: Classifier, file: Path) -> Tensor:
    with Image.open(file) as picture:
        return classifier.preprocessing.normalize(classifier.preprocessing.crop(picture))


@pytest.fixture
def charts() -> None:
    """For tests that look at the charts, which take most of the time."""


@pytest.fixture(autouse=True)
def _no_charts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "charts" not in request.fixturenames:
        for name in ("measures_chart", "curves_chart", "explanations_chart", "render"):
            monkeypatch.setattr(_report, name, lambda *_: b"")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of five pictures."""
    for index in range(5):
        save_picture(tmp_path / "pictures" / f"{index}.jpg", index)
    return tmp_path / "pictures"


def made_up(method: str, image: str, **values: Any) -> dict[str, Any]:
    """A record of nothing, with an empty map."""
    base = {"model": "net", "weights": "default", "layer": "relu", "image": image, "requested": "predicted"}
    base |= {"method": method, "percentile": None, "stage": None, "file": f"gone/{image}", "target": 0}
    return base | {"category": "0", "frame": [0, 0, 9, 9], "map": "AAAA" * 3, "seconds": 1.0, "empty": True} | values
