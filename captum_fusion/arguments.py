"""Arguments that several methods share: their choices and ranges, checked without importing torch."""

from typing import Literal, get_args

Activation = Literal["softmax", "sigmoid"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

Weighting = Literal["raw", "released", "normalized"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)

InterpolateMode = Literal["bilinear", "nearest", "nearest-exact", "area"]
INTERPOLATE_MODES: tuple[InterpolateMode, ...] = get_args(InterpolateMode)

Sign = Literal["positive", "negative", "absolute_value", "all"]
SIGNS: tuple[Sign, ...] = get_args(Sign)


def check_activation(activation: object) -> None:
    """Refuses an unknown activation."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {ACTIVATIONS} or None")


def check_percentile(percentile: float) -> None:
    """Refuses a percentile outside [0, 100)."""
    if not 0 <= percentile < 100:
        raise ValueError(f"percentile is {percentile}; expected a number in [0, 100)")


def check_tolerance(tolerance: object) -> None:
    """Refuses anything but a number in [0, 1)."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance!r}; expected a number in [0, 1)")


def check_weighting(weighting: object) -> None:
    """Refuses an unknown weighting."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting is {weighting!r}; expected one of {WEIGHTINGS}")
