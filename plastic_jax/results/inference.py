"""Tests of a mean over seeds, Holm's correction, and how many seeds a test needs.

Every test is one-sided and on per-seed values (already paired), with n - 1 degrees of freedom. Values that are known
only to lie between two bounds (censored ones) are tested by the bound that makes a rejection harder.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

LEAST_VALUES, MOST_VALUES = 3, 100_000
_NO_SPREAD = 1e-12  # below it a standard deviation is rounding
_SURE = 38.0  # standard errors beyond the threshold: the power is 1, and from there on scipy's noncentral t fails


def p_above(values: np.ndarray, threshold: float) -> float:
    """p-value of H0 "the mean is at most `threshold`"; small where the mean lies above it.

    One-sided t test over values [n]; 1 below 3 values and where one is -inf (unbounded). Without any spread the
    values are taken at their word: 0 where they lie above, else 1.
    """
    from scipy import special  # takes a second to import

    n = len(values)
    if n < LEAST_VALUES or not np.isfinite(values).all():
        return 1.0
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    if spread < _NO_SPREAD:
        return 0.0 if mean > threshold + _NO_SPREAD else 1.0
    # scipy.stats.ttest_1samp's own p-value, without the millisecond that it takes: tables are simulated with it.
    return float(special.stdtr(n - 1, -(mean - threshold) * math.sqrt(n) / spread))


def p_below(values: np.ndarray, threshold: float) -> float:
    """p-value of H0 "the mean is at least `threshold`"; 1 where a value is +inf. As `p_above`."""
    return p_above(-values, -threshold)


def p_within(low: np.ndarray, high: np.ndarray, margins: tuple[float, float]) -> float:
    """p-value of equivalence: H0 "the mean lies outside the margins" (two one-sided tests, Schuirmann 1987).

    `low` and `high` [n] bound each seed's value; they are equal where nothing is censored.
    """
    return max(p_above(low, margins[0]), p_below(high, margins[1]))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values: rejecting those up to 0.05 errs with probability 5 % at most over all.

    Valid whatever the dependence between the tests.
    """
    from statsmodels.stats.multitest import multipletests  # takes a second to import

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if len(p_values) else []


def trend(values: np.ndarray) -> np.ndarray:
    """Each seed's linear trend over levels: the change of its fitted line from the first level to the last.

    `values` [seeds, levels]; the levels count as equally spaced. With two levels it is their difference.
    """
    levels = values.shape[1]
    scores = np.arange(levels) - (levels - 1) / 2
    return values @ scores / (scores @ scores) * (levels - 1)


def power_one_sided(n: int, distance: float, spread: float, alpha: float) -> float:
    """Power of the one-sided t test with n values whose mean lies `distance` beyond the threshold.

    Exact (noncentral t). `spread` is the values' standard deviation.
    """
    from statsmodels.stats.power import TTestPower

    effect = distance / spread if spread > _NO_SPREAD else math.inf
    if effect * math.sqrt(n) > _SURE:
        return 1.0
    return float(TTestPower().power(effect, n, alpha, alternative="larger"))


def power_within(n: int, spread: float, margins: tuple[float, float], alpha: float) -> float:
    """Power of the equivalence test with n values whose true mean is 0.

    The exact integral over the sampled standard deviation, by its quantiles.
    """
    from scipy import stats

    if spread < _NO_SPREAD:
        return 1.0
    quantiles = (np.arange(2000) + 0.5) / 2000
    error = spread / math.sqrt(n)
    half = stats.t.ppf(1 - alpha, n - 1) * error * np.sqrt(stats.chi2.ppf(quantiles, n - 1) / (n - 1))
    inside = stats.norm.cdf((margins[1] - half) / error) - stats.norm.cdf((margins[0] + half) / error)
    return float(np.maximum(inside, 0.0).mean())


def seeds_needed(power: Callable[[int], float], target: float) -> int | None:
    """The least number of seeds whose `power` reaches `target`; None where 100 000 do not."""
    low, high = LEAST_VALUES - 1, LEAST_VALUES
    while power(high) < target:
        low, high = high, 2 * high
        if low >= MOST_VALUES:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= target else (middle, high)
    return high
