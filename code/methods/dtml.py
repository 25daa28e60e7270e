"""DTML: dual-task mutual learning (Zhang & Zhang, PRCV 2021).

M_s predicts a probability map, M_d a signed distance map (SDM) whose soft mask is sigmoid(-k z). Both learn from
the labeled cases, by L_seg and L_mask, and from each other on all cases, by the consistency L_con of the two masks.
`dtml_variants.py` holds what only the paper's Tables 1 and 2 need: L_dis, and each network by itself.
"""

from argparse import Namespace
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

from dataloaders.batch import Batch
from methods.base import ConsistencyMethod, Terms
from options.methods import DTMLFlags
from utils.losses import dice_ce_loss, dice_loss
from utils.schedules import geometric
from utils.sdm import prob_from_sdm


class DTML(DTMLFlags, ConsistencyMethod):
    """M_s minimises L_seg + lambda L_con (Eq. 5), M_d minimises L_mask + lambda L_con (Eq. 6)."""

    outputs = ("seg", "sdm", "mean")

    def __init__(self, options: Namespace):
        super().__init__(options)
        self.m_s = self.make_network("seg")
        self.m_d = self.make_network("sdm", sdm_head=options.sdm_head)

    def training_step(self, batch: Batch, iteration: int) -> Terms:
        """The losses of Sect. 2.2 in one joint step: each network gets the gradient of its own objective."""
        k, weight = self.steepness(iteration), self.options.con_scale * self.consistency_weight(iteration)
        labeled = slice(batch.num_labeled)  # the first L of B cases; batch.label and batch.sdm are (L, C, W, H, D)
        logits = self.m_s(batch.image)["seg"]  # (B, C, W, H, D)
        sdm = self.m_d(batch.image)["sdm"]  # (B, C, W, H, D), in [-1, 1]

        l_seg = dice_ce_loss(logits[labeled], batch.label)  # M_s
        l_mask = self.l_mask(sdm[labeled], batch.label, k)  # M_d
        l_dis = self.l_dis(sdm[labeled], batch.sdm)  # M_d; None but for Table 1
        l_con = F.mse_loss(prob_from_sdm(sdm, k), logits.sigmoid())  # both, on all cases (Eq. 4), mean over classes

        self.monitor["disagreement"] = l_con.detach()
        return existing({"seg": l_seg, "mask": l_mask, "dis": l_dis, "consistency": weight * l_con})

    def l_mask(self, sdm: Tensor, label: Tensor, k: float) -> Tensor | None:
        """Segmentation loss of the soft mask of a map; both (L, C, W, H, D)."""
        if self.options.mask_loss == "dice":
            return dice_loss(prob_from_sdm(sdm, k), label)
        return dice_ce_loss(-k * sdm, label)

    def l_dis(self, sdm: Tensor, target: Tensor | None) -> Tensor | None:
        """Distance of a map from that of the label (`dtml_variants.py`)."""
        return None

    def steepness(self, iteration: int) -> float:
        """k of the transform (Eq. 2) after a number of finished iterations; constant unless --sdm_k_start is given."""
        k = self.options.sdm_k
        length = self.options.max_iterations
        return geometric(self.options.sdm_k_start or k, k, iteration / length if length else 1)

    def predict(self, image: Tensor, outputs: Iterable[str] | None = None) -> dict[str, Tensor]:
        names, probs = tuple(outputs or self.outputs), {}
        if {"seg", "mean"} & set(names):
            probs["seg"] = self.m_s(image)["seg"].sigmoid()
        if {"sdm", "mean"} & set(names):
            probs["sdm"] = prob_from_sdm(self.m_d(image)["sdm"], self.steepness(self.trained_iterations))
        if "mean" in names:
            probs["mean"] = (probs["seg"] + probs["sdm"]) / 2
        return {name: probs[name] for name in names}

    def signed_maps(self, image: Tensor) -> dict[str, Tensor]:
        return self.m_d(image, ("sdm",))

    def courses(self) -> list[str]:
        first, last = self.steepness(0), self.steepness(self.options.max_iterations)
        return super().courses() + ([f"k from {first:g} to {last:g}"] if first != last else [])


def existing(terms: dict[str, Tensor | None]) -> Terms:
    """Those of the terms that are part of the objective."""
    return {name: term for name, term in terms.items() if term is not None}
