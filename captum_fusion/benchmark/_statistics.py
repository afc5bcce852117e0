"""Paired comparisons of methods over the images that both explained."""

from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, rankdata, sem, t, wilcoxon

from captum_fusion._app.settings import MEASURES

SIGNIFICANT = 0.05
# The largest number of differences for which the test enumerates the signs.
_EXACT = 50
# Smaller differences are rounding.
_DECIMALS = 5
_COLUMNS = (
    "measure first second explanations mean_difference interval_low interval_high effect_size p_value adjusted_p_value "
    "better"
)


def pairwise_tests(values: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Compares each pair of methods in each measure; values have a row for each image and a column for each method.

    A method is significantly better where the adjusted p value is below 0.05 and the mean and the ranks agree in their
    direction; see ``report`` for the columns.
    """
    rows = []
    for measure, table in values.items():
        tested = []
        for first, second in combinations(table.columns, 2):
            both = table[[first, second]].dropna()
            difference = np.round((both[first] - both[second]).to_numpy(dtype=float), _DECIMALS)
            if len(difference):
                mean, half = interval(difference)
                sizes = (mean, mean - half, mean + half, rank_biserial(difference), signed_rank_p_value(difference))
                tested.append((measure, first, second, len(difference), *sizes))
        adjusted = false_discovery_control([row[-1] for row in tested], method="by") if tested else []
        for row, p_value in zip(tested, adjusted, strict=True):
            mean, effect = row[4], row[7]
            winner = (row[1] if (mean > 0) == MEASURES[measure].higher else row[2]) if mean * effect > 0 else ""
            rows.append((*row, p_value, winner if p_value < SIGNIFICANT else ""))
    return pd.DataFrame(rows, columns=_COLUMNS.split())


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the first axis and half of its 95 % interval by Student's t.

    The half is NaN for a single value, and where all values are equal, which do not tell how far others spread.
    """
    count = len(values)
    if count < 2:
        return values.mean(axis=0), np.full(values.shape[1:], np.nan)
    half = np.asarray(t.ppf(0.975, count - 1) * sem(values, axis=0))
    return values.mean(axis=0), np.where(np.ptp(values, axis=0) > 0, half, np.nan)


def rank_biserial(differences: np.ndarray) -> float:
    """The share of the ranks of positive differences minus that of negative ones; differences of 0 are dropped.

    It is 1 where all are positive, -1 where all are negative, and 0 where none is left.
    """
    differences = differences[differences != 0]
    ranks = rankdata(np.abs(differences))
    return float((ranks * np.sign(differences)).sum() / ranks.sum()) if len(differences) else 0.0


def signed_rank_p_value(differences: np.ndarray) -> float:
    """The two-sided p value of Wilcoxon's signed-rank test; differences of 0 are dropped.

    Up to 50 differences it is exact, also with ties, which SciPy's exact test does not take; beyond, it is by the
    normal distribution.
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
    """Compares each method with the "best" mean of a measure, by the paired tests of that measure.

    The others are "worse" where they are significantly worse, else "equal", or "untested" without common images.
    """
    means = means.dropna()
    if not len(means):
        return {}
    best = means.idxmax() if higher else means.idxmin()
    marks = dict.fromkeys(means.index, "untested")
    for first, second, better in pairs[["first", "second", "better"]].itertuples(index=False):
        if best in (first, second):
            marks[second if first == best else first] = "worse" if better == best else "equal"
    return marks | {best: "best"}
