"""DTC: dual-task consistency (Luo et al., AAAI 2021).

One V-Net segments with one head and regresses the signed distance map (SDM) with the other; both learn from the
labeled cases. On all cases, the soft mask sigmoid(-k z) of the map must agree with the segmentation.
"""

import torch.nn.functional as F
from torch import Tensor

from dataloaders.batch import Batch
from methods.base import Terms
from methods.dual_head import DualHeadMethod
from options.methods import DTCFlags
from utils.sdm import prob_from_sdm


class DTC(DTCFlags, DualHeadMethod):
    """Dice + 0.3 MSE(SDM) on labeled cases, + lambda(t) MSE between the two masks on all cases."""

    def training_step(self, batch: Batch, iteration: int) -> Terms:
        heads = self.network(batch.image)  # (B, C, W, H, D) each
        terms = self.supervised_terms(heads, batch)
        # The gradient reaches both heads.
        disagreement = F.mse_loss(self.soft_mask(heads["sdm"]), heads["seg"].sigmoid())
        terms["consistency"] = self.consistency_weight(iteration) * disagreement
        self.monitor["disagreement"] = disagreement.detach()
        return terms

    def soft_mask(self, sdm: Tensor) -> Tensor:
        """sigmoid(-k z); the paper prints sigmoid(k z), which is negative inside: a slip of the sign."""
        return prob_from_sdm(sdm, self.options.sdm_k)
