"""ASDNet: attention-based semi-supervised deep networks (Nie et al., MICCAI 2018).

A V-Net S segments; a confidence network D tells, voxel by voxel, ground truth from segmentation. S learns from the
labeled cases, learns to convince D on all cases, and, from --semi_start on, takes its own hard prediction for the
label of an unlabeled case wherever D is confident (the confidence map exceeds --gamma).

A reconstruction in part: the paper gives neither gamma nor the start of the last term, no code for left atria is
public, and the general one departs from the paper. Ours are gamma = 0.5, a start at 25 % of the training followed
by the shared ramp, and the losses that all methods here share.
"""

from argparse import Namespace
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from dataloaders.batch import Batch
from methods.base import ConsistencyMethod, Terms, Turn, require_unlabeled
from networks.critics import CRITIC_LR, ConfidenceNet, critic_optimizer
from options.types import at_least, between, positive
from utils.errors import InputError
from utils.losses import attention_dice_loss, dice_ce_loss, dice_loss, foreground_logits, foreground_prob, masked_mean

SEMI_START_FRACTION = 0.25  # of the training; 1500 of 6000 iterations
CRITIC_WIDTH = 2  # in units of the V-Net's: 32 filters beside 16, as published


class ASDNet(ConsistencyMethod):
    """S: supervised + adv_weight BCE(D(S(x)), 1) + lambda(t) L_semi; D: BCE(D(Y), 1) + BCE(D(S(x)), 0)."""

    defaults = {"consistency": 0.3}

    @staticmethod
    def add_arguments(group) -> None:
        group.add_argument(
            "--sup_loss",
            choices=("ce_dice", "att_dice"),
            default="ce_dice",
            help="supervised loss: that of the other methods, or the paper's Dice with sample attention",
        )
        group.add_argument(
            "--att_beta", type=at_least(0.0), default=2.0, help="exponent of the sample attention (att_dice)"
        )
        group.add_argument("--adv_weight", type=at_least(0.0), default=0.03, help="weight of the adversarial loss")
        group.add_argument(
            "--semi_loss",
            choices=("dice", "nll"),
            default="dice",
            help="loss on confident voxels of unlabeled cases: the paper's Dice, or the public code's log likelihood",
        )
        group.add_argument(
            "--gamma", type=between(0.0, 1.0), default=0.5, help="confidence above which a voxel is trusted"
        )
        group.add_argument(
            "--semi_start",
            type=at_least(0),
            default=None,
            help="iteration at which the loss on unlabeled cases, weighted by --consistency, sets in and its ramp "
            "begins (default: 25 %% of the training)",
        )
        group.add_argument(
            "--critic_image", action="store_true", help="show the critic the image, too; the paper's sees labels alone"
        )
        group.add_argument("--critic_lr", type=positive, default=CRITIC_LR, help="constant Adam rate of the critic")

    def __init__(self, options: Namespace):
        super().__init__(options)
        require_unlabeled(options, "--method asdnet", "train --method supervised")
        if not 0 <= options.gamma <= 1:
            raise InputError(f"--gamma {options.gamma} must be in [0, 1]: it is compared with a probability")
        if options.semi_start is not None and options.semi_start < 0:
            raise InputError(f"--semi_start {options.semi_start} is an iteration, counted from 0")
        self.network = self.make_vnet("softmax")
        self.critic = ConfidenceNet(CRITIC_WIDTH * options.n_filters, in_channels=2 + options.critic_image)
        self.sup_loss, self.att_beta, self.adv_weight = options.sup_loss, options.att_beta, options.adv_weight
        self.semi_loss, self.gamma, self.critic_lr = options.semi_loss, options.gamma, options.critic_lr
        self.critic_image = options.critic_image
        by_default = round(SEMI_START_FRACTION * options.max_iterations)
        self.semi_start = by_default if options.semi_start is None else options.semi_start
        self._ramp_start = self.semi_start
        self._ramp["length"] = min(options.ramp_iterations, options.max_iterations - self.semi_start)
        self._segmented: Tensor | None = None  # handed from S's turn to D's

    def turns(self) -> list[Turn]:
        return [
            Turn("segmenter", self.training_step, self.make_optimizer(self.network.parameters())),
            Turn("critic", self.critic_step, critic_optimizer(self.critic, self.critic_lr), scheduled=False),
        ]

    def training_step(self, batch: Batch, iteration: int) -> Terms:
        """S's turn. The term `semi` is there from --semi_start on."""
        labeled = batch.num_labeled
        logits = self.network(batch.image)["softmax"].float()  # (B, 2, W, H, D)
        prob = logits.softmax(dim=1)
        confidence = self.critic(self._shown(prob, batch))  # (B, 1, W, H, D), logits
        convincing = F.binary_cross_entropy_with_logits(confidence, torch.ones_like(confidence))
        terms = {
            "supervised": self._supervised_loss(foreground_logits(logits[:labeled]), batch.label),
            "adversarial": self.adv_weight * convincing,
        }
        trusted = confidence[labeled:].detach().sigmoid() > self.gamma  # a choice of voxels, without a gradient
        if iteration >= self.semi_start:
            semi = self._semi_loss(foreground_logits(logits[labeled:]), trusted.float())
            terms["semi"] = self.consistency_weight(iteration) * semi
        self.monitor["trusted_voxels"] = trusted.float().mean()
        self._segmented = prob[:labeled].detach()
        return terms

    def _supervised_loss(self, logits: Tensor, label: Tensor) -> Tensor:
        if self.sup_loss == "att_dice":
            return attention_dice_loss(logits.sigmoid(), label, self.att_beta)
        return dice_ce_loss(logits, label)

    def _semi_loss(self, logits: Tensor, trusted: Tensor) -> Tensor:
        """Loss against S's own hard prediction, over trusted voxels only; 0 where there are none."""
        prob = logits.sigmoid()
        target = (prob.detach() > 0.5).float()
        if self.semi_loss == "dice":
            return dice_loss(trusted * prob, trusted * target)
        return masked_mean(F.binary_cross_entropy_with_logits(logits, target, reduction="none"), trusted)

    def critic_step(self, batch: Batch, iteration: int) -> Terms:
        """D's turn, on the labeled cases: ground truth against what S gave in its turn, before it stepped."""
        segmented, self._segmented = self._segmented, None
        truth = torch.cat((1 - batch.label, batch.label), dim=1)
        real = self.critic(self._shown(truth, batch))  # (L, 1, W, H, D)
        fake = self.critic(self._shown(segmented, batch))
        return {
            "critic_real": F.binary_cross_entropy_with_logits(real, torch.ones_like(real)),
            "critic_fake": F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake)),
        }

    def _shown(self, prob: Tensor, batch: Batch) -> Tensor:
        """What the critic sees of the first volumes of a batch: (N, 2, W, H, D), with --critic_image (N, 3, ...)."""
        return torch.cat((prob, batch.image[: len(prob)]), dim=1) if self.critic_image else prob

    def predict(self, image: Tensor, outputs: Iterable[str] | None = None) -> dict[str, Tensor]:
        return {"seg": foreground_prob(self.network(image)["softmax"])}
