"""Predictions of a model for an image, and explanations of them."""

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
    """The prediction of a model for an image."""

    image: str
    """The image's file, or a description of the image."""
    model: str
    """The name of the model."""
    weights: str
    """The source of its weights: "default", "none" for random weights, or a file."""
    precision: str
    """The precision of the forward passes: "float32", "bfloat16" or "float16"."""
    layer: str
    """The dotted name of the explained layer."""
    feature_map: FeatureMap
    """The layer and the form of its feature map."""
    categories: tuple[str, ...] | None
    """The names of all classes, or None if the model has none."""
    probabilities: Tensor
    """The probability of each class, shape (K,)."""
    pixels: Tensor
    r"""The model's crop of the image, (1, 3, \*S) in [0, 1]."""
    frame: Frame
    """The position of this crop in the upright image, in pixels of the image: x1, y1, x2, y2."""
    notes: tuple[str, ...]
    """Remarks for a reader of the maps, such as a conversion of the image's values to 8 bits."""

    def category_of(self, index: int) -> str:
        """Returns the name of a class, or its index if there are no names."""
        return category_name(self.categories, index)

    def top(self, count: int = 5) -> list[tuple[int, str, float]]:
        """Returns the most probable classes: index, name and probability."""
        best = self.probabilities.topk(min(count, len(self.probabilities)))
        return [
            (index, self.category_of(index), value)
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Explanation(Prediction):
    r"""Maps of the evidence for a class in an image, by one or more methods.

    The keys of ``maps`` and ``masked_probabilities`` are the names of the methods, or, without a choice of methods, of
    the stages of Fusion-CAM.
    """

    target: int
    """The explained class."""
    percentile: float
    """The percentile of the denoising step."""
    weighting: Weighting
    """The weighting of fusions whose name has no weighting."""
    tolerance: float
    """The largest estimated error of Score-CAM's map."""
    maps: dict[str, Tensor]
    r"""The maps, (1, 1, \*S) in [0, 1]. A map without evidence for the class is all zeros."""
    masked_probabilities: dict[str, float]
    """The probability of the target when each map masks the image."""
    stages: dict[str, FusionCamStages]
    """The stages of each fusion, with their contributions."""

    @property
    def probability(self) -> float:
        """The probability of the target."""
        return float(self.probabilities[self.target])

    @property
    def category(self) -> str:
        """The name of the target, or its index if there are no names."""
        return self.category_of(self.target)

    @property
    def kept(self) -> dict[str, float]:
        """The former name of ``masked_probabilities``, for one release."""
        warnings.warn("kept is now masked_probabilities", DeprecationWarning, stacklevel=2)
        return self.masked_probabilities


class Curve(NamedTuple):
    """The probability of a class over the fraction of restored or removed pixels."""

    area: float
    """The area under the curve, in [0, 1]."""
    fractions: Tensor
    """The fraction of changed pixels, from 0 to 1, shape (steps + 1,)."""
    probabilities: Tensor
    """The probability at each fraction, shape (steps + 1,)."""


class Curves(NamedTuple):
    """The insertion and deletion curves of a map."""

    insertion: Curve
    """The curve as pixels of the blurred image are restored; more area is better."""
    deletion: Curve
    """The curve as pixels are removed; less area is better."""
