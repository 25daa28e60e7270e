"""DTML: dual-task mutual learning (Zhang & Zhang, PRCV 2021), in all variants of the paper's Tables 1 and 2.

M_s predicts a probability map and learns from Dice + cross entropy (L_seg). M_d regresses a signed distance
map (SDM), whose soft mask sigmoid(-k z) learns from Dice (L_mask); both on labeled cases. A consistency loss
between the two masks (L_con, Eqs. 5-6) on all cases makes the networks teach each other.
"""

from argparse import Namespace
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from dataloaders.batch import Batch
from methods.arguments import add_sdm_empty_argument, add_sdm_head_argument, add_sdm_k_argument
from methods.base import ConsistencyMethod, Terms
from options.types import at_least
from utils.losses import dice_ce_loss, dice_loss
from utils.schedules import geometric
from utils.sdm import prob_from_sdm, signed_distance_batch


class DTML(ConsistencyMethod):
    """Two V-Nets of their own parameters: `m_s` with the segmentation head, `m_d` with the SDM head."""

    defaults = {"consistency": 1.0}
    presets = {
        "cpu": {"sdm_k": 100.0, "sdm_k_start": 10.0, "mask_loss": "dice+ce"},  # docs/results/cpu_preset.md
        "hippocampus": {"sdm_k": 100.0, "sdm_k_start": 10.0, "mask_loss": "dice+ce"},
        # docs/results/phantom.md
        "demo": {"sdm_k": 100.0, "sdm_k_start": 10.0, "mask_loss": "dice+ce", "labeled_bs": 3, "rampup_share": 0.375},
    }

    @staticmethod
    def add_arguments(group) -> None:
        group.add_argument(
            "--branch",
            choices=("both", "seg", "sdm"),
            default="both",
            help="networks to train: both (DTML), M_s only, or M_d only (Table 2; without L_con)",
        )
        group.add_argument(
            "--sdm_supervision",
            choices=("mask", "sdm", "both"),
            default="mask",
            help="supervision of M_d: L_mask on the transformed mask, L_dis on the distance map, or both (Table 1)",
        )
        group.add_argument(
            "--mask_loss",
            choices=("dice", "dice+ce"),
            default="dice",
            help="form of L_mask: Dice (public code), or 0.5 (cross entropy + Dice) on the transform's logits -k z",
        )
        add_sdm_k_argument(group)
        group.add_argument(
            "--sdm_k_start",
            type=at_least(0.0),
            default=0.0,
            help="steepness at the first iteration, growing geometrically to --sdm_k at the last one; 0 is --sdm_k "
            "throughout, as in the paper. A low start gives every voxel a gradient while M_d is still far off",
        )
        group.add_argument(
            "--con_scale",
            type=at_least(0.0),
            default=1.0,
            help="factor on the gradient of L_con; 2 restores the public code, which back-propagates it twice",
        )
        add_sdm_empty_argument(group)
        add_sdm_head_argument(group)

    def __init__(self, options: Namespace):
        super().__init__(options)
        self.m_s = self.make_vnet("seg") if options.branch != "sdm" else None
        self.m_d = self.make_vnet("sdm", sdm_head=options.sdm_head) if options.branch != "seg" else None
        self.outputs = ("seg", "sdm", "mean") if options.branch == "both" else (options.branch,)
        self.sdm_supervision, self.mask_loss = options.sdm_supervision, options.mask_loss
        self.k, self.k_start = options.sdm_k, options.sdm_k_start or options.sdm_k
        self.con_scale, self.sdm_empty = options.con_scale, options.sdm_empty
        self.iterations = options.max_iterations

    def training_step(self, batch: Batch, iteration: int) -> Terms:
        k = self.steepness(iteration)
        terms: Terms = {}
        if self.m_s is not None:
            logits = self.m_s(batch.image)["seg"]  # (B, 1, W, H, D)
            terms["seg"] = dice_ce_loss(logits[: batch.num_labeled], batch.label)
        if self.m_d is not None:
            sdm = self.m_d(batch.image)["sdm"]  # (B, 1, W, H, D), in [-1, 1]
            terms |= self._sdm_terms(sdm[: batch.num_labeled], batch.label, k)
        if self.m_s is not None and self.m_d is not None:
            disagreement = F.mse_loss(prob_from_sdm(sdm, k), logits.float().sigmoid())  # Eqs. 5 and 6, all cases
            # One joint backward: each network's gradient is that of its own loss with the peer detached.
            terms["consistency"] = self.con_scale * self.consistency_weight(iteration) * disagreement
            self.monitor["disagreement"] = disagreement.detach()
        return terms

    def courses(self) -> list[str]:
        steeper = self.m_d is not None and self.k_start != self.k
        exchange = super().courses() if self.m_s is not None and self.m_d is not None else []
        return [*exchange, *([f"k from {self.k_start:g} to {self.k:g}"] if steeper else [])]

    def steepness(self, iteration: int) -> float:
        """k of the transform at an iteration."""
        return geometric(self.k_start, self.k, iteration / self.iterations)

    def _sdm_terms(self, sdm: Tensor, label: Tensor, k: float) -> Terms:
        """L_mask (Eq. 3) and L_dis (Eq. 4) of M_d on the labeled cases; distances only computed if asked for."""
        terms: Terms = {}
        if self.sdm_supervision != "sdm":
            as_dice = self.mask_loss == "dice"
            terms["mask"] = dice_loss(prob_from_sdm(sdm, k), label) if as_dice else dice_ce_loss(-k * sdm, label)
        if self.sdm_supervision != "mask":
            terms["dis"] = F.mse_loss(sdm, signed_distance_batch(label, self.sdm_empty))
        return terms

    def predict(self, image: Tensor, outputs: Iterable[str] | None = None) -> dict[str, Tensor]:
        names = tuple(outputs or self.outputs)
        probs = {}
        if {"seg", "mean"} & set(names):
            probs["seg"] = torch.sigmoid(self.m_s(image)["seg"])
        if {"sdm", "mean"} & set(names):
            probs["sdm"] = prob_from_sdm(self.m_d(image)["sdm"], self.k)
        if "mean" in names:
            probs["mean"] = (probs["seg"] + probs["sdm"]) / 2
        return {name: probs[name] for name in names}

    def signed_maps(self, image: Tensor) -> dict[str, Tensor]:
        return {} if self.m_d is None else {"sdm": self.m_d(image)["sdm"]}
