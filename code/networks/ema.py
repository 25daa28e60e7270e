"""Teachers: a frozen copy of a network that follows it as a moving average (Tarvainen & Valpola, NeurIPS 2017)."""

import copy

import torch
from torch import nn


def frozen_copy(network: nn.Module) -> nn.Module:
    """A copy of its own memory that no optimizer changes."""
    return copy.deepcopy(network).requires_grad_(False)


def warm_decay(iteration: int, limit: float) -> float:
    """min(1 - 1/(t + 1), limit): the first update (t = 0) copies, the next ones average all that was seen."""
    return min(1 - 1 / (iteration + 1), limit)


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, decay: float, buffers: bool = False) -> None:
    """teacher <- decay x teacher + (1 - decay) x student, for all parameters; decay 0 copies exactly.

    Batch-norm statistics stay the teacher's own, as in UA-MT's public implementation, unless `buffers` averages them,
    too, for a teacher in evaluation mode.
    """
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    if buffers:
        pairs += zip(teacher.buffers(), student.buffers(), strict=True)
    for old, new in pairs:
        if old.is_floating_point():  # not a number of batches
            old.lerp_(new, 1 - decay)
