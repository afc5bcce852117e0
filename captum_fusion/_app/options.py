"""What is chosen by name, and its defaults: known without torch, for which ``--help`` need not wait."""

from typing import Literal

# The pointing games and the instances need boxes or masks of objects.
LOCALIZATION = (
    "pointing_game",
    "energy_pointing_game",
    "mask_pointing_game",
    "mask_energy_pointing_game",
    "instances_reached",
)
METRICS = (
    "confidence_drop",
    "confidence_increase",
    "insertion",
    "deletion",
    "coherency",
    "complexity",
    "adcc",
    "road",
    *LOCALIZATION,
)
Target = Literal["predicted", "label", "best-label"]
Precision = Literal["float32", "bfloat16", "float16"]

DEFAULT_MODEL = "efficientnet-lite0"
"""The network whose ImageNet weights the demo extra brings."""

DEFAULT_ALPHA = 0.8
"""How much of the photograph a map covers where it is 1, in [0, 1]."""
