"""SASSNet: shape-aware adversarial learning (Li, Zhang & He, MICCAI 2020).

One V-Net G segments and regresses the signed distance map (SDM); both heads learn from the labeled cases. A critic
D sees a predicted map with its image and tells maps of labeled from those of unlabeled cases, while G learns to
make its maps of unlabeled cases pass for labeled ones. D never sees the ground truth's maps.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataloaders.batch import Batch
from methods.base import Terms, Turn, require_unlabeled
from methods.dual_head import DualHeadMethod
from networks.critics import SDMCritic, critic_optimizer
from options.methods import SASSNetFlags

UNLABELED_CLASS, LABELED_CLASS = 0, 1  # classes of the critic
CRITIC_WIDTH = 4  # in units of the V-Net's: 64 filters beside 16, as published


class SASSNet(SASSNetFlags, DualHeadMethod):
    """G: Dice + 0.3 MSE(SDM) on labeled cases + beta(t) CE(D(map of unlabeled), labeled); then D: CE on all cases."""

    def __init__(self, options: Namespace):
        super().__init__(options)
        require_unlabeled(options, "--method sassnet", "train --method dtc")
        self.critic = SDMCritic(CRITIC_WIDTH * options.n_filters, num_classes=self.num_classes)

    def training_step(self, batch: Batch, iteration: int) -> Terms:
        """G's turn."""
        heads = self.network(batch.image)  # (B, C, W, H, D) each
        terms = self.supervised_terms(heads, batch)
        with evaluating(self.critic):  # a verdict without dropout
            verdict = self.critic(heads["sdm"][batch.num_labeled :], batch.image[batch.num_labeled :])  # (B - L, 2)
        passing = F.cross_entropy(verdict, torch.full_like(verdict[:, 0], LABELED_CLASS, dtype=torch.long))
        terms["adversarial"] = self.consistency_weight(iteration) * passing
        self.monitor["adversarial_raw"] = passing.detach()
        return terms

    def critic_step(self, batch: Batch, iteration: int) -> Terms:
        """D's turn: which of the maps that G, as it would be tested, predicts now are of labeled cases?

        G's first pass cannot be used again: it had dropout, statistics of the batch and the former weights.
        """
        with torch.no_grad(), evaluating(self.network):
            sdm = self.network(batch.image, ("sdm",))["sdm"]  # (B, C, W, H, D)
        verdict = self.critic(sdm, batch.image)  # (B, 2)
        target = critic_target(batch)
        self.monitor["critic_accuracy"] = (verdict.argmax(dim=1) == target).float().mean()
        return {"critic": F.cross_entropy(verdict, target)}

    def turns(self) -> list[Turn]:
        optimizer = critic_optimizer(self.critic, self.options.critic_lr)
        return [
            Turn("segmenter", self.training_step, self.make_optimizer(self.network.parameters())),
            Turn("critic", self.critic_step, optimizer, scheduled=False),
        ]


def critic_target(batch: Batch) -> Tensor:
    """Class of every case of a batch, (B,) int64: the labeled ones come first."""
    order = torch.arange(len(batch.image), device=batch.image.device)
    return torch.where(order < batch.num_labeled, LABELED_CLASS, UNLABELED_CLASS)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, running statistics) for the time of a `with` block."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
