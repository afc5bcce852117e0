"""Panels of the page, as values for its scripts."""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from captum_fusion._app.drawing import COLOURS
from captum_fusion._app.methods import parse_method
from captum_fusion.explain import Curve, Explanation, Prediction
from captum_fusion.page._samples import Sample

Part = dict[str, Any]
NOTHING = json.dumps({"rows": [], "note": ""})
NO_CLASSES = json.dumps({"classes": []})
_TOP = 5
_THUMBNAIL = (160, 160)


def palette() -> list[list[int]]:
    """The colours of the values from 0 to 1, in 256 steps."""
    colours: list[list[int]] = (colormaps[COLOURS](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(int).tolist()
    return colours


def labelled(prediction: Prediction) -> list[tuple[str, int]]:
    """The names of all classes with their indices."""
    return [(prediction.category_of(index), index) for index in range(len(prediction.probabilities))]


def bars(prediction: Prediction, chosen: Sequence[int]) -> str:
    """The most probable classes, and the other chosen ones."""
    top = prediction.top(_TOP)
    top_indices = {index for index, _, _ in top}
    top += [
        (index, prediction.category_of(index), float(prediction.probabilities[index]))
        for index in chosen
        if index not in top_indices
    ]
    return json.dumps(
        {
            "classes": [
                {"index": index, "name": name, "probability": probability, "chosen": index in chosen}
                for index, name, probability in top
            ]
        }
    )


def pictures(samples: Sequence[Sample]) -> str:
    """The sample photographs."""
    return json.dumps(
        {"samples": [{"caption": each.caption, "picture": _thumbnail(each.photograph.image)} for each in samples]}
    )


def download(name: str, content: bytes) -> str:
    """A file to download."""
    return json.dumps({"name": name, "address": _address(content, "application/octet-stream")})


def maps(
    begun: float,
    prediction: Prediction,
    targets: Sequence[int],
    explanations: Mapping[int, Explanation],
    methods: Sequence[str],
) -> str:
    """The maps of each target; maps that are not ready are pending. ``begun`` is the time at which the run began."""
    rows = []
    for target in targets:
        panels: list[Part] = []
        for name in methods:
            if target in explanations and name in explanations[target].maps:
                note = f"keeps P = {explanations[target].masked_probabilities[name]:.3f}"
                panels.append(_heat(name, explanations[target].maps[name], note))
            else:
                panels.append({"kind": "pending", "name": name})
        rows.append(_row(prediction, target, panels))
    return _view(prediction, rows, "scale", begun=begun)


def stages(explanations: Sequence[Explanation]) -> str:
    """The stages of each fusion, with what they contribute to the probability."""
    return _of_fusions(
        explanations,
        lambda name, parts, stage: [
            _heat(f"G: {parts[0]}", stage.gradient, "the gradient map"),
            _heat("D: denoised", stage.denoised, f"contributes {float(stage.gradient_contribution):+.3f}"),
            _heat(f"R: {parts[1]}", stage.region, f"contributes {float(stage.region_contribution):+.3f}"),
            _heat("C: combined", stage.combined, f"contributes {float(stage.combined_contribution):+.3f}"),
            _heat(name, stage.fused, "the fusion of C and R"),
        ],
        "scale",
    )


def agreement(explanations: Sequence[Explanation]) -> str:
    """The agreement of the denoised gradient map and the region map of each fusion."""
    return _of_fusions(
        explanations,
        lambda name, parts, stage: [
            _heat(f"D: {parts[0]}", stage.denoised, "the denoised gradient map"),
            _heat(f"R: {parts[1]}", stage.region, "the region map"),
            {
                "kind": "agreement",
                "name": f"{name}: D and R",
                "note": "one is high, or both are",
                "first": _encoded(stage.denoised),
                "second": _encoded(stage.region),
            },
        ],
        "agreement",
    )


def curve(label: str, drawn: Curve) -> pd.DataFrame:
    """The points of a curve."""
    return pd.DataFrame(
        {
            "share of the pixels": drawn.fractions.numpy(),
            "P": drawn.probabilities.numpy(),
            "map": f"{label}: {drawn.area:.3f}",
        }
    )


def _of_fusions(explanations: Sequence[Explanation], panels_of: Any, legend: str) -> str:
    if not any(explanation.stages for explanation in explanations):
        return json.dumps({"rows": [], "note": "No fusion among the methods."})
    rows = []
    for explanation in explanations:
        panels: list[Part] = []
        for name, stage in explanation.stages.items():
            panels += panels_of(name, parse_method(name).components, stage)
        rows.append(_row(explanation, explanation.target, panels))
    return _view(explanations[0], rows, legend)


def _row(prediction: Prediction, target: int, panels: Sequence[Part]) -> Part:
    return {
        "name": prediction.category_of(target),
        "probability": float(prediction.probabilities[target]),
        "panels": panels,
    }


def _view(prediction: Prediction, rows: Sequence[Part], legend: str, **further: float) -> str:
    pixels = (prediction.pixels[0].permute(1, 2, 0) * 255).round().byte().numpy()
    content = BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return json.dumps(
        {
            "height": pixels.shape[0],
            "width": pixels.shape[1],
            "photograph": _address(content.getvalue(), "image/png"),
            "rows": rows,
            "legend": legend,
            **further,
        }
    )


def _heat(name: str, values: Tensor, note: str) -> Part:
    return {
        "kind": "heat",
        "name": name,
        "note": note if values.any() else "empty: no positive evidence for the class",
        "values": _encoded(values),
    }


def _encoded(values: Tensor) -> str:
    """A map's values in 16 bits each."""
    return b64encode((values[0, 0].numpy() * 65535).round().astype("<u2").tobytes()).decode()


def _address(content: bytes, kind: str) -> str:
    """A file as an address that holds it."""
    return f"data:{kind};base64,{b64encode(content).decode()}"


def _thumbnail(image: Image.Image) -> str:
    """A small picture as an address."""
    small, content = image.copy(), BytesIO()
    small.thumbnail(_THUMBNAIL)
    small.save(content, format="JPEG", quality=88)
    return _address(content.getvalue(), "image/jpeg")
