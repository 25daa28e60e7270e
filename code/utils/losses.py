"""Losses: pure functions of tensors, all sums in float32.

`C` is the number of foreground classes. `prob` and `label` are (B, C, W, H, D), the label float in [0, 1], soft values
welcome. `logits` are (B, C + 1, W, H, D) of a softmax, background first, or (B, C, W, H, D) of a sigmoid each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTH = 1e-5  # added to both sides of the Dice ratio, as in the public implementations
OF_A_CLASS = (0, 2, 3, 4)  # axes of (B, C, W, H, D)


def foreground_prob(logits: Tensor) -> Tensor:
    """Foreground probabilities of a softmax, float32 even under autocast.

    Args: logits, (B, C + 1, W, H, D). Returns: (B, C, W, H, D).
    """
    if logits.shape[1] == 2:
        return _difference(logits).float().sigmoid()
    return logits.float().softmax(dim=1)[:, 1:]


def _difference(logits: Tensor) -> Tensor:
    """One logit for two: sigmoid(l1 - l0) is the softmax of one class and the background."""
    return logits[:, 1:] - logits[:, :1]


def with_background(prob: Tensor) -> Tensor:
    """Probabilities, or a label, of the background and the classes: (B, C, W, H, D) to (B, C + 1, W, H, D)."""
    return torch.cat((1 - prob.sum(dim=1, keepdim=True), prob), dim=1)


def dice_loss(prob: Tensor, label: Tensor) -> Tensor:
    """Soft Dice loss, squares in the denominator (V-Net, Eq. 3): of each class pooled over the batch, then their mean.

    A class that no crop of the batch holds counts as 0 and has no gradient; the others keep their weight. nnU-Net and
    SSL4MIS count 1 - SMOOTH / (sum p^2 + SMOOTH) for it: 1 without a gradient worth the name, until the class has all
    but vanished, and then a strong pull on its last traces. Here the cross entropy alone teaches that it is absent. In
    a batch without any foreground all classes count, as the one class does in the public implementations.
    """
    prob, label = _checked(prob, label)
    overlap, size = (prob * label).sum(OF_A_CLASS), label.square().sum(OF_A_CLASS)  # (C,)
    total = prob.square().sum(OF_A_CLASS) + size
    return (_counted(size) * (1 - (2 * overlap + SMOOTH) / (total + SMOOTH))).mean()


def _counted(size: Tensor) -> Tensor:
    """Which classes a Dice loss is of, (..., C) boolean, from their sizes: those that are there, or else all."""
    there = size > 0
    return there | ~there.any(dim=-1, keepdim=True)


def cross_entropy(logits: Tensor, label: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy: "mean", or "none" for that of each voxel, (B, 1, ...) of a softmax, (B, C, ...) of sigmoids."""
    logits, label = _one_logit(logits, label).float(), label.float()
    if logits.shape[1] == label.shape[1]:
        return F.binary_cross_entropy_with_logits(logits, label, reduction=reduction)
    loss = F.cross_entropy(logits, with_background(label), reduction=reduction)
    return loss[:, None] if reduction == "none" else loss


def _one_logit(logits: Tensor, label: Tensor) -> Tensor:
    """Logits of a softmax over one class as those of a sigmoid; all others as they are."""
    return _difference(logits) if (logits.shape[1], label.shape[1]) == (2, 1) else logits


def dice_ce_loss(logits: Tensor, label: Tensor) -> Tensor:
    """0.5 (cross entropy + Dice): the supervised loss that the compared methods share.

    The cross entropy is that of all C + 1 classes, of a softmax, or the mean over the classes, of sigmoids.
    """
    logits = _one_logit(logits, label).float()
    prob = logits.sigmoid() if logits.shape[1] == label.shape[1] else foreground_prob(logits)
    prob, label = _checked(prob, label)
    return 0.5 * (cross_entropy(logits, label) + dice_loss(prob, label))


def _checked(prediction: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} differ in shape")
    return prediction.float(), label.float()


EPSILON = 1e-6  # inside the logarithm of an entropy, as in UA-MT's public implementation
NO_VOXEL = 1e-16  # keeps the mean over no voxel at 0, as in UA-MT's public implementation


def entropy(prob: Tensor) -> Tensor:
    """Entropy of each voxel's distribution over channels, in nats: 0 (to within 1e-6 C) where sure, ln C at most.

    Args: prob, (B, C, W, H, D), C > 1, summing to 1 over the channels: see `with_background`.
    Returns: (B, 1, W, H, D) float32.
    """
    if prob.shape[1] == 1:
        raise ValueError("entropy needs all classes, not the foreground alone; see with_background")
    prob = prob.float()
    return -(prob * (prob + EPSILON).log()).sum(dim=1, keepdim=True)


def squared_difference(prob: Tensor, target: Tensor) -> Tensor:
    """Squared difference of two softmaxes, the mean over their C + 1 classes.

    Args: prob and target, (B, C, W, H, D), of the foreground; the background differs by the sum of their differences.
    Returns: (B, 1, W, H, D).
    """
    difference = prob - target
    of_background = difference.sum(dim=1, keepdim=True).square()
    return (difference.square().sum(dim=1, keepdim=True) + of_background) / (prob.shape[1] + 1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` over the voxels where `mask` (same shape, 0 or 1) is set; 0 if it is nowhere."""
    if values.shape != mask.shape:
        raise ValueError(f"values {tuple(values.shape)} and mask {tuple(mask.shape)} differ in shape")
    mask = mask.float()
    return (values.float() * mask).sum() / (mask.sum() + NO_VOXEL)


def attention_dice_loss(prob: Tensor, label: Tensor, beta: float) -> Tensor:
    """Generalised Dice loss of all classes, each case weighted by how badly it is segmented (ASDNet, Sect. 2.1).

    Per case (1 - dsc)^beta (1 - 2 sum_c w_c |P_c G_c| / sum_c w_c (|P_c| + |G_c|)), w_c = 1 / |G_c|^2; then the
    mean over cases. A reconstruction in two points: dsc, the mean soft Dice of the classes, is a weight without a
    gradient, and a class that a crop does not hold, whose weight would be infinite, is left out beside others; the
    background, or the foreground of a crop without any, counts as one voxel then.

    Args: prob and label, (B, C, W, H, D), foreground; beta, 0 for no attention.
    """
    prob, label = _checked(prob, label)
    found, truth = with_background(prob).flatten(2), with_background(label).flatten(2)  # (B, C + 1, W * H * D)
    overlap, total, size = (found * truth).sum(dim=2), (found + truth).sum(dim=2), truth.sum(dim=2)  # (B, C + 1)
    counted = F.pad(_counted(size[:, 1:]), (1, 0), value=True)
    weight = counted * size.clamp_min(1).square().reciprocal()
    dice = 2 * (weight * overlap).sum(dim=1) / (weight * total).sum(dim=1)  # (B,)
    missed = counted * (1 - (2 * overlap + SMOOTH) / (total + SMOOTH))
    attention = (missed.sum(dim=1) / counted.sum(dim=1)).detach() ** beta
    return (attention * (1 - dice)).mean()
