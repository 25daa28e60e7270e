"""What the mean-teacher family shares: a moving average of the student, its noise, and repeated passes.

Mean Teacher is Tarvainen & Valpola, NeurIPS 2017; the details are those of UA-MT's public implementation.
"""

from argparse import Namespace
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dataloaders.batch import Batch
from methods.base import ConsistencyMethod, require_unlabeled
from networks.ema import frozen_copy, update_ema, warm_decay
from utils.losses import foreground_prob

Maps = dict[str, Tensor]


class Teacher(nn.Module):
    """The moving average of a student. It stays in training mode: dropout on, batch norm by its own batch."""

    def __init__(self, student: nn.Module, options: Namespace):
        super().__init__()
        self.options = options
        self.network = frozen_copy(student)

    def sees(self, batch: Batch) -> slice:
        """The crops of a batch on which student and teacher are compared (--cons_on)."""
        return slice(0 if self.options.cons_on == "all" else batch.num_labeled, None)

    def perturb(self, image: Tensor) -> Tensor:
        """The image with Gaussian noise, clipped, drawn anew for every voxel."""
        noise = self.options.noise_sd * torch.randn_like(image)
        return image + noise.clamp(-self.options.noise_clip, self.options.noise_clip)

    def update(self, student: nn.Module, iteration: int) -> None:
        """Follow the student: decay min(1 - 1/(t + 1), --ema_decay), so that the first update (t = 0) copies."""
        update_ema(self.network, student, warm_decay(iteration, self.options.ema_decay))


class MeanTeacherMethod(ConsistencyMethod):
    """A student (a softmax with the background) and its exponential moving average as teacher; methods add the step.

    A run is tested with the student, as in the public implementations; --head teacher reports the teacher.
    """

    outputs = ("seg", "teacher")
    exclusive = True

    def __init__(self, options: Namespace):
        super().__init__(options)
        if options.cons_on == "unlabeled":
            require_unlabeled(options, "--cons_on unlabeled", "give --cons_on all")
        self.student = self.make_network("softmax")
        self.teacher = Teacher(self.student, options)

    def after_step(self, iteration: int) -> None:
        self.teacher.update(self.student, iteration)

    def predict(self, image: Tensor, outputs: Iterable[str] | None = None) -> dict[str, Tensor]:
        networks = {"seg": self.student, "teacher": self.teacher.network}
        return {name: foreground_prob(networks[name](image)["softmax"]) for name in outputs or self.outputs}


@torch.no_grad()
def mean_over_passes(measure: Callable[[Tensor], Maps], image: Tensor, passes: int, group: int) -> Maps:
    """Mean of stochastic maps over repeated passes; running sums, so memory does not grow with their number.

    A call of `measure` gets the B crops repeated as often as fits into `group` crops: with a batch of 4, a pair
    needs 4 calls for 8 passes, as in UA-MT. This grouping matters, because a batch norm in training mode
    normalises by the statistics of all crops of a call.

    Args:
        measure: (N, 1, W, H, D) -> {name: (N, C, W, H, D)}.
        image: (B, 1, W, H, D).
        passes: number of passes per crop.
        group: crops per call at most (at least B): the size of the training batch.
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
