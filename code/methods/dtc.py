"""DTC: dual-task consistency (Luo et al., AAAI 2021), and the dual-head network that it shares with SASSNet.

One V-Net segments with one head and regresses the signed distance map (SDM) with the other; both learn from the
labeled cases. On all cases, the soft mask sigmoid(-k z) of the map must agree with the segmentation.
"""

from argparse import Namespace
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from dataloaders.batch import Batch
from methods.base import ConsistencyMethod, Terms
from utils.losses import dice_loss
from utils.sdm import (
    SDM_STEEPNESS,
    add_sdm_empty_argument,
    add_sdm_head_argument,
    add_sdm_k_argument,
    prob_from_sdm,
    signed_distance_batch,
)


class DualHeadMethod(ConsistencyMethod):
    """A V-Net with a segmentation and an SDM head, and the supervision of both; methods add the rest."""

    outputs = ("seg", "sdm")
    sdm_k = SDM_STEEPNESS

    @staticmethod
    def add_arguments(group) -> None:
        group.add_argument(
            "--sdm_weight", type=float, default=0.3, help="weight of the SDM regression (--beta of the public codes)"
        )
        group.add_argument(
            "--bce",
            action="store_true",
            help="add the binary cross entropy of the segmentation, which the public codes compute but do not use",
        )
        add_sdm_empty_argument(group)
        add_sdm_head_argument(group)

    def __init__(self, options: Namespace):
        super().__init__(options)
        self.network = self.make_vnet("sdm", "seg", sdm_head=options.sdm_head)
        self.sdm_weight, self.bce, self.sdm_empty = options.sdm_weight, options.bce, options.sdm_empty

    def supervised_terms(self, heads: dict[str, Tensor], batch: Batch) -> Terms:
        """Dice of the segmentation and mean squared error of the map, on the labeled cases."""
        logits, sdm = (heads[name][: batch.num_labeled].float() for name in ("seg", "sdm"))  # (L, 1, W, H, D)
        target = signed_distance_batch(batch.label, self.sdm_empty)
        terms = {
            "seg": dice_loss(logits.sigmoid(), batch.label),
            "sdm": self.sdm_weight * F.mse_loss(sdm, target),
        }
        if self.bce:
            terms["bce"] = F.binary_cross_entropy_with_logits(logits, batch.label)
        return terms

    def predict(self, image: Tensor, outputs: Iterable[str] | None = None) -> dict[str, Tensor]:
        heads = self.network(image, tuple(outputs or self.outputs))
        return {name: prob_from_sdm(x, self.sdm_k) if name == "sdm" else x.sigmoid() for name, x in heads.items()}

    def signed_maps(self, image: Tensor) -> dict[str, Tensor]:
        return self.network(image, ("sdm",))


class DTC(DualHeadMethod):
    """Dice + 0.3 MSE(SDM) on labeled cases, + lambda(t) MSE between the two masks on all cases."""

    defaults = {"consistency": 1.0}

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
