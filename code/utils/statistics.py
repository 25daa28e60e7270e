"""Paired comparison of two runs over the same cases."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
BOOTSTRAP_SEED = 0


class PairedDifference(NamedTuple):
    """Mean difference of paired values and its percentile bootstrap interval; NaN where it is undefined."""

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


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
