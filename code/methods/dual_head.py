"""What DTC and SASSNet share: one V-Net with a segmentation head and a signed-distance head, and their supervision."""

from argparse import Namespace
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

from dataloaders.batch import Batch
from methods.base import ConsistencyMethod, Terms
from options.methods import DualHeadFlags
from utils.constants import SDM_STEEPNESS
from utils.losses import dice_loss
from utils.sdm import prob_from_sdm


class DualHeadMethod(DualHeadFlags, ConsistencyMethod):
    """A V-Net with a segmentation and an SDM head, and the supervision of both; methods add the rest."""

    outputs = ("seg", "sdm")

    def __init__(self, options: Namespace):
        super().__init__(options)
        self.network = self.make_network("sdm", "seg", sdm_head=options.sdm_head)
        self.sdm_empty = options.sdm_empty

    def supervised_terms(self, heads: dict[str, Tensor], batch: Batch) -> Terms:
        """Dice of the segmentation and mean squared error of the map, on the labeled cases."""
        logits, sdm = (heads[name][: batch.num_labeled] for name in ("seg", "sdm"))  # (L, C, W, H, D)
        return {
            "seg": dice_loss(logits.sigmoid(), batch.label),
            "sdm": self.options.sdm_weight * F.mse_loss(sdm, batch.sdm),
        }

    def predict(self, image: Tensor, outputs: Iterable[str] | None = None) -> dict[str, Tensor]:
        heads = self.network(image, tuple(outputs or self.outputs))
        return {name: self.soft_mask(x) if name == "sdm" else x.sigmoid() for name, x in heads.items()}

    def soft_mask(self, sdm: Tensor) -> Tensor:
        """Foreground probability of a map."""
        return prob_from_sdm(sdm, SDM_STEEPNESS)

    def signed_maps(self, image: Tensor) -> dict[str, Tensor]:
        return self.network(image, ("sdm",))
