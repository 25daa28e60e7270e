import numpy as np
import pytest
from scipy import stats

from evaluation.statistics import (
    MIN_CASES,
    PairedDifference,
    agreement,
    crossed_difference,
    holm,
    paired_difference,
    paired_test,
)

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


def test_unequal_numbers_of_cases():
    with pytest.raises(ValueError, match="shape"):
        paired_difference([0.1, 0.2], [0.1, 0.2, 0.3])


@pytest.mark.parametrize("second", [SECOND, FIRST - 0.1 * RNG.exponential(1, 16), np.round(SECOND, 1)])
def test_paired_tests_are_scipys(second):
    ours = paired_test(FIRST, second)
    assert ours.t_p == pytest.approx(stats.ttest_rel(second, FIRST).pvalue, rel=1e-9)
    assert ours.wilcoxon_p == pytest.approx(stats.wilcoxon(second, FIRST).pvalue, rel=1e-9)
    assert ours.difference == paired_difference(FIRST, second)
    difference = second - FIRST
    assert ours.effect == pytest.approx(difference.mean() / difference.std(ddof=1))


def test_paired_test_worked_by_hand():
    test = paired_test([0, 0, 0], [1, 2, 3])  # t = 2 / (1 / sqrt 3) with 2 degrees of freedom
    assert test.effect == pytest.approx(2.0)
    assert test.t_p == pytest.approx(1 - np.sqrt(12 / 14))  # p = 1 - t / sqrt(t^2 + 2)
    assert test.wilcoxon_p == pytest.approx(2 / 2**3)  # all signs equal: 2 of the 8 assignments


def test_paired_test_of_undefined_pairs_and_direction():
    first, second = np.append(FIRST, [np.nan, 0.5]), np.append(SECOND, [0.5, np.nan])
    assert paired_test(first, second) == paired_test(FIRST, SECOND)
    assert paired_test(SECOND, FIRST).effect == pytest.approx(-paired_test(FIRST, SECOND).effect)


@pytest.mark.parametrize(("first", "second"), [([0.5], [0.75]), ([], []), (FIRST, FIRST), ([0.5, np.nan], [0.6, 1.0])])
@pytest.mark.filterwarnings("error")
def test_nothing_to_test(first, second):
    assert all(np.isnan(value) for value in paired_test(first, second)[1:])


@pytest.mark.filterwarnings("error")
def test_the_same_difference_in_every_case():
    test = paired_test([0.25, 0.5, 1.0], [0.5, 0.75, 1.25])
    assert (test.t_p, test.effect) == (0.0, np.inf)
    assert paired_test([0.5, 0.75, 1.25], [0.25, 0.5, 1.0]).effect == -np.inf


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 4 x 0.005, 3 x 0.01, 2 x 0.03, then never smaller
        ([0.6, 0.9], [1.0, 1.0]),
        ([0.02, np.nan, 0.5], [0.04, np.nan, 0.5]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([0.3], [0.3]),
        ([], []),
    ],
)
def test_holm_worked_by_hand(p_values, expected):
    np.testing.assert_allclose(holm(p_values), expected, rtol=1e-12)


def test_crossed_difference_worked_out_on_paper():
    # Means of the seeds 2 and 4, of the cases 1.5, 4.5 and 3. Mean squares: seeds 3 (1 + 1) / 1 = 6, cases
    # 2 (2.25 + 2.25 + 0) / 2 = 4.5, rest (4 x 0.25) / 2 = 0.5. Variance (6 + 4.5 - 0.5) / 6, freedom (10 / 6)^2.
    difference = np.array([[1.0, 3.0, 2.0], [2.0, 6.0, 4.0]])
    ours = crossed_difference(np.full((2, 3), 7.0), 7 + difference)
    half = stats.t.ppf(0.975, (10 / 6) ** 2) * np.sqrt(10 / 6)
    assert ours[:5] == pytest.approx((3, 3 - half, 3 + half, 2, 3))


def test_seeds_that_agree_do_not_make_the_cases_more_certain():
    """Mean squares: seeds 0.015, cases 4.5, rest 0.5; the seeds count as 0.5."""
    of_cases, rest = np.array([-1.5, 1.5, 0.0]), np.array([0.5, -0.5, 0.0])
    variance, freedom = (0.5 + 4.5 - 0.5) / 6, ((0.015 + 4.5 - 0.5) / 0.015) ** 2
    of_seeds = np.sqrt(0.015 / 6) * np.array([[-1], [1]])
    ours = crossed_difference(np.zeros((2, 3)), 3 + of_seeds + of_cases + np.outer([1, -1], rest))
    half = stats.t.ppf(0.975, freedom) * np.sqrt(variance)
    assert ours[:3] == pytest.approx((3, 3 - half, 3 + half))


def test_one_seed_is_a_paired_t_interval():
    ours = crossed_difference(FIRST[None], SECOND[None])
    theirs = stats.ttest_rel(SECOND, FIRST)
    low, high = theirs.confidence_interval(0.95)
    assert ours == pytest.approx((np.mean(SECOND - FIRST), low, high, 1, 16, theirs.pvalue))


def test_equal_cases_leave_a_t_interval_over_the_seeds():
    of_seeds = np.array([0.01, 0.03, -0.01])
    ours = crossed_difference(np.zeros((3, 6)), np.repeat(of_seeds[:, None], 6, axis=1))
    theirs = stats.ttest_1samp(of_seeds, 0)
    low, high = theirs.confidence_interval(0.95)
    assert ours == pytest.approx((of_seeds.mean(), low, high, 3, 6, theirs.pvalue))


@pytest.mark.parametrize(("sd_seeds", "sd_cases", "sd_rest"), [(1, 1, 1), (0.3, 2, 2), (0, 1, 1)])
def test_crossed_interval_covers_the_truth(sd_seeds, sd_cases, sd_rest):
    rng, covered, runs = np.random.default_rng(3), 0, 2000
    for _ in range(runs):
        of_seeds, of_cases = sd_seeds * rng.normal(size=(3, 1)), sd_cases * rng.normal(size=20)
        sample = of_seeds + of_cases + sd_rest * rng.normal(size=(3, 20))
        _, low, high, *_, p = crossed_difference(np.zeros((3, 20)), sample)
        covered += low < 0 < high
        assert (p < 0.05) != (low < 0 < high)
    assert 0.93 <= covered / runs <= 0.99


@pytest.mark.filterwarnings("error")
def test_where_there_is_no_interval_and_no_p():
    one = crossed_difference(np.zeros((3, 1)), np.ones((3, 1)))
    np.testing.assert_equal(tuple(one), (1, np.nan, np.nan, 3, 1, np.nan))
    few, enough = ([crossed_difference(FIRST[None, :n], SECOND[None, :n]).p] for n in (MIN_CASES - 1, MIN_CASES))
    assert np.isnan(few).all() and np.isfinite(enough).all()
    assert np.isnan(crossed_difference(FIRST[None], FIRST[None]).p)
    assert crossed_difference(np.zeros((2, 6)), np.ones((2, 6)))[:3] == (1, 1, 1)
    assert crossed_difference(np.zeros((2, 6)), np.ones((2, 6))).p == 0


def test_limits_of_agreement():
    # differences 1, 2, 3: their mean is 2, their sd 1
    assert agreement([5.0, 5.0, 5.0], [6.0, 7.0, 8.0]) == pytest.approx((2, 2 - 1.96, 2 + 1.96), abs=1e-4)
    np.testing.assert_equal(tuple(agreement([5.0], [6.0])), (1, np.nan, np.nan))
