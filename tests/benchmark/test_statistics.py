"""Significance, its correction and its signs, against independent computations and records of known truth."""

from fractions import Fraction
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import wilcoxon

from captum_fusion.benchmark import _report, report
from captum_fusion.benchmark._charts import measures_chart
from captum_fusion.benchmark._records import read_records
from captum_fusion.benchmark._statistics import interval, rank_biserial, signed_rank_p_value
from tests.benchmark.conftest import made_up, write_records


def by_enumeration(differences: list[int]) -> float:
    """Wilcoxon's two-sided p value: the share of all ways to choose signs that are as extreme as those given."""
    nonzero = [value for value in differences if value]
    sizes = sorted(abs(value) for value in nonzero)
    ranks = [
        Fraction(sum(i + 1 for i, size in enumerate(sizes) if size == abs(v)), sizes.count(abs(v))) for v in nonzero
    ]
    middle = sum(ranks, Fraction(0)) / 2
    given = abs(sum((rank for rank, value in zip(ranks, nonzero, strict=True) if value > 0), Fraction(0)) - middle)
    ways = [
        abs(sum((rank for rank, up in zip(ranks, signs, strict=True) if up), Fraction(0)) - middle) >= given
        for signs in product([False, True], repeat=len(ranks))
    ]
    return sum(ways) / len(ways)


def test_the_exact_p_value_counts_every_way_the_signs_could_fall() -> None:
    for differences in [
        [1],
        [3, 1, -2, 5, 4],
        [1, 1, 1, 1, 1],
        [1, 1, 1, -1, 1, 0, 0],
        [2, 2, -1, 3, -3, 7, 0, 5],
        [-4, -3, -9, -1, -6, -6, 2, 2, -8, -1],
    ]:
        assert signed_rank_p_value(np.array(differences, dtype=float)) == pytest.approx(by_enumeration(differences))


def test_five_times_better_of_five_is_one_way_in_sixteen() -> None:
    # All five up or all five down, of 32. The normal approximation would call it significant.
    assert signed_rank_p_value(np.ones(5)) == 2 / 32
    assert signed_rank_p_value(np.zeros(5)) == 1


def test_the_effect_size_weighs_each_picture_by_the_rank_of_its_difference() -> None:
    # Ranks 1 to 4, of which 1 and 3 speak against: 6 - 4 of 10.
    assert rank_biserial(np.array([-0.1, 0.2, -0.3, 0.4, 0.0])) == pytest.approx(0.2)
    assert rank_biserial(np.array([0.5, 0.1])) == 1
    assert rank_biserial(np.array([-0.5])) == -1
    assert rank_biserial(np.zeros(3)) == 0


def test_without_ties_and_with_many_it_is_scipys() -> None:
    random = np.random.default_rng(0)
    for count in (7, 30, 50):
        differences = random.normal(0.3, 1, count)
        expected = wilcoxon(differences, method="exact").pvalue
        assert signed_rank_p_value(differences) == pytest.approx(expected)
    many = random.normal(0.1, 1, 400)
    assert signed_rank_p_value(many) == pytest.approx(wilcoxon(many).pvalue)


def benjamini_yekutieli(p_values: list[float]) -> list[float]:
    """Each adjusted value is the least level of the step-up procedure that rejects it, as the paper defines that."""
    count = len(p_values)
    harmonic = sum(1 / (i + 1) for i in range(count))
    order = sorted(range(count), key=p_values.__getitem__)
    adjusted = [1.0] * count
    for device, index in enumerate(order):
        adjusted[index] = min(
            1.0, min(p_values[order[later]] * count * harmonic / (later + 1) for later in range(device, count))
        )
    return adjusted


# Average drops over twelve pictures: b is a with a little noise, c is worse on every picture, d on all but one, and e
# was judged on other pictures.
BASE = [0.10, 0.22, 0.31, 0.15, 0.27, 0.08, 0.19, 0.24, 0.12, 0.33, 0.05, 0.21]
NOISE = [0.01, -0.02, 0.03, -0.04, 0.05, -0.06, 0.07, -0.05, 0.04, -0.02, 0.02, -0.01]
DROPS = {
    "a": BASE,
    "b": [value + noise for value, noise in zip(BASE, NOISE, strict=True)],
    "c": [value + 0.2 + index / 100 for index, value in enumerate(BASE)],
    "d": [value + (0.1 + index / 50 if index else -0.03) for index, value in enumerate(BASE)],
}


