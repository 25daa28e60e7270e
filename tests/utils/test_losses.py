"""Losses against values worked by hand."""

import math

import pytest
import torch
from torch import Tensor

from utils.losses import (
    SMOOTH,
    attention_dice_loss,
    cross_entropy,
    dice_ce_loss,
    dice_loss,
    entropy,
    foreground_prob,
    masked_mean,
    squared_difference,
    with_background,
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
    assert torch.equal(foreground_prob(logits), one.sigmoid())
    torch.testing.assert_close(foreground_prob(logits), logits.softmax(dim=1)[:, 1:])
    assert torch.equal(dice_ce_loss(logits, label), dice_ce_loss(one, label))
    both = torch.nn.functional.cross_entropy(logits, label[:, 0].long())
    dice = dice_loss(logits.softmax(dim=1)[:, 1:], label)
    torch.testing.assert_close(dice_ce_loss(logits, label), 0.5 * (both + dice))


def test_sums_are_float32_whatever_comes_in():
    prob = torch.full((1, 1, 128, 128, 64), 0.1, dtype=torch.bfloat16)  # a bfloat16 sum of a million values is useless
    label = torch.ones_like(prob)
    p = float(prob.flatten()[0])
    loss = dice_loss(prob, label)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1 - 2 * p / (p * p + 1), rel=1e-4)
    assert foreground_prob(torch.zeros(1, 2, 1, 1, 1).bfloat16()).dtype == torch.float32
    assert foreground_prob(torch.zeros(1, 4, 1, 1, 1).bfloat16()).dtype == torch.float32


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
    both = with_background(voxels([0.5, 0, 1]))
    assert entropy(both).flatten().tolist() == pytest.approx([math.log(2), 0, 0], abs=5e-6)
    four = torch.full((1, 4, 1, 1, 1), 0.25)
    assert entropy(four).item() == pytest.approx(math.log(4), abs=5e-6)
    with pytest.raises(ValueError, match="all classes"):
        entropy(voxels([0.5, 0, 1]))


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


# --- several classes


def channels(*rows: list[float]) -> Tensor:
    """(1, C, 1, 1, n) from one row of n values per class."""
    return torch.tensor(rows, dtype=torch.float32)[None, :, None, None]


LABEL = channels([1, 1, 0, 0], [0, 0, 1, 0])
PROB = channels([0.8, 0.4, 0.1, 0.0], [0.1, 0.2, 0.6, 0.5])


def test_dice_of_two_classes_is_their_mean():
    first, second = 1 - 2 * 1.2 / (0.64 + 0.16 + 0.01 + 2), 1 - 2 * 0.6 / (0.01 + 0.04 + 0.36 + 0.25 + 1)
    assert dice_loss(PROB, LABEL).item() == pytest.approx((first + second) / 2, abs=1e-5)
    assert dice_loss(PROB[:, :1], LABEL[:, :1]).item() == pytest.approx(first, abs=1e-5)


def test_dice_of_a_class_is_pooled_over_the_batch():
    prob, label = torch.cat((PROB, PROB)), torch.cat((LABEL, 0 * LABEL))  # the second crop lacks both classes
    squares = 2 * (0.64 + 0.16 + 0.01), 2 * (0.01 + 0.04 + 0.36 + 0.25)
    expected = ((1 - 2.4 / (squares[0] + 2)) + (1 - 1.2 / (squares[1] + 1))) / 2
    assert dice_loss(prob, label).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("prob", [0.0, 1e-4, 0.3])
def test_a_class_that_no_crop_holds_counts_as_0_and_teaches_nothing(prob):
    """Whatever is predicted for it: neither a penalty nor, where it has all but vanished, a reward."""
    predicted = torch.cat((PROB[:, :1], torch.full_like(PROB[:, :1], prob)), dim=1).requires_grad_()
    label = torch.cat((LABEL[:, :1], 0 * LABEL[:, :1]), dim=1)
    loss = dice_loss(predicted, label)
    loss.backward()
    assert loss.item() == pytest.approx(dice_loss(PROB[:, :1], LABEL[:, :1]).item() / 2)
    assert predicted.grad[:, 0].abs().max() > 0 and predicted.grad[:, 1].abs().max() == 0


def test_in_a_batch_without_foreground_every_class_counts():
    prob = channels([0.01, 0.0], [0.0, 0.0])
    of_first = 1 - 1e-5 / (1e-4 + 1e-5)
    assert dice_loss(prob, 0 * prob).item() == pytest.approx(of_first / 2, abs=1e-5)
    assert dice_loss(prob[:, :1], 0 * prob[:, :1]).item() == pytest.approx(of_first, abs=1e-5)


