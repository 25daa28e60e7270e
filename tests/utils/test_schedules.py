import math
from argparse import Namespace

import pytest

from methods import METHODS
from utils.schedules import geometric, learning_rate, rampup

STEPS = Namespace(
    base_lr=0.01, lr_schedule="steps", lr_step=2500, lr_gamma=0.1, warmup=0, max_iterations=6000
)  # the paper's


def test_stairs_are_the_public_formula_at_every_iteration():
    for iteration in range(6300):
        epoch = min(iteration // 150, 40)  # the public implementations stop at 6000
        assert rampup(iteration, 6000, "stairs") == pytest.approx(math.exp(-5 * (1 - epoch / 40) ** 2), rel=1e-12)


def test_a_ramp_of_given_length_has_a_stair_per_unit(tiny_options):
    """--consistency_rampup 20 --ramp stairs of the public implementations: 20 stairs of 150 iterations."""
    method = METHODS["dtc"](tiny_options("dtc", "--ramp", "stairs", "--consistency_rampup", "20"))
    for iteration in (0, 149, 150, 1500, 2999, 3000):
        expected = math.exp(-5 * (1 - min(iteration // 150, 20) / 20) ** 2)
        assert method.consistency_weight(iteration) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("length", [40, 100, 250, 999, 2250.0, 1500])
def test_any_length_has_forty_stairs(length):
    values = [rampup(i, length, "stairs") for i in range(math.ceil(length))]
    assert len(set(values)) == 40 and values == sorted(values)
    for stair in range(40):  # each begins at the first iteration that is not before its place
        first = math.ceil(stair * length / 40)
        assert values[first] == pytest.approx(math.exp(-5 * (1 - stair / 40) ** 2), rel=1e-12)
    assert max(values) == pytest.approx(0.9969, abs=5e-5)


def test_smooth_ramp():
    assert rampup(0, 6000) == pytest.approx(math.exp(-5))
    assert rampup(1500, 6000) == pytest.approx(math.exp(-5 * 0.75**2))
    assert rampup(6000, 6000) == rampup(9000, 6000) == 1
    values = [rampup(i, 6000) for i in range(6000)]
    assert all(a < b < 1 for a, b in zip(values[:-1], values[1:], strict=True))
    assert all(rampup(150 * i, 6000) == pytest.approx(rampup(150 * i, 6000, "stairs")) for i in range(41))


@pytest.mark.parametrize("shape", ["smooth", "stairs"])
def test_no_ramp(shape):
    assert rampup(0, 0, shape) == rampup(10, 0, shape) == 1


def test_rate_is_that_of_the_public_loop():
    """There the rate is set after the step, when the number of finished steps is a multiple of 2500."""
    rate = STEPS.base_lr
    for finished in range(6001):
        if finished and finished % 2500 == 0:
            rate = STEPS.base_lr * 0.1 ** (finished // 2500)
        assert learning_rate(finished, STEPS) == pytest.approx(rate, rel=1e-12)


def test_schedules_scale_with_the_length_of_the_training(tiny_options):
    whole = ("--lr_schedule", "steps", "--rampup_share", "1")
    paper, short = (tiny_options("dtml", "--max_iterations", str(n), *whole) for n in (6000, 1200))
    assert (paper.lr_step, paper.save_every, paper.ramp_iterations) == (2500, 1000, 6000)
    assert (short.lr_step, short.save_every, short.ramp_iterations) == (500, 200, 1200)
    for i in range(1200):
        assert learning_rate(i, short) == learning_rate(5 * i, paper)
        for shape in ("smooth", "stairs"):
            assert rampup(i, short.ramp_iterations, shape) == pytest.approx(rampup(5 * i, paper.ramp_iterations, shape))
    by_hand = tiny_options("dtml", "--max_iterations", "1200", "--lr_step", "70", "--consistency_rampup", "4")
    assert (by_hand.lr_step, by_hand.ramp_iterations) == (70, 600)


def vary(**changes) -> Namespace:
    return Namespace(**{**vars(STEPS), **changes})


def test_cosine_falls_from_the_base_rate_to_zero():
    options = vary(lr_schedule="cosine", max_iterations=100)
    values = [learning_rate(i, options) for i in range(101)]
    assert values[0] == 0.01 and values[50] == pytest.approx(0.005) and values[100] == pytest.approx(0)
    assert values[25] == pytest.approx(0.005 * (1 + math.sqrt(0.5)))
    assert values == sorted(values, reverse=True) and values[99] > 0
    assert learning_rate(150, options) == pytest.approx(0)


def test_constant_and_warm_up():
    assert {learning_rate(i, vary(lr_schedule="constant")) for i in (0, 2500, 9000)} == {0.01}
    options = vary(lr_schedule="constant", warmup=4)
    assert [learning_rate(i, options) for i in range(6)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    assert learning_rate(2500, vary(warmup=4)) == pytest.approx(1e-3)


def test_geometric():
    assert geometric(20, 1500, 0) == 20 and geometric(20, 1500, 1) == pytest.approx(1500)
    assert geometric(2, 8, 0.5) == pytest.approx(4)
    assert geometric(20, 1500, -1) == 20 and geometric(20, 1500, 2) == pytest.approx(1500)
    assert geometric(7, 7, 0.3) == 7
