"""Arguments that several methods share: their choices, known without importing torch."""

from typing import Literal, get_args

Activation = Literal["softmax", "sigmoid"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

Weighting = Literal["normalized", "raw", "released"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
