"""What DTC and SASSNet share: one V-Net with a segmentation head and a signed-distance head, and their supervision."""

from argparse import Namespace
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

from dataloaders.batch import Batch
from methods.arguments import add_sdm_empty_argument, add_sdm_head_argument
from methods.base import ConsistencyMethod, Terms
from options.types import at_least
from utils.losses import dice_loss
from utils.sdm import SDM_STEEPNESS, prob_from_sdm


class DualHeadMethod(ConsistencyMethod):
    """A V-Net with a segmentation and an SDM head, and the supervision of both; methods add the rest."""

    outputs = ("seg", "sdm")

    def __init__(self, options: Namespace):
        super().__init__(options)
        self.network = self.make_network("sdm", "seg", sdm_head=options.sdm_head)
        self.sdm_empty = options.sdm_empty

    def supervised_terms(self, heads: dict[str, Tensor], batch: Batch) -> Terms:
        """Dice of the segmentation and mean squared error of the map, on the labeled cases."""
        logits, sdm = (heads[name][: batch.num_labeled] for name in ("seg", "sdm"))  # (L, 1, W, H, D)
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

    @staticmethod
    def add_arguments(group) -> None:
        group.add_argument(
            "--sdm_weight",
            type=at_least(0.0),
            default=0.3,
            help="weight of the SDM regression (--beta of the public implementations)",
        )
        add_sdm_empty_argument(group)
        add_sdm_head_argument(group)
