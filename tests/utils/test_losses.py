"""Losses against values worked by hand."""

import math

import pytest
import torch
from torch import Tensor

from utils.losses import (
    SMOOTH,
    attention_dice_loss,
    binary_entropy,
    dice_ce_loss,
    dice_loss,
    entropy,
    foreground_logits,
    foreground_prob,
    masked_mean,
)


def voxels(*rows: list[float]) -> Tensor:
    """(B, 1, 1, 1, n) from one row of n values per case."""
    return torch.tensor(rows, dtype=torch.float32)[:, None, None, None]


def logit(prob: Tensor) -> Tensor:
    return torch.logit(prob.double()).float()


ONES, ZEROS = voxels([1, 1, 1, 1]), voxels([0, 0, 0, 0])


@pytest.mark.parametrize(
    ("prob", "label", "expected"),
    [
        (voxels([1, 1, 0, 0]), voxels([1, 1, 0, 0]), 0.0),
        (voxels([1, 1, 0, 0]), voxels([0, 0, 1, 1]), 1.0),
        (voxels([1, 1, 1, 0]), voxels([1, 0, 0, 0]), 1 - 2 / 4),
        (voxels([0.5, 0.5, 0, 0]), voxels([1, 0, 0, 0]), 1 - 1 / 1.5),  # squares: 0.25 + 0.25 + 1
        (voxels([0.5, 0, 0, 0]), voxels([0.5, 0, 0, 0]), 0.0),  # a soft label is matched by itself
        (voxels([1, 0, 0, 0]), voxels([0.5, 0, 0, 0]), 1 - 1 / 1.25),
        (ONES, ONES, 0.0),
        (ONES, voxels([1, 0, 0, 0]), 1 - 2 / 5),
        (ZEROS, ZEROS, 0.0),  # both empty: epsilon over epsilon
        (ZEROS, ONES, 1.0),
        (ONES, ZEROS, 1.0),
        (voxels([1, 1], [0, 0]), voxels([1, 1], [0, 1]), 1 - 4 / 5),  # pooled: the mean over cases would be 0.5
    ],
)
def test_dice_loss(prob, label, expected):
    assert dice_loss(prob, label).item() == pytest.approx(expected, abs=2e-5)


def test_dice_loss_is_smoothed_by_the_public_implementations_constant():
    assert SMOOTH == 1e-5
    expected = 1 - 1e-5 / (1e-4 + 1e-5)  # prob 0.01 on an empty label
    assert dice_loss(voxels([0.01]), voxels([0.0])).item() == pytest.approx(expected, abs=1e-5)


def test_dice_loss_moves_the_probability_towards_the_label():
    prob, label = voxels([0.3, 0.3]).requires_grad_(), voxels([1, 0])
    dice_loss(prob, label).backward()
    inside, outside = prob.grad.flatten().tolist()
    assert inside < 0 < outside


@pytest.mark.parametrize("label", [voxels([1, 0, 0.25]), voxels([1, 1, 1]), voxels([0, 0, 0])])
def test_dice_ce_loss_is_half_of_each(label):
    prob = voxels([0.9, 0.2, 0.6])
    pairs = list(zip(prob.flatten().tolist(), label.flatten().tolist(), strict=True))
    cross_entropy = -sum(y * math.log(p) + (1 - y) * math.log(1 - p) for p, y in pairs) / 3
    dice = 1 - (2 * sum(p * y for p, y in pairs) + 1e-5) / (sum(p * p + y * y for p, y in pairs) + 1e-5)
    assert dice_ce_loss(logit(prob), label).item() == pytest.approx(0.5 * (cross_entropy + dice), rel=1e-5)


def test_dice_ce_loss_stays_finite_at_extreme_logits():
    loss = dice_ce_loss(voxels([500, -500]), voxels([0, 1]))
    assert loss.item() == pytest.approx(0.5 * (500 + 1))


def test_two_channels_are_one_channel_of_their_difference():
    logits = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    label = (logits[:, :1] > 0.3).float()
    one = logits[:, 1:] - logits[:, :1]
    torch.testing.assert_close(foreground_logits(logits), one)
    assert foreground_logits(one) is one
    torch.testing.assert_close(foreground_prob(logits), logits.softmax(dim=1)[:, 1:])
    torch.testing.assert_close(dice_ce_loss(logits, label), dice_ce_loss(one, label))
    cross_entropy = torch.nn.functional.cross_entropy(logits, label[:, 0].long())
    dice = dice_loss(logits.softmax(dim=1)[:, 1:], label)
    torch.testing.assert_close(dice_ce_loss(logits, label), 0.5 * (cross_entropy + dice))


def test_sums_are_float32_whatever_comes_in():
    prob = torch.full((1, 1, 128, 128, 64), 0.1, dtype=torch.bfloat16)  # a bfloat16 sum of a million values is useless
    label = torch.ones_like(prob)
    p = float(prob.flatten()[0])
    loss = dice_loss(prob, label)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1 - 2 * p / (p * p + 1), rel=1e-4)
    assert foreground_prob(voxels([1.0]).bfloat16()).dtype == torch.float32


