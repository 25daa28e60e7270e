"""Losses: pure functions of tensors, all sums in float32.

`prob` and `logits` are (B, 1, W, H, D); `label` has the same shape, float in [0, 1], soft values welcome.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTH = 1e-5  # added to both sides of the Dice ratio, as in the public implementations


def foreground_logits(logits: Tensor) -> Tensor:
    """One-channel logits of the foreground: sigmoid(l1 - l0) is the softmax of two channels.

    Args: logits, (B, 1 or 2, W, H, D). Returns: (B, 1, W, H, D).
    """
    return logits[:, 1:] - logits[:, :1] if logits.shape[1] == 2 else logits


def dice_loss(prob: Tensor, label: Tensor) -> Tensor:
    """Soft Dice loss of the foreground, pooled over the batch, squares in the denominator (V-Net, Eq. 3)."""
    prob, label = _checked(prob, label)
    overlap = (prob * label).sum()
    total = prob.square().sum() + label.square().sum()
    return 1 - (2 * overlap + SMOOTH) / (total + SMOOTH)


def dice_ce_loss(logits: Tensor, label: Tensor) -> Tensor:
    """0.5 (cross entropy + Dice): the supervised loss that the compared methods share."""
    logits, label = _checked(foreground_logits(logits), label)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, label)
    return 0.5 * (cross_entropy + dice_loss(logits.sigmoid(), label))


def _checked(prediction: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} differ in shape")
    return prediction.float(), label.float()


EPSILON = 1e-6  # inside the logarithm of an entropy, as in UA-MT's public implementation
NO_VOXEL = 1e-16  # keeps the mean over no voxel at 0, as in UA-MT's public implementation


def foreground_prob(logits: Tensor) -> Tensor:
    """Foreground probability, float32 even under autocast.

    Args: logits, (B, 1 or 2, W, H, D). Returns: (B, 1, W, H, D).
    """
    return foreground_logits(logits).float().sigmoid()


def entropy(prob: Tensor) -> Tensor:
    """Entropy of each voxel's distribution over channels, in nats: 0 (to within 1e-6 C) where sure, ln C at most.

    Args: prob, (B, C, W, H, D), C > 1, summing to 1 over the channels. Returns: (B, 1, W, H, D) float32.
    """
    if prob.shape[1] == 1:
        raise ValueError("entropy needs all classes, not the foreground alone; see binary_entropy")
    prob = prob.float()
    return -(prob * (prob + EPSILON).log()).sum(dim=1, keepdim=True)


def binary_entropy(prob: Tensor) -> Tensor:
    """Entropy of a foreground probability, in nats, in [0, ln 2]; (B, 1, W, H, D) to the same shape, float32."""
    prob = prob.float()
    return -(prob * (prob + EPSILON).log() + (1 - prob) * (1 - prob + EPSILON).log())


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` over the voxels where `mask` (same shape, 0 or 1) is set; 0 if it is nowhere."""
    if values.shape != mask.shape:
        raise ValueError(f"values {tuple(values.shape)} and mask {tuple(mask.shape)} differ in shape")
    mask = mask.float()
    return (values.float() * mask).sum() / (mask.sum() + NO_VOXEL)


def attention_dice_loss(prob: Tensor, label: Tensor, beta: float) -> Tensor:
    """Generalised Dice loss of both classes, each case weighted by how badly it is segmented (ASDNet, Sect. 2.1).

    Per case (1 - dsc)^beta (1 - 2 sum_c w_c |P_c G_c| / sum_c w_c (|P_c| + |G_c|)), w_c = 1 / |G_c|^2; then the
    mean over cases. A reconstruction in two points: dsc, the mean soft Dice of the classes, is a weight without a
    gradient, and a class that a crop does not hold counts as one voxel, for its weight would be infinite.

    Args: prob and label, (B, 1, W, H, D), foreground; beta, 0 for no attention.
    """
    prob, label = _checked(prob, label)
    found = torch.cat((1 - prob, prob), dim=1).flatten(2)  # (B, 2, W * H * D)
    truth = torch.cat((1 - label, label), dim=1).flatten(2)
    overlap, total = (found * truth).sum(dim=2), (found + truth).sum(dim=2)  # (B, 2)
    weight = truth.sum(dim=2).clamp_min(1).square().reciprocal()
    dice = 2 * (weight * overlap).sum(dim=1) / (weight * total).sum(dim=1)  # (B,)
    attention = (1 - (2 * overlap + SMOOTH) / (total + SMOOTH)).mean(dim=1).detach() ** beta
    return (attention * (1 - dice)).mean()