SOFT_LABELS = [LABEL, channels([0.25, 1, 0, 0], [0.5, 0, 0.5, 0.0])]


@pytest.mark.parametrize("label", SOFT_LABELS)
def test_dice_ce_of_a_softmax_over_three_classes(label):
    logits = torch.randn(1, 3, 1, 1, 4, generator=torch.Generator().manual_seed(0))
    rows = logits[0, :, 0, 0].double().T.tolist()  # one voxel after another: background, first, second
    truth = label[0, :, 0, 0].double().T.tolist()
    probs = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in rows]
    targets = [[1 - sum(row), *row] for row in truth]
    ce = -sum(t * math.log(p) for ps, ts in zip(probs, targets, strict=True) for p, t in zip(ps, ts, strict=True)) / 4
    dice = []
    for number in (1, 2):
        p, y = [row[number] for row in probs], [row[number] for row in targets]
        overlap, squares = sum(map(lambda a, b: a * b, p, y)), sum(a * a for a in [*p, *y])
        dice.append(1 - (2 * overlap + 1e-5) / (squares + 1e-5))
    assert dice_ce_loss(logits, label).item() == pytest.approx(0.5 * (ce + sum(dice) / 2), rel=1e-5)
    assert cross_entropy(logits, label).item() == pytest.approx(ce, rel=1e-5)
    of_voxels = cross_entropy(logits, label, reduction="none")
    assert of_voxels.shape == (1, 1, 1, 1, 4) and of_voxels.mean().item() == pytest.approx(ce, rel=1e-5)


def test_dice_ce_of_sigmoids_is_the_mean_over_classes():
    logits = torch.randn(2, 2, 1, 1, 4, generator=torch.Generator().manual_seed(0))
    label = torch.cat((LABEL, LABEL.flip(-1)))
    each = [dice_ce_loss(logits[:, c : c + 1], label[:, c : c + 1]) for c in (0, 1)]
    torch.testing.assert_close(dice_ce_loss(logits, label), sum(each) / 2)
    assert cross_entropy(logits, label, reduction="none").shape == label.shape


def test_a_softmax_of_equal_logits():
    torch.testing.assert_close(foreground_prob(torch.zeros(1, 4, 1, 1, 2)), torch.full((1, 3, 1, 1, 2), 0.25))
    background = with_background(PROB)
    assert background.shape == (1, 3, 1, 1, 4)
    assert background[0, 0].flatten().tolist() == pytest.approx([0.1, 0.4, 0.3, 0.5])


def test_squared_difference_is_the_mean_over_all_classes():
    target = channels([0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0.5])
    expected = (with_background(PROB) - with_background(target)).square().mean(dim=1, keepdim=True)
    torch.testing.assert_close(squared_difference(PROB, target), expected)
    one = squared_difference(PROB[:, :1], target[:, :1])
    assert torch.equal(one, (PROB[:, :1] - target[:, :1]).square())


def test_attention_dice_of_two_classes():
    prob, label = PROB.double(), LABEL.double()
    found, truth = with_background(prob)[0, :, 0, 0], with_background(label)[0, :, 0, 0]
    weights = [1 / max(float(t.sum()), 1) ** 2 for t in truth]
    overlaps = [float((p * t).sum()) for p, t in zip(found, truth, strict=True)]
    totals = [float((p + t).sum()) for p, t in zip(found, truth, strict=True)]
    dice = 2 * sum(w * o for w, o in zip(weights, overlaps, strict=True))
    dice /= sum(w * t for w, t in zip(weights, totals, strict=True))
    dsc = sum(2 * o / t for o, t in zip(overlaps, totals, strict=True)) / 3
    assert attention_dice_loss(PROB, LABEL, 2).item() == pytest.approx((1 - dsc) ** 2 * (1 - dice), rel=1e-4)


def test_attention_dice_leaves_out_a_class_that_a_crop_lacks():
    """Its weight would be that of a single voxel, and drown the others."""
    lacking = torch.cat((LABEL[:, :1], 0 * LABEL[:, :1]), dim=1)
    predicted = torch.cat((PROB[:, :1], torch.full_like(PROB[:, :1], 0.01)), dim=1).requires_grad_()
    loss = attention_dice_loss(predicted, lacking, 0)
    loss.backward()
    found = torch.stack((1 - PROB[0, 0] - 0.01, PROB[0, 0]))[:, 0, 0]
    truth = torch.stack((1 - LABEL[0, 0], LABEL[0, 0]))[:, 0, 0]  # both of volume 2, hence of equal weight
    dice = 2 * (found * truth).sum() / (found + truth).sum()
    assert loss.item() == pytest.approx(1 - dice.item(), rel=1e-5)
