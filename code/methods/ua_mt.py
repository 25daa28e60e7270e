"""UA-MT: uncertainty-aware mean teacher (Yu et al., MICCAI 2019).

A student learns from Dice + cross entropy on labeled cases, and to agree with its own moving average, the teacher,
on noisy copies of the unlabeled ones. Only voxels count where the teacher is sure: it looks several times, with
dropout and fresh noise, and the entropy of its mean prediction must lie below a threshold that rises with time.
"""

import math

import torch
from torch import Tensor

from dataloaders.batch import Batch
from methods.base import Terms
from methods.mean_teacher import Maps, MeanTeacherMethod, mean_over_passes
from options.methods import UAMTFlags
from utils.losses import dice_ce_loss, entropy, foreground_prob, masked_mean, squared_difference, with_background
from utils.schedules import rampup


class UAMT(UAMTFlags, MeanTeacherMethod):
    """Dice + CE on labeled cases, + lambda(t) squared disagreement where the teacher is certain."""

    def training_step(self, batch: Batch, iteration: int) -> Terms:
        logits = self.student(batch.image)["softmax"]  # (B, C + 1, W, H, D)
        seen = self.teacher.sees(batch)
        image, prob = batch.image[seen], foreground_prob(logits[seen])  # (N, C, W, H, D)

        target = self._noisy_pass(image)["prob"]  # one pass of its own, not the mean below
        passes, group = self.options.mc_passes, len(batch.image)
        mean = mean_over_passes(self._noisy_pass, image, passes, group)["prob"]  # (N, C, W, H, D)
        certain = entropy(with_background(mean)) < self._threshold(iteration)  # (N, 1, W, H, D)
        disagreement = masked_mean(squared_difference(prob, target), certain)
        if self.options.uamt_norm == "paper":  # the sum over the classes, not their mean
            disagreement = (self.num_classes + 1) * disagreement

        self.monitor["certain"] = certain.float().mean()
        return {
            "supervised": dice_ce_loss(logits[: batch.num_labeled], batch.label),
            "consistency": self.consistency_weight(iteration) * disagreement,
        }

    @torch.no_grad()
    def _noisy_pass(self, image: Tensor) -> Maps:
        return {"prob": foreground_prob(self.teacher.network(self.teacher.perturb(image))["softmax"])}

    def _threshold(self, iteration: int) -> float:
        return uncertainty_threshold(iteration, self.options.max_iterations, self.num_classes)

    def courses(self) -> list[str]:
        first, last = (self._threshold(iteration) for iteration in (0, self.options.max_iterations))
        return [*super().courses(), f"uncertainty threshold from {first:.3f} to {last:.3f}"]


def uncertainty_threshold(iteration: int, iterations: int, num_classes: int = 1) -> float:
    """H(t) = (3/4 + 1/4 exp(-5 (1 - t/T)^2)) U, in nats; U = ln(C + 1), the largest entropy, lets everything pass."""
    return (0.75 + 0.25 * rampup(iteration, iterations)) * math.log(num_classes + 1)
