"""Double-uncertainty weighted mean teacher (Wang et al., MICCAI 2020; arXiv 2010.09298). A reconstruction.

There is no public implementation, and only the paper's abstract was at hand. It states the idea: on labeled and
unlabeled cases a Bayesian teacher (dropout) gives a segmentation uncertainty and a feature uncertainty, the latter
from how information is spread over channels; both weight the disagreement of student and teacher, and a learnable
uncertainty loss rewards low uncertainty. All else here is our reading of it: two distributions per voxel, p over
the classes and q over the channels of the last decoder block (a softmax), are treated alike,
    L = mean(exp(-U) ||p_student - mean p_teacher||^2) + b mean(H(p_student)),
where U is the entropy of the teacher's mean over several passes, and H that of the student: an entropy of the
teacher, an average without gradient, could not be learned. Entropies over channels are divided by ln(channels).
"""

import math
from argparse import Namespace

import torch
from torch import Tensor

from dataloaders.batch import Batch
from methods.base import Terms
from methods.mean_teacher import Maps, MeanTeacherMethod, mean_over_passes
from networks import Network
from options.methods import DoubleUncertaintyFlags
from utils.errors import InputError
from utils.losses import dice_ce_loss, entropy

SEG, FEAT = "segmentation", "feature"  # the two distributions per voxel: over classes, over channels


class DoubleUncertainty(DoubleUncertaintyFlags, MeanTeacherMethod):
    """Dice + CE on labeled cases, + lambda(t) (L over the classes + L over the channels)."""

    def __init__(self, options: Namespace):
        super().__init__(options)
        stride = self.student.stride
        if any(length % stride for length in options.patch_size):
            raise InputError(
                f"--patch_size {' '.join(map(str, options.patch_size))} must be multiples of {stride} for the features "
                "of this method"
            )

    def training_step(self, batch: Batch, iteration: int) -> Terms:
        logits, student = _distributions(self.student, batch.image)  # (B, C + 1, W, H, D), (B, C + 1 or F, W, H, D)
        seen = self.teacher.sees(batch)
        teacher = mean_over_passes(
            self._noisy_pass, batch.image[seen], self.options.mc_passes, group=len(batch.image)
        )  # (N, C + 1 or F, W, H, D)
        weight = self.consistency_weight(iteration)
        return {
            "supervised": dice_ce_loss(logits[: batch.num_labeled], batch.label),
            SEG: weight * self._uncertain_loss(SEG, student[SEG][seen], teacher[SEG]),
            FEAT: weight * self._uncertain_loss(FEAT, student[FEAT][seen], teacher[FEAT]),
        }

    def _uncertain_loss(self, name: str, student: Tensor, teacher: Tensor) -> Tensor:
        """L of one of the two distributions, (N, C + 1 or F, W, H, D)."""
        largest = 1.0 if name == SEG else math.log(student.shape[1])
        uncertainty = entropy(teacher) / largest  # (N, 1, W, H, D)
        distance = (student - teacher).square().sum(dim=1, keepdim=True)
        self.monitor[f"{name}_uncertainty"] = uncertainty.mean()
        own = (entropy(student) / largest).mean()
        return (torch.exp(-uncertainty) * distance).mean() + self.options.unc_weight * own

    @torch.no_grad()
    def _noisy_pass(self, image: Tensor) -> Maps:
        return _distributions(self.teacher.network, self.teacher.perturb(image))[1]


def _distributions(network: Network, image: Tensor) -> tuple[Tensor, Maps]:
    """Logits (N, C + 1, W, H, D), and probabilities over the classes and over the F channels, float32."""
    features = network.features(image)  # (N, F, W, H, D), before the dropout of the heads
    logits = network.apply_heads(features)["softmax"]
    return logits, {SEG: logits.softmax(dim=1), FEAT: features.float().softmax(dim=1)}