def test_pairs_bold_and_about_equal_of_made_up_records(tmp_path: Path) -> None:
    lines = [
        made_up(method, f"{index}.jpg", confidence_drop=value)
        for method, values in DROPS.items()
        for index, value in enumerate(values)
    ]
    lines += [made_up("e", f"other {index}.jpg", confidence_drop=0.6) for index in range(12)]
    write_records(tmp_path, lines)
    report(tmp_path)

    pairs = pd.read_csv(tmp_path / "pairs.csv")
    names = list(combinations("abcd", 2))
    # e has no picture in common with any of them: no test.
    assert list(zip(pairs["first"], pairs["second"], strict=True)) == names
    differences = [[round(1000 * (x - y)) for x, y in zip(DROPS[m], DROPS[n], strict=True)] for m, n in names]
    expected = [by_enumeration(values) for values in differences]
    assert pairs["p_value"].tolist() == pytest.approx(expected, rel=1e-4)
    assert pairs["adjusted_p_value"].tolist() == pytest.approx(benjamini_yekutieli(expected), rel=1e-4)
    assert pairs["mean_difference"].tolist() == pytest.approx([np.mean(v) / 10 for v in differences], rel=1e-3)

    table = (tmp_path / "summary.md").read_text()
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[3] for line in table.splitlines() if "±" in line}
    best = min("abcd", key=lambda name: np.mean(DROPS[name]))
    other = "a" if best == "b" else "b"
    assert cells[best].startswith("**")
    assert cells[best].endswith("**")
    assert cells[other].endswith(" ≈")
    for worse in "cd":
        assert "≈" not in cells[worse]
        assert "?" not in cells[worse]
    # What was never tested is neither worse nor equal.
    assert cells["e"].endswith(" ?")
    assert "not all methods explained the same images" in table


def test_intervals_are_students_and_cover() -> None:
    # The mean 3 and the standard error 1.0801, by the table of t for 3 degrees of freedom: 3.1824.
    mean, half = interval(np.array([1.0, 2.0, 3.0, 6.0]))
    assert (mean, half) == (3, pytest.approx(3.1824 * 1.0801, rel=1e-4))
    # One value, and values that are all the same, do not tell how far others spread.
    assert np.isnan(interval(np.array([0.5]))[1])
    assert np.isnan(interval(np.array([0.5, 0.5]))[1])
    values = np.random.default_rng(0).normal(0, 1, (3, 20000))
    mean, half = interval(values)
    assert np.mean(np.abs(mean) < half) == pytest.approx(0.95, abs=0.005)


def test_marks_pairs_and_charts_follow_one_rule_in_the_direction_of_the_mean(tmp_path: Path) -> None:
    # b is better than a on 38 of 40 pictures, but by its mean worse. c is worse than a on all.
    drops = {"a": [0.2] * 40, "b": [0.19] * 38 + [0.9] * 2, "c": [0.3 + i / 1000 for i in range(40)]}
    lines = [
        made_up(method, f"{i}.jpg", confidence_drop=value)
        for method, values in drops.items()
        for i, value in enumerate(values)
    ]
    write_records(tmp_path, lines)
    report(tmp_path)
    pairs = pd.read_csv(tmp_path / "pairs.csv", keep_default_na=False).set_index(["first", "second"])
    assert float(pairs.loc[("a", "b"), "p_value"]) < 1e-6
    assert pairs["better"].to_dict() == {("a", "b"): "", ("a", "c"): "a", ("b", "c"): "b"}
    assert float(pairs.loc[("a", "c"), "interval_high"]) < 0
    rows = [line for line in (tmp_path / "summary.md").read_text().splitlines() if "±" in line]
    assert [("**" in row, "≈" in row) for row in rows] == [(True, False), (False, True), (False, False)]
    records = _report._table(read_records(tmp_path))
    tests = pd.read_csv(tmp_path / "pairs.csv", keep_default_na=False).assign(subject=records["subject"].iloc[0])
    (axis,) = measures_chart(records, ["average_drop"], tests).axes
    assert [container[0].get_color() for container in axis.containers] == ["0.6", "tab:red"]


def test_many_comparisons_take_more_evidence(tmp_path: Path) -> None:
    # Seven pictures, all better: p = 2 / 128 = 0.0156, significant for one pair. Of 15 pairs that are all like this,
    # each is 0.0156 (1 + 1/2 + ... + 1/15) = 0.0518.
    def explained(methods: str) -> str:
        lines = [
            made_up(method, f"{index}.jpg", confidence_drop=0.1 + (0.3 + index / 100) * device)
            for device, method in enumerate(methods)
            for index in range(7)
        ]
        write_records(tmp_path, lines)
        report(tmp_path)
        return (tmp_path / "summary.md").read_text()

    assert explained("ab").count("≈") == 1  # The sign is explained below the table, and given to none.
    assert explained("abcdef").count("≈") == 6


def test_equal_values_do_not_differ(tmp_path: Path) -> None:
    lines = [made_up(method, f"{i}.jpg", confidence_increase=i % 2) for method in "ab" for i in range(9)]
    write_records(tmp_path, lines)
    report(tmp_path)
    assert pd.read_csv(tmp_path / "pairs.csv")["p_value"].tolist() == [1]
    assert "| b | 9 | 0 | 44.4 ± 17.6 ≈ |" in (tmp_path / "summary.md").read_text()


def test_rounding_is_no_difference(tmp_path: Path) -> None:
    # b is a but for rounding, always upwards, which must not make it significantly worse.
    lines = [
        made_up(method, f"{i}.jpg", confidence_drop=0.1 * (1 + 1e-8 * (method == "b")))
        for method in "ab"
        for i in range(9)
    ]
    write_records(tmp_path, lines)
    report(tmp_path)
    assert pd.read_csv(tmp_path / "pairs.csv")["p_value"].tolist() == [1]
