"""Schedules: pure functions of the iteration, so that a resumed run needs no state for them."""

import math

RAMP_UNIT = 150  # iterations per unit of --consistency_rampup; "epoch = iteration // 150" in the public implementations
RAMP_STEEPNESS = 5.0  # exp(-5 (1 - t)^2), Laine & Aila, ICLR 2017
STAIRS = 40  # of a ramp over the 6000 iterations of the public implementations: 6000 / 150


def rampup(iteration: float, length: float, shape: str = "smooth", stairs: float = STAIRS) -> float:
    """Gaussian ramp exp(-5 (1 - min(t, T) / T)^2), in (0, 1].

    Args:
        iteration: t, counted from 0.
        length: T in iterations; 0 means no ramp.
        shape: `smooth`, or `stairs` of the public implementations (0.9969 on the last of 40).
        stairs: how many there are over T.
    """
    if length <= 0:
        return 1.0
    if shape == "stairs":
        progress = math.floor(iteration * stairs / length) / stairs
    else:
        progress = iteration / length
    progress = min(progress, 1.0)
    return math.exp(-RAMP_STEEPNESS * (1 - progress) ** 2)


def learning_rate(iteration: int, options) -> float:
    """Learning rate at an iteration (counted from 0), for --lr_schedule steps | cosine | constant.

    `steps` multiplies by --lr_gamma after every --lr_step iterations; `cosine` falls to 0 at --max_iterations.
    Both follow a linear --warmup.
    """
    rate = options.base_lr
    if options.lr_schedule == "steps":
        rate *= options.lr_gamma ** (iteration // options.lr_step)
    elif options.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(iteration / options.max_iterations, 1.0)))
    return rate * min(1.0, (iteration + 1) / options.warmup) if options.warmup else rate


def geometric(start: float, end: float, progress: float) -> float:
    """Geometric interpolation from `start` (progress 0) to `end` (progress 1)."""
    return start * (end / start) ** min(max(progress, 0.0), 1.0)
