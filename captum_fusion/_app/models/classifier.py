"""Classifiers: a model with its preprocessing and the names of its categories."""

import json
import re
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights

from captum_fusion._app.messages import close_names, one_line, reason, words
from captum_fusion._app.models.preprocessing import IMAGENET, Preprocessing
from captum_fusion.arguments import Activation

# Scores that add up to 1 as closely are probabilities.
_ROUNDING = 1e-4


class LoadedModel(NamedTuple):
    """A model, and what its source knows about it."""

    network: nn.Module
    preprocessing: Preprocessing = IMAGENET
    categories: tuple[str, ...] | None = None
    activation: Activation = "softmax"


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode with what is needed to explain an image."""

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    categories: tuple[str, ...] | None
    activation: Activation = "softmax"

    def category(self, index: int) -> str:
        """The name of a class, or its index where there are no names."""
        return category_name(self.categories, index)

    def target(self, target: int | str, classes: int) -> int:
        """The class of a target.

        Args:
            target (int or str): An index, also as "index:3" or, where no category is named so, "3"; a category name; or
                a WordNet id of ImageNet's classes.
            classes (int): The number of classes.

        Raises:
            ValueError: If there is no such class, or if several classes fit.
        """
        text = str(target)
        number = text.removeprefix("index:")
        is_index = isinstance(target, int) or number != text
        names = [words(name) for name in self.categories or ()]
        named = [] if is_index else [index for index, name in enumerate(names) if name == words(text)]
        if is_index or (number.isdecimal() and not named):
            if not number.isdecimal() or int(number) >= classes:
                raise ValueError(
                    f"target is {number}; expected an index below {classes}, the model's number of classes"
                )
            return int(number)
        if number.isdecimal() and int(number) < classes and named != [int(number)]:
            raise ValueError(
                f"target is {text!r}, the name of class {named[0]} and the index of {self.category(int(number))!r}; "
                f"expected 'index:{named[0]}' or 'index:{number}'"
            )
        if len(named) > 1:
            raise ValueError(f"The categories {named} are all named {text!r}; pass one of these indices")
        if named:
            return named[0]
        if self.categories is None:
            raise ValueError(f"target is {text!r}, but {self.name} has no category names; expected an index")
        if re.fullmatch(r"n\d{8}", text) and self.categories == imagenet_categories():
            if text not in wordnet_indices():
                raise ValueError(f"target is {text}; expected the WordNet id of one of ImageNet's {classes} classes")
            return wordnet_indices()[text]
        close = close_names(words(text), names) or f" Expected a category name or an index below {classes}"
        raise ValueError(f"Unknown category {text!r}.{close}")

    def scores(self, inputs: Tensor) -> Tensor:
        """The model's output for each class, (N, classes).

        Raises:
            TypeError: If the model returns anything but a tensor of floating-point numbers.
            ValueError: If it does not return one score for each example and class.
            RuntimeError: If the model fails, or if scores are not finite.
        """
        try:
            with torch.no_grad():
                output = self.model(inputs)
        except RuntimeError as error:  # torch's own, of channels or types that differ, which name no model.
            raise RuntimeError(
                f"{self.name} fails on inputs of shape {tuple(inputs.shape)} and type {inputs.dtype}: {one_line(error)}"
            ) from error
        expected = "expected one score for each example and class, a tensor of shape (N, classes)"
        if not isinstance(output, Tensor):
            raise TypeError(f"{self.name} returns {type(output).__name__}; {expected}")
        least = 2 if self.activation == "softmax" else 1
        if output.dim() != 2 or len(output) != len(inputs) or output.shape[1] < least or not output.is_floating_point():
            alone = ", or the activation sigmoid" if output.dim() == 2 and output.shape[1] == 1 else ""
            raise ValueError(
                f"{self.name} returns shape {tuple(output.shape)} of {output.dtype} for {len(inputs)} examples; "
                f"{expected} with at least {least} classes{alone}"
            )
        if self.categories and len(self.categories) != output.shape[1]:
            raise ValueError(
                f"{self.name} returns {output.shape[1]} scores for {len(self.categories)} category names; expected one "
                "name for each score"
            )
        if not output.isfinite().all():
            raise RuntimeError(f"{self.name} returns scores that are not finite")
        if self.activation == "softmax" and output.min() >= 0 and (output.sum(dim=1) - 1).abs().max() < _ROUNDING:
            warnings.warn(
                f"{self.name} returns probabilities, and softmax is applied to them again; expected the scores before "
                "softmax",
                stacklevel=2,
            )
        return output

    def probabilities(self, scores: Tensor) -> Tensor:
        """The probabilities, (N, classes): by softmax of one of the classes, by sigmoid of each class by itself."""
        return scores.float().softmax(dim=1) if self.activation == "softmax" else scores.float().sigmoid()


def category_name(categories: tuple[str, ...] | None, index: int) -> str:
    """The name of a class, with its index where it shares the name, or its index where there are no names."""
    if not categories or index >= len(categories):
        return str(index)
    name = categories[index]
    return name if categories.count(name) == 1 else f"{name} ({index})"


def read_categories(file: Path) -> tuple[str, ...]:
    """The category names in a text file, one a line, or in a JSON file: a list, indices by name or names by index.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds anything else.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        names = json.loads(text) if file.suffix.lower() == ".json" else text.rstrip().splitlines()
        if isinstance(names, dict):
            indices = range(len(names))
            if sorted(names.values()) == list(indices):
                names = sorted(names, key=names.__getitem__)
            elif names.keys() == set(map(str, indices)):
                names = [names[str(index)] for index in indices]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} cannot be read as category names: {reason(error)}") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(
            f"{file} holds no category names, or an empty one; expected a name in each line, a JSON list of names, or "
            "a JSON object with the index of each name"
        )
    return tuple(names)


def imagenet_categories() -> tuple[str, ...]:
    """The names of ImageNet's 1000 classes as torchvision has them."""
    return tuple(ResNet50_Weights.DEFAULT.meta["categories"])


@cache
def wordnet_indices() -> dict[str, int]:
    """ImageNet's classes by their WordNet ids."""
    lines = files("captum_fusion._app.models").joinpath("imagenet_wordnet_ids.txt").read_text(encoding="utf-8").split()
    return {name: index for index, name in enumerate(lines)}
