"""The tests of a mean, against scipy and by simulation: type-I error, power, and Holm's correction."""

import math

import numpy as np
import pytest
from scipy import stats

from plastic_jax.results import inference

VALUES = np.array([0.4, -0.1, 0.3, 0.8, 0.2, 0.6])


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.3, 1.0])
def test_one_sided_tests_are_scipys(threshold):
    for mine, side in ((inference.p_above, "greater"), (inference.p_below, "less")):
        assert mine(VALUES, threshold) == pytest.approx(stats.ttest_1samp(VALUES, threshold, alternative=side).pvalue)


def test_equivalence_is_the_larger_of_two_one_sided_tests():
    above = stats.ttest_1samp(VALUES, -0.1, alternative="greater").pvalue
    below = stats.ttest_1samp(VALUES, 1.0, alternative="less").pvalue
    assert inference.p_within(VALUES, VALUES, (-0.1, 1.0)) == pytest.approx(max(above, below))
    assert above > below


def test_a_test_at_half_the_level_is_the_95_percent_interval():
    low, high = stats.t.interval(0.95, 5, VALUES.mean(), stats.sem(VALUES))
    assert inference.p_above(VALUES, low) == pytest.approx(0.025)
    assert inference.p_below(VALUES, high) == pytest.approx(0.025)


def test_too_few_values_and_unbounded_ones_decide_nothing():
    assert inference.p_above(VALUES[:2], -100) == 1
    assert inference.p_above(np.array([5.0, 5.1, -math.inf, 5.2]), 0) == 1
    assert inference.p_below(np.array([-5.0, -5.1, math.inf, -5.2]), 0) == 1
    bounds = np.array([0.0, 0.1, -0.1, 0.05]), np.array([0.0, 0.1, math.inf, 0.05])
    assert inference.p_within(*bounds, (-1, 1)) == 1
    assert inference.p_within(bounds[0], bounds[0], (-1, 1)) < 0.001


def test_values_without_spread_are_taken_at_their_word():
    same = np.full(4, 0.1) + 0.2
    assert inference.p_above(same, 0.0) == 0
    assert inference.p_above(same, 0.3) == inference.p_below(same, 0.3) == 1
    assert inference.p_above(same, 0.5) == 1


def test_holm_by_hand():
    assert inference.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert inference.holm([0.5, 0.9]) == [1.0, 1.0]
    assert inference.holm([0.02]) == [0.02]
    assert inference.holm([]) == []


def test_trend_is_the_least_squares_line_from_end_to_end():
    values = np.random.default_rng(0).normal(size=(4, 5))
    slopes = [np.polyfit(np.arange(5), row, 1)[0] * 4 for row in values]
    assert inference.trend(values) == pytest.approx(slopes)
    assert inference.trend(values[:, :2]) == pytest.approx(values[:, 1] - values[:, 0])
    assert inference.trend(values + np.arange(4)[:, None]) == pytest.approx(inference.trend(values))


RUNS = 4000


def rejected(test, n: int, mean: float, spread: float, alpha: float) -> float:
    draw = np.random.default_rng(1).normal(mean, spread, (RUNS, n))
    return float(np.mean([test(values) <= alpha for values in draw]))


def error(share: float) -> float:
    """Three Monte Carlo standard errors of a share."""
    return 3 * math.sqrt(share * (1 - share) / RUNS)


@pytest.mark.parametrize("n", [3, 5, 20])
def test_one_sided_type_one_error_is_the_level(n):
    found = rejected(lambda values: inference.p_below(values, 0.0), n, 0.0, 2.0, 0.025)
    assert abs(found - 0.025) <= error(0.025)


@pytest.mark.parametrize("n", [5, 20])
def test_equivalence_at_the_margin_errs_at_most_at_the_level(n):
    found = rejected(lambda values: inference.p_within(values, values, (-1, 1)), n, 1.0, 0.5, 0.025)
    assert found <= 0.025 + error(0.025)


@pytest.mark.parametrize(("n", "distance", "alpha"), [(4, 2.0, 0.025), (8, 1.0, 0.025), (30, 0.5, 0.005)])
def test_power_of_the_one_sided_test(n, distance, alpha):
    expected = inference.power_one_sided(n, distance, 1.0, alpha)
    assert 0.3 < expected < 0.95
    assert abs(rejected(lambda v: inference.p_above(v, 0.0), n, distance, 1.0, alpha) - expected) <= error(expected)


@pytest.mark.parametrize(
    ("n", "margins", "alpha"), [(5, (-2, 2), 0.025), (12, (-1, 1.2), 0.025), (40, (-1, 0.6), 0.005)]
)
def test_power_of_the_equivalence_test(n, margins, alpha):
    expected = inference.power_within(n, 1.0, margins, alpha)
    assert 0.3 < expected < 0.99
    assert abs(rejected(lambda v: inference.p_within(v, v, margins), n, 0.0, 1.0, alpha) - expected) <= error(expected)


def test_seeds_needed_is_the_least_number():
    def power(n: int) -> float:
        return inference.power_one_sided(n, 0.5, 1.0, 0.025)

    needed = inference.seeds_needed(power, 0.8)
    assert needed == 34  # the textbook's value (Cohen's d = 0.5, two-sided 5 %, power 80 %)
    assert power(needed) >= 0.8 > power(needed - 1)
    assert inference.seeds_needed(lambda n: 1.0, 0.8) == 3
    assert inference.seeds_needed(lambda n: 0.5, 0.8) is None
    assert inference.power_one_sided(3, 1.0, 0.0, 0.025) == inference.power_within(3, 0.0, (-1, 1), 0.025) == 1
    assert inference.power_one_sided(50_000, 1.0, 0.001, 0.025) == 1
