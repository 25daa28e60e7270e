"""Paired comparison of two runs, or of two methods with several seeds each, over the same cases."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 10_000
CONFIDENCE = 0.95
BOOTSTRAP_SEED = 0
MIN_CASES = 6  # below, no p-value: even six differences of one sign give the signed-rank test no less than 0.03


class PairedDifference(NamedTuple):
    """Mean difference of paired values and its percentile bootstrap interval; NaN where it is undefined."""

    mean: float
    low: float
    high: float
    pairs: int


def paired_difference(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """second - first per case, with a 95 % percentile bootstrap interval over cases.

    Pairs in which either value is undefined (NaN) are left out. A single pair has no interval, none no mean either.
    """
    difference = np.subtract(second, first, dtype=float)
    difference = difference[np.isfinite(difference)]
    if len(difference) < 2:
        mean = float(difference[0]) if len(difference) else np.nan
        return PairedDifference(mean, np.nan, np.nan, len(difference))
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    means = difference[rng.integers(len(difference), size=(RESAMPLES, len(difference)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return PairedDifference(float(difference.mean()), float(low), float(high), len(difference))


class PairedTest(NamedTuple):
    """Paired tests of one metric between two runs; NaN where fewer than two pairs are defined."""

    difference: PairedDifference
    t_p: float  # paired t-test, two-sided, as in the paper
    wilcoxon_p: float  # signed-rank test, two-sided
    effect: float  # Cohen's d_z: mean of the differences over their sd


def paired_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Tests of second - first over the cases in which both are defined."""
    difference = paired_difference(first, second)
    values = np.subtract(second, first, dtype=float)
    values = values[np.isfinite(values)]
    if len(values) < 2 or not values.any():  # no pairs, or no difference: nothing to test
        return PairedTest(difference, np.nan, np.nan, np.nan)
    with np.errstate(divide="ignore"):  # the same difference in every case is an infinite effect
        effect = float(values.mean() / values.std(ddof=1))
    t = effect * np.sqrt(len(values))
    t_p = float(2 * stats.t.sf(abs(t), len(values) - 1))
    return PairedTest(difference, t_p, float(stats.wilcoxon(values).pvalue), effect)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Scandinavian Journal of Statistics, 1979); NaN stays and does not count."""
    p = np.asarray(p_values, dtype=float)
    order = [index for index in np.argsort(p) if np.isfinite(p[index])]
    corrected, largest = np.full(len(p), np.nan), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[index]))
        corrected[index] = largest
    return corrected.tolist()


class CrossedDifference(NamedTuple):
    """Mean difference over seeds and cases and its t interval; NaN where it is undefined."""

    mean: float
    low: float
    high: float
    seeds: int
    cases: int
    p: float  # two-sided, of the same t distribution; NaN for fewer than MIN_CASES cases


def crossed_difference(first: np.ndarray, second: np.ndarray) -> CrossedDifference:
    """second - first where every seed was scored on every case, with a 95 % interval for other seeds and other cases.

    The seeds are a random factor like the cases: the analysis of many readers and many cases (Dorfman, Berbaum & Metz,
    Investigative Radiology 1992) with the degrees of freedom of Hillis (Statistics in Medicine 2007), the seeds being
    the readers. A bootstrap over three seeds would be too narrow. Where the seeds agree more than chance allows, their
    variance counts as 0, not as less, so that the standard error is at least that of the cases alone. One seed leaves
    only the cases: a paired t interval. The interval excludes 0 where p < 0.05.
    Args: first, second, (seeds, cases), NaN-free; row s of both has the same seed.
    """
    difference = np.subtract(second, first, dtype=float)
    seeds, cases = difference.shape
    mean = difference.mean()
    if cases < 2:
        return CrossedDifference(float(mean), np.nan, np.nan, seeds, cases, np.nan)
    of_seeds, of_cases = difference.mean(axis=1) - mean, difference.mean(axis=0) - mean
    rest = difference - mean - of_seeds[:, None] - of_cases
    ms_cases = seeds * (of_cases**2).sum() / (cases - 1)
    if seeds == 1:
        ms, freedom = ms_cases, cases - 1
    else:
        ms_seeds = cases * (of_seeds**2).sum() / (seeds - 1)
        ms_rest = (rest**2).sum() / ((seeds - 1) * (cases - 1))
        of_cases_alone = max(ms_cases - ms_rest, 0.0)
        freedom = (seeds - 1) * (1 + of_cases_alone / ms_seeds) ** 2 if ms_seeds > 0 else np.inf
        ms = max(ms_seeds, ms_rest) + of_cases_alone  # no variance is below 0
    error = np.sqrt(ms / difference.size)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * error
    tested = cases >= MIN_CASES and (error or mean)  # no difference in any case: nothing to test
    p = float(2 * stats.t.sf(abs(mean) / error, freedom) if error else 0.0) if tested else np.nan
    return CrossedDifference(float(mean), float(mean - half), float(mean + half), seeds, cases, p)


class Agreement(NamedTuple):
    """Mean difference of two measurements, and the limits of 95 % of the differences; NaN for one case."""

    mean: float
    low: float
    high: float


def agreement(first: Sequence[float], second: Sequence[float]) -> Agreement:
    """second - first with its limits of agreement, mean ± 1.96 sd (Bland & Altman, The Lancet 1986)."""
    difference = np.subtract(second, first, dtype=float)
    mean = float(difference.mean())
    half = stats.norm.ppf((1 + CONFIDENCE) / 2) * difference.std(ddof=1) if len(difference) > 1 else np.nan
    return Agreement(mean, float(mean - half), float(mean + half))
