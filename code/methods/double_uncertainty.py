"""Double-uncertainty weighted mean teacher (Wang et al., MICCAI 2020; arXiv 2010.09298). A reconstruction.

There is no public code, and only the paper's abstract was at hand. It states the idea: on labeled and
unlabeled cases a Bayesian teacher (dropout) gives a segmentation uncertainty and a feature uncertainty, the latter
from how information is spread over channels; both weight the disagreement of student and teacher, and a learnable
uncertainty loss rewards low uncertainty. All else here is our reading of it: two distributions per voxel, p over
the classes and q over the channels of a decoder block (a softmax; the last block), are treated alike,
    L = mean(exp(-U) ||p_student - mean p_teacher||^2) + b mean(H(p_student)),
where U is the entropy of the teacher's mean over several passes, and H that of the student: an entropy of the
teacher, an average without gradient, could not be learned. Entropies over channels are divided by ln(channels).
"""

import math
from argparse import Namespace

import torch
from torch import Tensor

from dataloaders.batch import Batch
from methods.arguments import add_teacher_arguments
from methods.base import Terms
from methods.mean_teacher import Maps, MeanTeacherMethod, mean_over_passes
from networks.vnet import STRIDE, VNet
from options.types import at_least
from utils.errors import InputError
from utils.losses import dice_ce_loss, entropy

SEG, FEAT = "segmentation", "feature"  # the two distributions per voxel: over classes, over channels


class DoubleUncertainty(MeanTeacherMethod):
    """Dice + CE on labeled cases, + lambda(t) (L over the classes + L over the channels)."""

    defaults = {"consistency": 0.1, "cons_on": "all"}

    @staticmethod
    def add_arguments(group) -> None:
        add_teacher_arguments(group, monte_carlo=True)
        kinds = ("entropy", "variance")
        group.add_argument(
            "--seg_unc", choices=kinds, default="entropy", help="segmentation uncertainty: of the mean, or over passes"
        )
        group.add_argument(
            "--feat_unc", choices=kinds, default="entropy", help="feature uncertainty: of the mean, or over passes"
        )
        group.add_argument(
            "--feat_level",
            type=int,
            choices=range(4),
            default=0,
            help="features: the decoder block after so many halvings, 0 the last one at full resolution",
        )
        group.add_argument(
            "--unc_reg",
            choices=("student", "teacher"),
            default="student",
            help="whose uncertainty the loss adds; the teacher's has no gradient and only shows in the curve",
        )
        group.add_argument(
            "--unc_weight", type=at_least(0.0), default=1.0, help="weight b of that uncertainty; 0 for none"
        )
        group.add_argument("--seg_weight", type=at_least(0.0), default=1.0, help="weight of the segmentation term")
        group.add_argument("--feat_weight", type=at_least(0.0), default=1.0, help="weight of the feature term")

    def __init__(self, options: Namespace):
        super().__init__(options)
        if any(length % STRIDE for length in options.patch_size):
            raise InputError(
                f"--patch_size {' '.join(map(str, options.patch_size))} must be multiples of {STRIDE} for the features "
                "of this method"
            )
        self.passes, self.level = options.mc_passes, options.feat_level
        self.by_variance = {SEG: options.seg_unc == "variance", FEAT: options.feat_unc == "variance"}
        self.own_uncertainty, self.unc_weight = options.unc_reg == "student", options.unc_weight
        self.weights = {SEG: options.seg_weight, FEAT: options.feat_weight}
        channels = options.n_filters * 2**options.feat_level
        self.largest = {SEG: 1.0, FEAT: math.log(channels)}  # what entropies are divided by

    def training_step(self, batch: Batch, iteration: int) -> Terms:
        features, logits = self._features_and_logits(self.student, batch.image)  # (B, F, w, h, d), (B, 2, W, H, D)
        seen = self.teacher.sees(batch)
        student = _distributions(features[seen], logits[seen])
        teacher = mean_over_passes(self._noisy_pass, batch.image[seen], self.passes, group=len(batch.image))
        weight = self.consistency_weight(iteration)
        terms = {"supervised": dice_ce_loss(logits[: batch.num_labeled], batch.label)}
        for name in (SEG, FEAT):
            terms[name] = weight * self.weights[name] * self._uncertain_loss(name, student[name], teacher)
        return terms

    @torch.no_grad()
    def _noisy_pass(self, image: Tensor) -> Maps:
        maps = _distributions(*self._features_and_logits(self.teacher.network, self.teacher.perturb(image)))
        squares = {_squared(name): maps[name].square() for name, wanted in self.by_variance.items() if wanted}
        return maps | squares

    def _features_and_logits(self, network: VNet, image: Tensor) -> tuple[Tensor, Tensor]:
        """Features of the block that --feat_level names, before any dropout, and logits of the classes."""
        tapped: list[Tensor] = []
        hook = network.decoder[-1 - self.level].register_forward_hook(lambda *call: tapped.append(call[-1]))
        try:
            last = network.features(image)
        finally:
            hook.remove()
        return tapped[0], network.apply_heads(last)["softmax"]

    def _uncertain_loss(self, name: str, prob: Tensor, teacher: Maps) -> Tensor:
        """One of the two terms; `prob` (N, C, W, H, D) is the student's distribution."""
        mean = teacher[name]
        if self.by_variance[name]:
            uncertainty = (teacher[_squared(name)] - mean.square()).mean(dim=1, keepdim=True)  # (N, 1, W, H, D)
        else:
            uncertainty = entropy(mean) / self.largest[name]
        self.monitor[f"{name}_uncertainty"] = uncertainty.mean()
        distance = (prob - mean).square().sum(dim=1, keepdim=True)
        added = entropy(prob) / self.largest[name] if self.own_uncertainty else uncertainty
        return (torch.exp(-uncertainty) * distance).mean() + self.unc_weight * added.mean()


def _distributions(features: Tensor, logits: Tensor) -> Maps:
    """Probabilities over the classes (N, 2, W, H, D) and over the channels (N, F, w, h, d), float32."""
    return {SEG: logits.float().softmax(dim=1), FEAT: features.float().softmax(dim=1)}


def _squared(name: str) -> str:
    return f"{name}^2"
