"""DTML+: DTML that also learns from pseudo-labels of strongly changed unlabeled crops. A variant of our own.

The moving averages of M_s and M_d see an unlabeled crop as it is; the mean of their masks, cut at one half, is its
pseudo-label. M_s and M_d see the crop with strongly changed intensities and learn the pseudo-label like a label. With
--paste, a box of each such crop, or all but a box, is that of a labeled crop, with its label.
The parts are known: pseudo-labels of a weak view for a strong one (FixMatch, Sohn et al., NeurIPS 2020), moving
averages as teachers (Mean Teacher, Tarvainen & Valpola, NeurIPS 2017), boxes of labeled crops in unlabeled ones and
the reverse (BCP, Bai et al., CVPR 2023). What each adds: docs/results/hippocampus/dtml_plus.md.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dataloaders.batch import Batch
from methods.base import Terms, require_unlabeled
from methods.dtml import DTML
from networks.ema import frozen_copy, update_ema, warm_decay
from options.methods import DTMLPlusFlags
from utils.losses import dice_ce_loss
from utils.sdm import prob_from_sdm

OFTEN, SOMETIMES = 0.8, 0.5  # probabilities of a change of a crop


class DTMLPlus(DTMLPlusFlags, DTML):
    """DTML's objectives, + --pseudo_weight x lambda(t) times the loss of the pseudo-labels for each network."""

    def __init__(self, options: Namespace):
        super().__init__(options)
        require_unlabeled(options, "--method dtml_plus", "give --method dtml")
        self.teacher_s, self.teacher_d = frozen_copy(self.m_s), frozen_copy(self.m_d)

    def load_pretrained(self, paths: Sequence[Path]) -> list[str]:
        """Two files are those of M_s and M_d, and of their averages."""
        return super().load_pretrained([*paths, *paths] if len(paths) == 2 else paths)

    def train(self, mode: bool = True) -> "DTMLPlus":
        """Teachers always predict as in a test: no dropout, batch norm by the statistics of the training."""
        super().train(mode)
        self.teacher_s.eval(), self.teacher_d.eval()
        return self

    def training_step(self, batch: Batch, iteration: int) -> Terms:
        k, weight = self.steepness(iteration), self.consistency_weight(iteration)
        labeled, unlabeled = slice(batch.num_labeled), slice(batch.num_labeled, None)
        crops = batch.image[unlabeled]
        target = self._pseudo_label(crops, k)  # (B - L, C, W, H, D)
        if self.options.paste:
            crops, target = paste(crops, target, batch.image[labeled], batch.label)
        image = torch.cat([batch.image[labeled], strong_view(crops, self.options.view_strength)])
        logits = self.m_s(image)["seg"]  # (B, C, W, H, D)
        sdm = self.m_d(image)["sdm"]  # (B, C, W, H, D), in [-1, 1]

        l_con = F.mse_loss(prob_from_sdm(sdm, k), logits.sigmoid())
        l_pseudo = dice_ce_loss(logits[unlabeled], target) + self.l_mask(sdm[unlabeled], target, k)
        self.monitor["disagreement"] = l_con.detach()
        return {
            "seg": dice_ce_loss(logits[labeled], batch.label),
            "mask": self.l_mask(sdm[labeled], batch.label, k),
            "consistency": self.options.con_scale * weight * l_con,
            "pseudo": self.options.pseudo_weight * weight * l_pseudo,
        }

    @torch.no_grad()
    def _pseudo_label(self, image: Tensor, k: float) -> Tensor:
        """Where the mean of the teachers' masks is above one half, (N, C, W, H, D) float32, 0 or 1."""
        seg = self.teacher_s(image)["seg"].sigmoid()
        mask = prob_from_sdm(self.teacher_d(image)["sdm"], k)
        return (seg + mask > 1).float()

    def after_step(self, iteration: int) -> None:
        decay = warm_decay(iteration, self.options.ema_decay)
        for teacher, student in ((self.teacher_s, self.m_s), (self.teacher_d, self.m_d)):
            update_ema(teacher, student, decay, buffers=True)


def paste(image: Tensor, target: Tensor, labeled: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Unlabeled crops of which a random box, or all but the box, is that of a labeled crop; their targets likewise.

    The box has two thirds of each edge, as in BCP. No two crops get the same labeled one while there are others.
    Args: image, (N, 1, W, H, D); target, (N, C, W, H, D); labeled and label, the same with L in place of N.
    """
    edges = [2 * length // 3 for length in image.shape[2:]]
    inside = torch.zeros_like(image, dtype=torch.bool)
    for crop in inside:
        starts = [int(torch.randint(n - edge + 1, ())) for n, edge in zip(crop.shape[1:], edges, strict=True)]
        crop[:, *(slice(start, start + edge) for start, edge in zip(starts, edges, strict=True))] = True
        if torch.rand(()) < 0.5:
            crop.logical_not_()
    which = torch.randperm(len(labeled))[torch.arange(len(image)) % len(labeled)]
    return torch.where(inside, labeled[which], image), torch.where(inside, label[which], target)


@torch.no_grad()
def strong_view(image: Tensor, strength: float) -> Tensor:
    """Crops with another bias field, gamma, contrast, brightness, sharpness and noise, each drawn for itself.

    Args: image, (N, 1, W, H, D); strength, 0 or more: 0 changes nothing, 1 is a factor in [0.67, 1.5] of contrast.
    """
    if strength == 0:
        return image
    crops = (2, 3, 4)
    mean, sd = image.mean(crops, keepdim=True), image.std(crops, keepdim=True).clamp_min(1e-6)
    view = (image - mean) / sd
    low, span = _range(view)
    knots = torch.randn(len(image), 1, 3, 3, 3, device=image.device)
    field = F.interpolate(0.3 * strength * knots, image.shape[2:], mode="trilinear", align_corners=True)
    view = _with_probability(OFTEN, (view - low) * field.exp() + low, view)
    low, span = _range(view)
    gamma = _uniform(view, -0.5, 0.5).mul(strength).exp()
    view = _with_probability(SOMETIMES, ((view - low) / span) ** gamma * span + low, view)
    view = view * _uniform(view, -0.4, 0.4).mul(strength).exp() + strength * _uniform(view, -0.4, 0.4)
    blurred = F.avg_pool3d(view, 3, stride=1, padding=1, count_include_pad=False)
    view = _with_probability(SOMETIMES, view.lerp(blurred, _uniform(view, 0, min(strength, 1))), view)
    noise = strength * _uniform(view, 0, 0.3) * torch.randn_like(view)
    return _with_probability(SOMETIMES, view + noise, view) * sd + mean


def _range(crops: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and span of every crop; a constant crop has a span of almost 0."""
    low, high = crops.amin((2, 3, 4), keepdim=True), crops.amax((2, 3, 4), keepdim=True)
    return low, (high - low).clamp_min(1e-6)


def _uniform(crops: Tensor, low: float, high: float) -> Tensor:
    """A number for each crop, (N, 1, 1, 1, 1)."""
    return torch.empty(len(crops), 1, 1, 1, 1, device=crops.device).uniform_(low, high)


def _with_probability(share: float, changed: Tensor, crops: Tensor) -> Tensor:
    return torch.where(_uniform(crops, 0, 1) < share, changed, crops)
