"""ASDNet: attention-based semi-supervised deep networks (Nie et al., MICCAI 2018).

A V-Net S segments; a confidence network D tells, voxel by voxel, ground truth from segmentation. S learns from the
labeled cases, learns to convince D on all cases, and, from --semi_start on, takes its own hard prediction for the
label of an unlabeled case wherever D is confident (the confidence map exceeds --gamma).

A reconstruction in part: the paper gives neither gamma nor the start of the last term, no implementation for left
atria is public, and the general one departs from the paper. Ours are gamma = 0.5, a start at 25 % of the training
run followed by the shared ramp, and the losses that all methods here share.
"""

from argparse import Namespace
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from dataloaders.batch import Batch
from methods.base import ConsistencyMethod, Terms, Turn, require_unlabeled
from networks.critics import ConfidenceNet, critic_optimizer
from options.methods import ASDNetFlags
from utils.errors import InputError
from utils.losses import (
    attention_dice_loss,
    cross_entropy,
    dice_ce_loss,
    dice_loss,
    foreground_prob,
    masked_mean,
    with_background,
)

SEMI_START_FRACTION = 0.25  # of the training run; 1500 of 6000 iterations
CRITIC_WIDTH = 2  # in units of the V-Net's: 32 filters beside 16, as published


class ASDNet(ASDNetFlags, ConsistencyMethod):
    """S: supervised + adv_weight BCE(D(S(x)), 1) + lambda(t) L_semi; D: BCE(D(Y), 1) + BCE(D(S(x)), 0)."""

    exclusive = True

    def __init__(self, options: Namespace):
        super().__init__(options)
        require_unlabeled(options, "--method asdnet", "train --method supervised")
        self.network = self.make_network("softmax")
        self.critic = ConfidenceNet(CRITIC_WIDTH * options.n_filters, self.num_classes)
        if options.semi_start is None:
            self.ramp_start = round(SEMI_START_FRACTION * options.max_iterations)
        else:
            self.ramp_start = options.semi_start
        if 0 < options.max_iterations <= self.ramp_start:
            raise InputError(
                f"--semi_start {self.ramp_start} is not reached in --max_iterations {options.max_iterations}, counted "
                "from 0; lower the former, or leave the loss on unlabeled cases out with --consistency 0"
            )
        self.ramp_length = min(options.ramp_iterations, options.max_iterations - self.ramp_start)
        self._segmented: Tensor | None = None  # handed from S's turn to D's

    def training_step(self, batch: Batch, iteration: int) -> Terms:
        """S's turn. The term `semi` is there from --semi_start on."""
        labeled = batch.num_labeled
        logits = self.network(batch.image)["softmax"]  # (B, C + 1, W, H, D)
        prob = logits.softmax(dim=1)
        confidence = self.critic(prob)  # (B, 1, W, H, D), logits
        convincing = F.binary_cross_entropy_with_logits(confidence, torch.ones_like(confidence))
        terms = {
            "supervised": self._supervised_loss(logits[:labeled], batch.label),
            "adversarial": self.options.adv_weight * convincing,
        }
        trusted = confidence[labeled:].detach().sigmoid() > self.options.gamma  # a choice of voxels, no gradient
        if iteration >= self.ramp_start:
            semi = self._semi_loss(logits[labeled:], trusted.float())
            terms["semi"] = self.consistency_weight(iteration) * semi
        self.monitor["trusted_voxels"] = trusted.float().mean()
        self._segmented = prob[:labeled].detach()
        return terms

    def critic_step(self, batch: Batch, iteration: int) -> Terms:
        """D's turn, on the labeled cases: ground truth against what S gave in its turn, before it stepped."""
        segmented, self._segmented = self._segmented, None
        real = self.critic(with_background(batch.label))  # (L, 1, W, H, D)
        fake = self.critic(segmented)
        return {
            "critic_real": F.binary_cross_entropy_with_logits(real, torch.ones_like(real)),
            "critic_fake": F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake)),
        }

    def _supervised_loss(self, logits: Tensor, label: Tensor) -> Tensor:
        if self.options.sup_loss == "att_dice":
            return attention_dice_loss(foreground_prob(logits), label, self.options.att_beta)
        return dice_ce_loss(logits, label)

    def _semi_loss(self, logits: Tensor, trusted: Tensor) -> Tensor:
        """Loss against S's own hard prediction, over trusted voxels only; 0 where there are none.

        Args: logits, (N, C + 1, W, H, D); trusted, (N, 1, W, H, D), 0 or 1.
        """
        prob = foreground_prob(logits)  # (N, C, W, H, D)
        winner = with_background(prob.detach()).argmax(dim=1, keepdim=True)  # (N, 1, W, H, D), 0 for the background
        numbers = torch.arange(1, self.num_classes + 1, device=winner.device).view(-1, 1, 1, 1)
        target = (winner == numbers).float()  # (N, C, W, H, D)
        if self.options.semi_loss == "dice":
            return dice_loss(trusted * prob, trusted * target)
        return masked_mean(cross_entropy(logits, target, reduction="none"), trusted)

    def turns(self) -> list[Turn]:
        optimizer = critic_optimizer(self.critic, self.options.critic_lr)
        return [
            Turn("segmenter", self.training_step, self.make_optimizer(self.network.parameters())),
            Turn("critic", self.critic_step, optimizer, scheduled=False),
        ]

    def predict(self, image: Tensor, outputs: Iterable[str] | None = None) -> dict[str, Tensor]:
        return {"seg": foreground_prob(self.network(image)["softmax"])}
