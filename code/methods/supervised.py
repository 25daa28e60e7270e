"""V-Net on labeled cases only: the baseline of every table, and the shortest example to start from."""

from argparse import Namespace
from collections.abc import Iterable

from torch import Tensor

from dataloaders.batch import Batch
from methods.base import Method, Terms
from options.methods import SupervisedFlags
from utils.losses import dice_ce_loss, foreground_prob


class Supervised(SupervisedFlags, Method):
    """0.5 (cross entropy + Dice) on labeled crops; the whole batch is labeled. Softmax with background, as in UA-MT."""

    exclusive = True

    def __init__(self, options: Namespace):
        super().__init__(options)
        self.network = self.make_network("softmax")

    def training_step(self, batch: Batch, iteration: int) -> Terms:
        logits = self.network(batch.image)["softmax"]  # (B, C + 1, W, H, D)
        return {"supervised": dice_ce_loss(logits[: batch.num_labeled], batch.label)}

    def predict(self, image: Tensor, outputs: Iterable[str] | None = None) -> dict[str, Tensor]:
        return {"seg": foreground_prob(self.network(image)["softmax"])}
