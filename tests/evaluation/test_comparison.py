"""Which runs are one method, and how far apart methods are."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from evaluation.comparison import TestedRun, comparison_note, comparison_rows, dice_difference, group_name, group_seeds
from evaluation.statistics import MIN_CASES, crossed_difference
from utils.errors import InputError


@pytest.fixture
def tested(make_scores):
    """A tested run of some name, seed and flags: Dice of the cases a, b, c ..."""

    def build(name: str, dice, seed: int = 1, flags: tuple[str, ...] = (), cases: str = "abcdefgh") -> TestedRun:
        return TestedRun(name, make_scores(dict(zip(cases, dice, strict=False)), seed, flags), Path())

    return build


RNG = np.random.default_rng(0)
DICE = RNG.uniform(0.7, 0.9, (4, 8))


def test_runs_that_differ_in_nothing_but_their_seed_are_one_method(tested):
    drop = ("--dropout", "0.25")
    runs = [tested("v_s1", DICE[0], 1), tested("d_s1", DICE[1], 1, drop), tested("v_s12", DICE[2], 12)]
    runs += [
        tested("d_s2", DICE[3], 2, drop),
        tested("v_again", DICE[0], 1),
        tested("x", DICE[0], 3, ("--amp", "bf16")),
    ]
    groups = group_seeds(runs)
    assert [[run.name for run in group] for group in groups] == [["v_s1", "v_s12", "x"], ["d_s1", "d_s2"], ["v_again"]]
    assert [group_name(group[:2]) for group in groups] == ["v", "d", "v_again"]
    assert group_name([tested("1", DICE[0]), tested("2", DICE[1], 2)]) == "1"  # nothing in common but a seed
    other_data = tested("v_s3", DICE[0], 3, ("--root_path", "elsewhere"))
    assert len(group_seeds([runs[0], other_data])) == 2


@pytest.mark.parametrize(
    ("names", "common"),
    [("v_seed1337 v_seed1338", "v"), ("v-s1 v-s2", "v"), ("vseed1 vseed2", "v"), ("v8_1 v8_2", "v8"), ("v_1 v_2", "v")]
    + [("thesis1 thesis2", "thesis"), ("pass_1 pass_2", "pass"), ("runs-1 runs-2", "runs"), ("s1 s2", "s1")],
)
def test_the_name_of_several_seeds_loses_the_seed_and_no_letter_of_a_word(tested, names, common):
    assert group_name([tested(name, DICE[0], seed) for seed, name in enumerate(names.split())]) == common


def test_seeds_and_cases_are_both_random(tested):
    first = [tested(f"v{seed}", DICE[seed], seed) for seed in (0, 1)]
    second = [tested(f"d{seed}", DICE[seed + 2], seed, ("--dropout", "0.25")) for seed in (0, 1)]
    assert dice_difference(first, second[::-1]) == crossed_difference(DICE[:2], DICE[2:])
    header, rows = comparison_rows([*first, *second])
    assert [row[0] for row in rows] == ["v, 2 seeds", "  v0", "  v1", "d, 2 seeds", "  d0", "  d1"]
    means = 100 * DICE.mean(axis=1)
    assert rows[3][2] == f"{means[2:].mean():.2f} ± {means[2:].std(ddof=1):.2f}"
    assert rows[4][2] == f"{means[2]:.2f} ± {100 * DICE[2].std(ddof=1):.2f}"
    mean, low, high, *_, p = crossed_difference(DICE[:2], DICE[2:])
    assert rows[3][-2:] == [f"{100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]", f"{p:.2g}"]
    assert rows[0][-2:] == rows[1][-2:] == rows[4][-2:] == ["", ""] and len(header) == len(rows[0])


def test_single_runs_are_compared_whatever_their_seed_and_seeds_by_their_own(tested):
    drop = ("--dropout", "0.25")
    one, other = tested("a", DICE[0], 1), tested("b", DICE[1], 2, drop)
    assert dice_difference([one], [other]) == crossed_difference(DICE[:1], DICE[1:2])
    both = [other, tested("c", DICE[2], 1, drop)]
    assert dice_difference([one], both) == crossed_difference(DICE[:1], DICE[2:3])  # the seed that both have
    assert "(1 of 2 seeds)" in comparison_rows([one, *both])[1][1][-2]
    assert dice_difference([one], [tested("d", DICE[0], 3), tested("e", DICE[0], 4)]) is None


def test_cases_are_paired_by_name(tested):
    base = tested("base", [0.5, 0.6, 0.7, 0.8])
    three, one = tested("three", [0.6, 0.7, 0.8], cases="bcd"), tested("one", [0.45], cases="a")
    nothing = tested("nothing", [0.5, 0.5], cases="xy")
    rows = comparison_rows([base, three, one, nothing])[1]
    assert [row[-2].partition(" ")[0] for row in rows] == ["", "+0.00", "-5.00", "no"]
    assert "(3 of 4 cases)" in rows[1][-2] and "[" not in rows[2][-2]


def test_no_p_value_from_few_cases_and_holms_from_several(tested):
    few = [tested(name, dice[: MIN_CASES - 1]) for name, dice in zip("abc", DICE, strict=False)]
    assert all(row[-1] == "" for row in comparison_rows(few)[1])
    assert str(MIN_CASES) in comparison_note(few)
    many = [tested(name, dice) for name, dice in zip("abc", DICE, strict=False)]
    header, rows = comparison_rows(many)
    p = sorted(dice_difference([many[0]], [run]).p for run in many[1:])
    assert "Holm" in header[-1] and sorted(float(row[-1]) for row in rows[1:]) == pytest.approx(
        [min(1, 2 * p[0]), max(min(1, 2 * p[0]), p[1])], rel=0.01
    )
    assert str(MIN_CASES) not in comparison_note(many)
    assert str(MIN_CASES) in comparison_note([many[0], tested("d", DICE[3, 3:], cases="defgh")])  # few in common


def test_seeds_of_one_method_alone_are_compared_with_nothing(tested):
    header, rows = comparison_rows([tested("v_s1", DICE[0], 1), tested("v_s2", DICE[1], 2)])
    assert len(rows) == 3 and not any("minus" in heading for heading in header)


# --- several classes


def two_classes(make_class_scores, name, rim, core, flags=()):
    cases = "abcdefgh"
    dice = {"rim": dict(zip(cases, rim, strict=False)), "core": dict(zip(cases, core, strict=False))}
    return TestedRun(name, make_class_scores(dice, 1, flags), Path())


def test_the_mean_over_classes_is_compared_and_each_class_if_asked(make_class_scores):
    first = two_classes(make_class_scores, "a", DICE[0], DICE[1])
    second = two_classes(make_class_scores, "b", DICE[2], DICE[3], ("--dropout", "0.25"))
    means = DICE[:2].mean(axis=0), DICE[2:].mean(axis=0)
    np.testing.assert_allclose(dice_difference([first], [second]), crossed_difference(means[0][None], means[1][None]))
    assert list(first.by_class) == ["rim", "core"]
    of_core = [run.by_class["core"] for run in (first, second)]
    assert dice_difference(*([run] for run in of_core)) == crossed_difference(DICE[1:2], DICE[3:])
    assert "rim, core" in comparison_note([first, second]) and "core" in comparison_note(of_core)
    assert "rim" not in comparison_note(of_core)


def test_a_missed_class_counts_once(make_class_scores):
    run = two_classes(make_class_scores, "a", [0.8, None, None], [0.9, 0.7, None])
    assert "(3 missed)" in comparison_rows([run])[1][0][4]
    assert "(2 missed)" in comparison_rows([run.by_class["rim"]])[1][0][4]


def test_classes_that_differ_are_said_and_a_foreign_one_is_refused(make_class_scores, tested):
    several = two_classes(make_class_scores, "a", DICE[0], DICE[1])
    assert "different classes" in comparison_note([several, tested("b", DICE[1])])
    assert tested("b", DICE[1]).by_class == {}
    for run in (several, tested("b", DICE[1])):
        with pytest.raises(InputError, match="--class valve"):
            comparison_rows([dataclasses.replace(run, of="valve")])
