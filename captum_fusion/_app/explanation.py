"""Predictions of a model for a picture, and explanations of them."""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from captum_fusion import FeatureMap, FusionCamStages
from captum_fusion._app.models.classifier import category_name
from captum_fusion._app.models.preprocessing import Frame
from captum_fusion.arguments import Weighting


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The prediction of a model for a picture."""

    image: str
    """The picture's file, or what it is."""
    model: str
    """The name of the model."""
    weights: str
    """The source of its weights: "default", "none" for random ones, or a file."""
    layer: str
    """The dotted name of the layer that is explained."""
    feature_map: FeatureMap
    """The layer, and how its output is a feature map."""
    categories: tuple[str, ...] | None
    """The names of all classes, or None if the model has none."""
    probabilities: Tensor
    """The probability of each class, shape (K,)."""
    pixels: Tensor
    r"""The picture as the model sees it, (1, 3, \*S) in [0, 1]."""
    frame: Frame
    """The place of these pixels in the upright picture, in its own pixels: x1, y1, x2, y2."""
    notes: tuple[str, ...]
    """Remarks for a reader of the maps, such as how the picture's values were brought to 8 bits."""

    def category_of(self, index: int) -> str:
        """The name of a class, or its index where there are no names."""
        return category_name(self.categories, index)

    def top(self, count: int = 5) -> list[tuple[int, str, float]]:
        """The most probable classes: index, name and probability."""
        best = self.probabilities.topk(min(count, len(self.probabilities)))
        return [
            (index, self.category_of(index), value)
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Explanation(Prediction):
    r"""Maps of the evidence for a class in a picture, by one or more methods.

    The keys of ``maps`` and ``masked_probabilities`` are the names of the methods, or of the stages of Fusion-CAM where
    no method was chosen.
    """

    target: int
    """The class that is explained."""
    percentile: float
    """The percentile of the denoising step."""
    weighting: Weighting
    """The weighting of fusions that name none."""
    tolerance: float
    """The largest error of Score-CAM's map."""
    maps: dict[str, Tensor]
    r"""The maps, (1, 1, \*S) in [0, 1]. A map without evidence for the class is all zeros."""
    masked_probabilities: dict[str, float]
    """The probability of the target when each map masks the picture."""
    stages: dict[str, FusionCamStages]
    """The stages of each fusion, with what each contributes."""

    @property
    def probability(self) -> float:
        """The probability of the target."""
        return float(self.probabilities[self.target])

    @property
    def category(self) -> str:
        """The name of the target, or its index where there are no names."""
        return self.category_of(self.target)

    @property
    def kept(self) -> dict[str, float]:
        """The former name of ``masked_probabilities``, for one release."""
        warnings.warn("kept is now masked_probabilities", DeprecationWarning, stacklevel=2)
        return self.masked_probabilities


class Curve(NamedTuple):
    """The probability of a class over the share of the pixels that is restored or removed."""

    area: float
    """The area under the curve, in [0, 1]."""
    fractions: Tensor
    """The share of the pixels, from 0 to 1, shape (steps + 1,)."""
    probabilities: Tensor
    """The probability at each of these, shape (steps + 1,)."""


class Curves(NamedTuple):
    """The probability of a class as pixels are restored, or removed, in the order of a map."""

    insertion: Curve
    """Restored, from the blurred picture on; more area is better."""
    deletion: Curve
    """Removed; less area is better."""
