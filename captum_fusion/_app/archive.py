"""The raw maps of an explanation as an archive of NumPy's."""

import io
import json
from importlib.metadata import version
from typing import Any

import numpy as np

from captum_fusion.explain import Explanation


def archive(explanation: Explanation) -> bytes:
    """The maps and what they were made with, as the content of a .npz file."""
    metadata = {
        "image": explanation.image,
        "model": explanation.model,
        "weights": explanation.weights,
        "layer": explanation.layer,
        "target": explanation.target,
        "category": explanation.category,
        "percentile": explanation.percentile,
        "weighting": explanation.weighting,
        "tolerance": explanation.tolerance,
        "probability": explanation.probability,
        "probability_kept": explanation.kept,
        "version": version("captum-fusion"),
    }
    arrays: dict[str, Any] = {name: values[0, 0].numpy() for name, values in explanation.maps.items()}
    content = io.BytesIO()
    np.savez_compressed(content, metadata=json.dumps(metadata), pixels=explanation.pixels[0].numpy(), **arrays)
    return content.getvalue()
