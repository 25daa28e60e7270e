"""UA-MT's mask, consistency and passes against the public implementation's formulas, written out."""

import math

import pytest
import torch
from torch import nn

from methods.ua_mt import uncertainty_threshold

ITERATION = 150  # of 200
SIZE = 16  # of the cubes: the smallest that the V-Net takes


class Replay(nn.Module):
    """A network that returns given logits, call after call."""

    def __init__(self, *logits: torch.Tensor):
        super().__init__()
        self.logits, self.sizes = list(logits), []

    def forward(self, image):
        self.sizes.append(len(image))
        return {"softmax": self.logits.pop(0)}


def logits_like(count: int, scale: float = 1.0, classes: int = 1) -> torch.Tensor:
    return scale * torch.randn(count, classes + 1, SIZE, SIZE, SIZE)


@pytest.mark.parametrize(("iteration", "threshold"), [(0, 0.521), (3000, 0.570), (6000, math.log(2))])
def test_threshold_rises_from_0521_to_ln_2(iteration, threshold):
    assert uncertainty_threshold(iteration, 6000) == pytest.approx(threshold, abs=5e-4)
    of_three = threshold * math.log(4) / math.log(2)  # the largest entropy of three classes and the background
    assert uncertainty_threshold(iteration, 6000, num_classes=3) == pytest.approx(of_three, abs=1e-3)


@pytest.mark.parametrize(
    ("norm", "classes", "divisor"), [("code", 1, 2), ("paper", 1, 1), ("code", 2, 3), ("paper", 2, 1)]
)
def test_consistency_is_the_formula_of_the_public_implementation(build, make_batch, norm, classes, divisor):
    flags = "--uamt_norm", norm, "--num_classes", str(classes)
    method, batch = build("ua_mt", *flags), make_batch(size=SIZE, classes=classes)
    student, single = logits_like(4, classes=classes), logits_like(2, classes=classes)
    # Alike in all passes, else hardly any voxel would be certain.
    base = logits_like(2, 3.0, classes).repeat(2, 1, 1, 1, 1)
    passes = [base + logits_like(4, 0.3, classes) for _ in range(4)]
    method.student, method.teacher.network = Replay(student), Replay(single, *passes)
    term = method.training_step(batch, ITERATION)["consistency"]
    assert method.teacher.network.sizes == [2, 4, 4, 4, 4]

    mean = torch.cat(passes).double().softmax(1).reshape(8, 2, -1, SIZE, SIZE, SIZE).mean(0)
    uncertainty = -(mean * (mean + 1e-6).log()).sum(1, keepdim=True)
    certain = (uncertainty < uncertainty_threshold(ITERATION, 200) * math.log(classes + 1) / math.log(2)).double()
    assert 0.2 < certain.mean() < 0.98
    difference = (student[2:].double().softmax(1) - single.double().softmax(1)) ** 2
    expected = (certain * difference).sum() / (divisor * certain.sum() + 1e-16)
    torch.testing.assert_close(term.double(), method.consistency_weight(ITERATION) * expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("foreground", "share"), [(9.0, 1.0), (0.0, 0.0)])
def test_a_confident_teacher_is_trusted_everywhere_and_an_undecided_one_nowhere(build, make_batch, foreground, share):
    method, batch = build("ua_mt"), make_batch(size=SIZE)
    logits = torch.stack([torch.zeros(4, SIZE, SIZE, SIZE), torch.full((4, SIZE, SIZE, SIZE), foreground)], 1)
    method.teacher.network = Replay(logits[:2], *[logits] * 4)
    term = method.training_step(batch, 0)["consistency"]
    assert method.monitor["certain"] == share
    assert (term > 0) == bool(share) and torch.isfinite(term)


@pytest.mark.parametrize("name", ["ua_mt", "double_uncertainty"])
@pytest.mark.parametrize(("noise", "dropout", "alike"), [("0", "0.5", False), ("0.1", "0", False), ("0", "0", True)])
def test_passes_differ_by_dropout_and_by_noise(build, make_batch, name, noise, dropout, alike):
    method, image = build(name, "--noise_sd", noise, "--dropout", dropout), make_batch(size=SIZE).image
    first, second = method._noisy_pass(image), method._noisy_pass(image)
    assert all(torch.equal(first[key], second[key]) == alike for key in first)


@pytest.mark.parametrize(("choice", "compared"), [("unlabeled", 2), ("all", 4)])
def test_gradient_of_the_consistency_reaches_the_student_at_the_chosen_cases(build, make_batch, choice, compared):
    method, batch = build("ua_mt", "--cons_on", choice), make_batch(size=SIZE)
    logits = logits_like(4).requires_grad_()
    method.student = Replay(logits)
    method.training_step(batch, 200)["consistency"].backward()
    moved = (logits.grad.flatten(1).abs().sum(1) > 0).tolist()
    assert moved == [False] * (4 - compared) + [True] * compared
