"""Paired differences with intervals, tests that count how many were made, and effect sizes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap

from captum_fusion.benchmark._statistics import SIGNIFICANT, rank_biserial, signed_rank_p_value

# Smaller differences are rounding, and none.
_DECIMALS = 5
_RESAMPLES = 9999


class Difference(NamedTuple):
    """How much better the first of two methods is, over the pictures that both explained."""

    pictures: int
    mean: float
    low: float
    """The 95 % interval of the mean by the bias-corrected and accelerated bootstrap."""
    high: float
    effect: float
    """The matched-pairs rank-biserial correlation: 1 where each difference is in favour, -1 where none is."""
    p_value: float
    """Of Wilcoxon's signed-rank test, two-sided; of a family of comparisons by Holm's correction."""


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = bootstrap((values,), np.mean, n_resamples=_RESAMPLES, method="BCa", rng=np.random.default_rng(0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def difference(first: np.ndarray, second: np.ndarray, higher: bool) -> Difference:
    """The paired difference of two methods, positive where the first one is better.

    Args:
        first (ndarray): A measure of each picture, (N,).
        second (ndarray): The same of another method.
        higher (bool): Whether more is better.

    Returns:
        *Difference*, whose p value is not corrected.
    """
    values = np.round((first - second) * (1 if higher else -1), _DECIMALS)
    return Difference(
        len(values), float(values.mean()), *interval(values), rank_biserial(values), signed_rank_p_value(values)
    )


def holm(found: Mapping[str, Difference]) -> dict[str, Difference]:
    """The differences with p values that are corrected for their number, by Holm."""
    order = sorted(found, key=lambda name: found[name].p_value)
    corrected: dict[str, Difference] = {}
    highest = 0.0
    for place, name in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * found[name].p_value))
        corrected[name] = found[name]._replace(p_value=highest)
    return {name: corrected[name] for name in found}


def verdict(found: Sequence[Difference]) -> str:
    """Whether a method is better than all others.

    Returns:
        *str*: "holds" if it is significantly better than each of them, "does not hold" if one is significantly better,
        otherwise "cannot be told".
    """
    if all(each.p_value < SIGNIFICANT and each.mean > 0 for each in found):
        return "holds"
    if any(each.p_value < SIGNIFICANT and each.mean < 0 for each in found):
        return "does not hold"
    return "cannot be told"
