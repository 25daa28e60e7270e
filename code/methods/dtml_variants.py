"""The rows of DTML's Tables 1 and 2: M_d supervised by L_dis, and each network by itself."""

from argparse import Namespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dataloaders.batch import Batch
from methods.base import Terms
from methods.dtml import DTML, existing
from networks import Network
from options.methods import DTMLVariantsFlags
from utils.losses import dice_ce_loss


class DTMLVariants(DTMLVariantsFlags, DTML):
    """DTML as `--method dtml` runs it: the algorithm of `dtml.py`, unless a flag asks for a row of a table."""

    def __init__(self, options: Namespace):
        super().__init__(options)
        if options.branch != "both":
            self.outputs = (options.branch,)
        if options.branch != "seg" and options.sdm_supervision != "mask":
            self.sdm_empty = options.sdm_empty

    def make_network(self, *heads: str, **settings: Any) -> Network | None:
        """Only the network of --branch exists."""
        return super().make_network(*heads, **settings) if self.options.branch in ("both", *heads) else None

    def training_step(self, batch: Batch, iteration: int) -> Terms:
        """Table 2: a network by itself has no peer to agree with."""
        if self.options.branch == "both":
            return super().training_step(batch, iteration)
        labeled = slice(batch.num_labeled)
        if self.options.branch == "seg":
            logits = self.m_s(batch.image)["seg"]  # (B, C, W, H, D)
            return {"seg": dice_ce_loss(logits[labeled], batch.label)}
        sdm = self.m_d(batch.image)["sdm"][labeled]  # (L, C, W, H, D)
        l_mask = self.l_mask(sdm, batch.label, self.steepness(iteration))
        return existing({"mask": l_mask, "dis": self.l_dis(sdm, batch.sdm)})

    def l_mask(self, sdm: Tensor, label: Tensor, k: float) -> Tensor | None:
        return None if self.options.sdm_supervision == "sdm" else super().l_mask(sdm, label, k)

    def l_dis(self, sdm: Tensor, target: Tensor | None) -> Tensor | None:
        """Table 1: mean squared difference of the maps, (L, C, W, H, D) each."""
        return None if self.options.sdm_supervision == "mask" else F.mse_loss(sdm, target)

    def signed_maps(self, image: Tensor) -> dict[str, Tensor]:
        return {} if self.m_d is None else super().signed_maps(image)

    def courses(self) -> list[str]:
        return super().courses() if self.options.branch == "both" else []