# Two of four voxels are foreground; 0.8 and 0.6 inside, 0.2 and 0 outside.
CASE, TRUTH = [0.8, 0.6, 0.2, 0.0], [1, 1, 0, 0]
CASE_DICE = 1 - 0.2  # both classes have volume 2, hence the same weight: 2 (1.4 + 1.8) / (3.6 + 4.4)
CASE_DSC = (2 * 1.4 / 3.6 + 2 * 1.8 / 4.4) / 2


@pytest.mark.parametrize("beta", [0, 1, 2, 0.5])
def test_attention_dice_of_one_case(beta):
    expected = (1 - CASE_DSC) ** beta * (1 - CASE_DICE)
    assert attention_dice_loss(voxels(CASE), voxels(TRUTH), beta).item() == pytest.approx(expected, rel=1e-4)


def test_attention_dice_weighs_classes_by_their_squared_volume():
    prob, label = voxels([0.5, 0.1, 0.1, 0.1]), voxels([1, 0, 0, 0])
    overlap, total = 0.5 / 1 + 2.7 / 9, (0.8 + 1) / 1 + (3.2 + 3) / 9
    assert attention_dice_loss(prob, label, 0).item() == pytest.approx(1 - 2 * overlap / total, rel=1e-5)


def test_attention_dice_is_a_mean_over_cases_and_lets_the_worse_one_lead():
    good, bad = [0.9, 0.9, 0.1, 0.1], [0.4, 0.4, 0.6, 0.6]
    prob, label = voxels(good, bad).requires_grad_(), voxels(TRUTH, TRUTH)
    alone = [attention_dice_loss(voxels(case), voxels(TRUTH), 2).item() for case in (good, bad)]
    loss = attention_dice_loss(prob, label, 2)
    assert loss.item() == pytest.approx(sum(alone) / 2, rel=1e-5)
    loss.backward()
    assert prob.grad[1].abs().max() > 10 * prob.grad[0].abs().max() > 0


def test_the_attention_is_a_weight_without_a_gradient():
    gradients = []
    for beta in (0, 2):
        prob = voxels(CASE).requires_grad_()
        attention_dice_loss(prob, voxels(TRUTH), beta).backward()
        gradients.append(prob.grad)
    torch.testing.assert_close(gradients[1], (1 - CASE_DSC) ** 2 * gradients[0], rtol=1e-4, atol=1e-7)


def test_attention_dice_of_empty_and_full_crops():
    for label in (ZEROS, ONES):
        assert attention_dice_loss(label, label, 2).item() == pytest.approx(0, abs=1e-6)
        prob = torch.full_like(label, 0.5).requires_grad_()
        loss = attention_dice_loss(prob, label, 2)
        loss.backward()
        # Weights 1/16 and, for the class that is not there, 1: dice 2 (2/16) / (6/16 + 2), dsc (2/3 + 0) / 2.
        assert loss.item() == pytest.approx((1 - 1 / 3) ** 2 * (1 - 0.25 / 2.375), rel=1e-4)
        assert ((prob.grad > 0) == (label == 0)).all() and torch.isfinite(prob.grad).all()


def test_perfect_attention_with_a_fractional_exponent_is_not_nan():
    label = voxels([1, 1, 1, 0, 0, 0, 0])
    assert attention_dice_loss(label, label, 0.5).item() == 0


def test_entropies():
    assert binary_entropy(voxels([0.5, 0, 1])).flatten().tolist() == pytest.approx([math.log(2), 0, 0], abs=5e-6)
    four = torch.full((1, 4, 1, 1, 1), 0.25)
    assert entropy(four).item() == pytest.approx(math.log(4), abs=5e-6)
    prob = voxels([0.3, 0.9])
    torch.testing.assert_close(entropy(torch.cat((1 - prob, prob), dim=1)), binary_entropy(prob))
    with pytest.raises(ValueError, match="all classes"):
        entropy(prob)


def test_masked_mean():
    values = voxels([1, 2, 4, 8])
    assert masked_mean(values, voxels([0, 1, 1, 0]) > 0).item() == 3
    assert masked_mean(values, ZEROS).item() == 0
    assert masked_mean(values, ONES).item() == 3.75


@pytest.mark.parametrize(
    "loss", [dice_loss, dice_ce_loss, masked_mean, lambda prob, label: attention_dice_loss(prob, label, 2)]
)
@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 1, 1, 1, 4), (1, 1, 1, 1, 3), (1, 3, 1, 1, 4)])
def test_a_wrong_shape_raises_instead_of_broadcasting(loss, shape):
    with pytest.raises(ValueError, match="differ in shape"):
        loss(voxels([0.5, 0.5, 0.5, 0.5]), torch.zeros(shape))
