import numpy as np
import pytest
from scipy import stats

from utils.statistics import PairedDifference, paired_difference

RNG = np.random.default_rng(0)
FIRST = RNG.normal(0.8, 0.1, 16)
SECOND = FIRST + RNG.normal(0.02, 0.03, 16)


@pytest.mark.parametrize("skewed", [False, True])
def test_interval_is_scipys(skewed):
    second = FIRST + RNG.exponential(0.05, 16) ** 2 if skewed else SECOND
    ours = paired_difference(FIRST, second)
    theirs = stats.bootstrap((second - FIRST,), np.mean, method="percentile", n_resamples=20_000, rng=1)
    noise = 0.1 * theirs.standard_error  # of two quantiles over 10,000 and 20,000 resamples
    assert ours.mean == pytest.approx(np.mean(second - FIRST), rel=1e-12)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=noise)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=noise)
    assert ours.pairs == 16


def test_it_is_second_minus_first_and_repeatable():
    forth, back = paired_difference(FIRST, SECOND), paired_difference(SECOND, FIRST)
    assert forth.mean > 0 and forth == paired_difference(list(FIRST), list(SECOND))
    assert (back.mean, back.low, back.high) == pytest.approx((-forth.mean, -forth.high, -forth.low))


def test_undefined_pairs_are_left_out():
    first, second = np.append(FIRST, [np.nan, 0.5, np.nan]), np.append(SECOND, [0.5, np.nan, np.nan])
    assert paired_difference(first, second) == paired_difference(FIRST, SECOND)


def test_equal_values():
    assert paired_difference(FIRST, FIRST) == PairedDifference(0, 0, 0, 16)


@pytest.mark.parametrize(("first", "second", "mean", "pairs"), [([0.5], [0.75], 0.25, 1), ([], [], np.nan, 0)])
def test_fewer_than_two_pairs_have_no_interval(first, second, mean, pairs):
    difference = paired_difference(first, second)
    np.testing.assert_equal(tuple(difference), (mean, np.nan, np.nan, pairs))
    assert not difference.excludes_zero


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.2, False), (0, 0.2, False)]
)
def test_excludes_zero(low, high, expected):
    assert PairedDifference(0.05, low, high, 16).excludes_zero is expected


def test_unequal_numbers_of_cases():
    with pytest.raises(ValueError, match="shape"):
        paired_difference([0.1, 0.2], [0.1, 0.2, 0.3])
