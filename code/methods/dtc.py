"""DTC: dual-task consistency (Luo et al., AAAI 2021), and the dual-head network that it shares with SASSNet.

One V-Net segments with one head and regresses the signed distance map (SDM) with the other; both learn from the
labeled cases. On all cases, the soft mask sigmoid(-k z) of the map must agree with the segmentation.
"""

from argparse import Namespace

import torch
import torch.nn.functional as F

from dataloaders.batch import Batch
from methods.arguments import add_sdm_k_argument
from methods.base import Terms
from methods.dual_head import DualHeadMethod
from utils.sdm import prob_from_sdm


class DTC(DualHeadMethod):
    """Dice + 0.3 MSE(SDM) on labeled cases, + lambda(t) MSE between the two masks on all cases."""

    defaults = {"consistency": 1.0}
    presets = {"hippocampus": {"sdm_k": 100.0, "sdm_weight": 1.0}}  # docs/results/hippocampus/preset.md

    @staticmethod
    def add_arguments(group) -> None:
        DualHeadMethod.add_arguments(group)
        add_sdm_k_argument(group)

    def __init__(self, options: Namespace):
        super().__init__(options)
        self.sdm_k = options.sdm_k

    def training_step(self, batch: Batch, iteration: int) -> Terms:
        heads = self.network(batch.image)  # (B, 1, W, H, D) each
        terms = self.supervised_terms(heads, batch)
        # The paper prints sigmoid(k z), which is negative inside: a slip of the sign. Both heads get the gradient.
        disagreement = F.mse_loss(prob_from_sdm(heads["sdm"], self.sdm_k), torch.sigmoid(heads["seg"].float()))
        terms["consistency"] = self.consistency_weight(iteration) * disagreement
        self.monitor["disagreement"] = disagreement.detach()
        return terms
