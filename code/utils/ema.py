"""What the mean-teacher family shares: a frozen moving average of the student, its noise, and repeated passes.

Mean Teacher is Tarvainen & Valpola, NeurIPS 2017; the details are those of UA-MT's public code.
"""

import copy
import math
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dataloaders.batch import Batch
from utils.errors import InputError

Maps = dict[str, Tensor]


def add_teacher_arguments(group, monte_carlo: bool = False) -> None:
    """Flags of every method with a teacher; `monte_carlo` adds the number of its passes."""
    group.add_argument("--ema_decay", type=float, default=0.99, help="momentum of the teacher's weights, in [0, 1)")
    group.add_argument(
        "--ema_buffers",
        action="store_true",
        help="average the batch-norm statistics too; the public codes leave the teacher its own",
    )
    group.add_argument(
        "--noise_sd",
        type=float,
        default=0.1,
        help="sd of the noise on the teacher's image (a whole scan has sd 1)",
    )
    group.add_argument("--noise_clip", type=float, default=0.2, help="largest absolute value of that noise")
    group.add_argument(
        "--cons_on",
        choices=("unlabeled", "all"),
        default="all",
        help="volumes of a batch that student and teacher shall agree on",
    )
    if monte_carlo:
        group.add_argument(
            "--mc_passes", type=int, default=8, help="stochastic passes of the teacher that measure its uncertainty"
        )


def frozen_copy(network: nn.Module) -> nn.Module:
    """A copy of its own memory that no optimizer changes."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, decay: float, buffers: bool = False) -> None:
    """teacher <- decay x teacher + (1 - decay) x student, for all parameters; decay 0 copies exactly.

    With `buffers` the batch-norm statistics follow as well; a counter (integer) is copied.
    """
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    if buffers:
        pairs += zip(teacher.buffers(), student.buffers(), strict=True)
    for old, new in pairs:
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)
        else:
            old.copy_(new)


def add_noise(image: Tensor, sd: float, clip: float) -> Tensor:
    """Gaussian noise of standard deviation `sd`, clipped to [-clip, clip], drawn anew for every voxel."""
    return image + (sd * torch.randn_like(image)).clamp(-clip, clip)


@torch.no_grad()
def mean_over_passes(measure: Callable[[Tensor], Maps], image: Tensor, passes: int, group: int) -> Maps:
    """Mean of stochastic maps over repeated passes; running sums, so memory does not grow with their number.

    A call of `measure` gets the B volumes repeated as often as fits into `group` volumes: with a batch of 4, a
    pair needs 4 calls for 8 passes, as in UA-MT. This grouping matters, because a batch norm in training mode
    normalises by the statistics of all volumes of a call.

    Args:
        measure: (N, 1, W, H, D) -> {name: (N, C, W, H, D)}.
        image: (B, 1, W, H, D).
        passes: number of passes per volume.
        group: volumes per call at most (at least B): the size of the training batch.
    Returns: {name: (B, C, W, H, D) float32}.
    """
    repeats = max(1, group // len(image))
    sums: Maps = {}
    for first in range(0, passes, repeats):
        count = min(repeats, passes - first)
        for name, maps in measure(image.repeat(count, 1, 1, 1, 1)).items():
            total = maps.float().unflatten(0, (count, len(image))).sum(dim=0)
            sums[name] = sums[name] + total if name in sums else total
    return {name: total / passes for name, total in sums.items()}


class Teacher(nn.Module):
    """The moving average of a student as the flags ask for it. It trains along: dropout on, its own batch norm."""

    def __init__(self, student: nn.Module, options: Namespace):
        super().__init__()
        _check(options)
        self.network = frozen_copy(student)
        self.decay, self.buffers = options.ema_decay, options.ema_buffers
        self.noise_sd, self.noise_clip = options.noise_sd, options.noise_clip
        self.on_all = options.cons_on == "all"

    def sees(self, batch: Batch) -> slice:
        """The volumes of a batch that student and teacher are compared on (--cons_on)."""
        return slice(0 if self.on_all else batch.num_labeled, None)

    def perturb(self, image: Tensor) -> Tensor:
        """The image with the teacher's noise, a fresh draw."""
        return add_noise(image, self.noise_sd, self.noise_clip)

    def update(self, student: nn.Module, iteration: int) -> None:
        """Follow the student: decay min(1 - 1/(t + 1), --ema_decay), so that the first update (t = 0) copies."""
        update_ema(self.network, student, min(1 - 1 / (iteration + 1), self.decay), self.buffers)


def _check(options: Namespace) -> None:
    if not 0 <= options.ema_decay < 1:
        raise InputError(f"--ema_decay {options.ema_decay} must be in [0, 1)")
    for name in ("noise_sd", "noise_clip"):
        if not 0 <= getattr(options, name) < math.inf:
            raise InputError(f"--{name} {getattr(options, name)} must be a number of at least 0")
    if getattr(options, "mc_passes", 1) < 1:
        raise InputError(f"--mc_passes {options.mc_passes} must be at least 1")
