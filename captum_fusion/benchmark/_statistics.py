"""Which methods differ: paired tests over the pictures that both explained."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, rankdata, wilcoxon

SIGNIFICANT = 0.05
# Up to so many differences the test counts every way in which their signs could have fallen.
_EXACT = 50
# Smaller differences are rounding, and none: methods that are the same but for it do not differ.
_DECIMALS = 5
_COLUMNS = [
    "measure",
    "first",
    "second",
    "explanations",
    "mean_difference",
    "effect_size",
    "p_value",
    "adjusted_p_value",
]


def pairwise_tests(values: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The paired test of each two methods.

    Args:
        values (dict): For each measure the values, a row for each picture and a column for each method.

    Returns:
        *pandas.DataFrame* with a row for each measure and pair that has pictures in common: the mean difference,
        the matched-pairs rank-biserial correlation as its effect size, its p value by Wilcoxon's signed-rank test, and
        that value adjusted for the number of pairs of the measure by Benjamini and Yekutieli.
    """
    rows = []
    for measure, table in values.items():
        tested = []
        for first, second in combinations(table.columns, 2):
            both = table[[first, second]].dropna()
            difference = np.round((both[first] - both[second]).to_numpy(dtype=float), _DECIMALS)
            if len(difference):
                sizes = (difference.mean(), rank_biserial(difference), signed_rank_p_value(difference))
                tested.append((measure, first, second, len(difference), *sizes))
        adjusted = false_discovery_control([row[-1] for row in tested], method="by") if tested else []
        rows += [(*row, value) for row, value in zip(tested, adjusted, strict=True)]
    return pd.DataFrame(rows, columns=_COLUMNS)


def rank_biserial(differences: np.ndarray) -> float:
    """The share of the ranks of positive differences minus that of negative ones, differences of 0 left out.

    It is 1 where all are positive, -1 where all are negative, and 0 where there are none.
    """
    differences = differences[differences != 0]
    ranks = rankdata(np.abs(differences))
    return float((ranks * np.sign(differences)).sum() / ranks.sum()) if len(differences) else 0.0


def signed_rank_p_value(differences: np.ndarray) -> float:
    """The two-sided p value of Wilcoxon's signed-rank test, differences of 0 left out.

    Up to 50 differences it is exact, also where some are equal, as those of values that are 0 or 1 are; beyond, it is
    by the normal distribution.
    """
    differences = differences[differences != 0]
    if len(differences) == 0:
        return 1.0
    if len(differences) > _EXACT:
        return float(wilcoxon(differences).pvalue)
    # Twice the ranks, which are whole numbers also where equal differences share a rank.
    ranks = np.round(2 * rankdata(np.abs(differences))).astype(int)
    # The number of ways to choose signs for each sum of positive ranks.
    ways = np.zeros(ranks.sum() + 1)
    ways[0] = 1
    for rank in ranks:
        ways[rank:] += ways[:-rank].copy()
    positive = int(ranks[differences > 0].sum())
    extreme = min(positive, int(ranks.sum()) - positive)
    return min(1.0, 2 * float(ways[: extreme + 1].sum() / 2.0 ** len(ranks)))


def significance_marks(means: "pd.Series[float]", pairs: pd.DataFrame, higher: bool) -> dict[str, str]:
    """What sets each method apart from the best one.

    Args:
        means (Series): The mean of a measure for each method.
        pairs (DataFrame): The paired tests of that measure.
        higher (bool): Whether more is better.

    Returns:
        *dict* of "best" for the best mean, "worse" for those that differ from it significantly, "equal" for those that
        do not, and "untested" for those that have no picture in common with it.
    """
    means = means.dropna()
    if not len(means):
        return {}
    best = means.idxmax() if higher else means.idxmin()
    marks = dict.fromkeys(means.index, "untested")
    for first, second, p_value in pairs[["first", "second", "adjusted_p_value"]].itertuples(index=False):
        if best in (first, second):
            marks[second if first == best else first] = "worse" if p_value < SIGNIFICANT else "equal"
    return marks | {best: "best"}


def on_different_pictures(explained: Sequence[set[tuple[str, str]]]) -> bool:
    """Whether methods were judged on different pictures, so that their means are not of the same."""
    return any(pictures != explained[0] for pictures in explained)
