"""TCSE: transformation-consistent self-ensembling (Li et al., TNNLS 2020; arXiv 1903.00348).

A student learns from Dice + cross entropy on labeled cases, and to commute with transformations on all cases: the
teacher, its moving average, sees a turned, flipped, zoomed and noisy image; its answer, brought back, is the target.

The paper works on 2-D skin images, fundus photographs and CT slices; its setting for the left atrium was never
published. Reconstructed here, after the left-atrium family: noise, moving average, weight, and an in-plane zoom.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dataloaders.batch import Batch
from methods.base import Terms
from methods.mean_teacher import MeanTeacherMethod
from options.methods import TCSEFlags
from utils.constants import PLANE
from utils.losses import dice_ce_loss, foreground_prob, masked_mean, squared_difference

SLACK = 1e-5  # of half the field of view: rounding at its border


class TCSE(TCSEFlags, MeanTeacherMethod):
    """Dice + CE on labeled cases, + lambda(t) squared disagreement under transformations."""

    def training_step(self, batch: Batch, iteration: int) -> Terms:
        logits = self.student(batch.image)["softmax"]  # (B, C + 1, W, H, D)
        seen = self.teacher.sees(batch)
        prob = foreground_prob(logits[seen])  # (N, C, W, H, D)
        target, valid = self._target(batch.image[seen])  # (N, C, W, H, D), (N, 1, W, H, D)
        disagreement = masked_mean(squared_difference(prob, target), valid)
        return {
            "supervised": dice_ce_loss(logits[: batch.num_labeled], batch.label),
            "consistency": self.consistency_weight(iteration) * disagreement,
        }

    @torch.no_grad()
    def _target(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's probability of the transformed image, brought back, and where it is known; a pi per crop."""
        pis = [draw_transformation(image.shape, self.options.pi, self.options.pi_zoom) for _ in image]
        transformed = torch.stack([pi.apply(crop) for pi, crop in zip(pis, image, strict=True)])
        prob = foreground_prob(self.teacher.network(self.teacher.perturb(transformed))["softmax"])
        targets, valid = zip(*(pi.undo(crop) for pi, crop in zip(pis, prob, strict=True)), strict=True)
        return torch.stack(targets), torch.stack(valid)


@dataclass(frozen=True)
class Transformation:
    """pi of the paper: an in-plane zoom about the centre (> 1 enlarges), then quarter turns, then flips."""

    zoom: float = 1.0
    turns: int = 0
    flips: tuple[int, ...] = ()

    def apply(self, volume: Tensor) -> Tensor:
        """(C, W, H, D) to the same shape; what comes in from outside repeats the border."""
        return torch.rot90(_zoom(volume, self.zoom)[0], self.turns, PLANE).flip(self.flips)

    def undo(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        """Bring a transformed volume back; turns and flips exactly, zooms by trilinear interpolation.

        Returns: (C, W, H, D), and (1, W, H, D) True where it is known: an enlargement has lost the margin.
        """
        return _zoom(torch.rot90(volume.flip(self.flips), -self.turns, PLANE), 1 / self.zoom)


def draw_transformation(shape: torch.Size, kinds: Collection[str], zoom: float) -> Transformation:
    """A random pi for a volume (..., W, H, D): any turn, each flip or not, a factor in [1 - zoom, 1 + zoom].

    A plane that is not square is only turned by 180 degrees. What `kinds` leaves out is the identity.
    """
    step = 1 if shape[-3] == shape[-2] else 2
    turns = step * int(torch.randint(4 // step, ()))
    flips = tuple(axis for axis, heads in zip(PLANE, torch.rand(2) < 0.5, strict=True) if heads)
    factor = 1 + zoom * (2 * float(torch.rand(())) - 1)
    drawn = {"zoom": factor, "turns": turns, "flips": flips}
    return Transformation(**{name: value for name, value in drawn.items() if name in kinds})


def _zoom(volume: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Zoom (C, W, H, D) in the plane; also (1, W, H, D), True where the result comes from inside the volume."""
    if factor == 1:
        return volume, torch.ones_like(volume[:1], dtype=torch.bool)
    theta = torch.eye(3, 4, device=volume.device)  # rows D, H, W; no shift
    theta[1:] *= 1 / factor
    with torch.autocast(volume.device.type, enabled=False):  # in half precision the grid is off by tenths of a voxel
        grid = F.affine_grid(theta[None], [1, *volume.shape], align_corners=True)  # (1, W, H, D, 3), [-1, 1] if inside
    inside = (grid[..., 1:].abs() <= 1 + SLACK).all(dim=-1)
    return F.grid_sample(volume.float()[None], grid, padding_mode="border", align_corners=True)[0], inside
