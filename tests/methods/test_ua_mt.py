"""UA-MT's mask, consistency and passes against the public code's formulas, written out."""

import math

import pytest
import torch
from torch import nn

from methods.ua_mt import UAMT, uncertainty_threshold
from utils.losses import binary_entropy, masked_mean

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


@pytest.fixture
def build(tiny_options):
    def make(*flags: str) -> UAMT:
        torch.manual_seed(0)
        return UAMT(tiny_options("ua_mt", *flags))

    return make


def logits_like(count: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(count, 2, SIZE, SIZE, SIZE)


def test_threshold_rises_from_0521_to_ln_2():
    assert uncertainty_threshold(0, 6000) == pytest.approx(0.521, abs=5e-4)
    assert uncertainty_threshold(3000, 6000) == pytest.approx(0.570, abs=5e-4)
    assert uncertainty_threshold(6000, 6000) == pytest.approx(math.log(2), abs=1e-12)


def test_entropy_of_a_foreground_probability():
    prob = torch.tensor([0.0, 0.5, 1.0, 0.25]).view(1, 1, 1, 1, 4)
    expected = torch.tensor([0.0, math.log(2), 0.0, 0.25 * math.log(4) + 0.75 * math.log(4 / 3)])
    torch.testing.assert_close(binary_entropy(prob).flatten(), expected, atol=3e-6, rtol=0)


def test_mean_over_a_mask():
    values, mask = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1, 0, 1])
    assert masked_mean(values, mask) == 3.5
    assert masked_mean(values, torch.zeros(3)) == 0
    with pytest.raises(ValueError, match="shape"):
        masked_mean(values, mask[:2])


@pytest.mark.parametrize(("norm", "classes"), [("code", 2), ("paper", 1)])
def test_consistency_is_the_formula_of_the_public_code(build, make_batch, norm, classes):
    method, batch = build("--uamt_norm", norm), make_batch(size=SIZE)
    student, single = logits_like(4), logits_like(2)
    base = logits_like(2, 3.0).repeat(2, 1, 1, 1, 1)  # alike in all passes, else hardly any voxel would be certain
    passes = [base + logits_like(4, 0.3) for _ in range(4)]
    method.student, method.teacher.network = Replay(student), Replay(single, *passes)
    term = method.training_step(batch, ITERATION)["consistency"]
    assert method.teacher.network.sizes == [2, 4, 4, 4, 4]

    mean = torch.cat(passes).double().softmax(1).reshape(8, 2, 2, SIZE, SIZE, SIZE).mean(0)
    uncertainty = -(mean * (mean + 1e-6).log()).sum(1, keepdim=True)
    certain = (uncertainty < uncertainty_threshold(ITERATION, 200)).double()
    assert 0.2 < certain.mean() < 0.95
    difference = (student[2:].double().softmax(1) - single.double().softmax(1)) ** 2
    expected = (certain * difference).sum() / (classes * certain.sum() + 1e-16)
    torch.testing.assert_close(term.double(), method.consistency_weight(ITERATION) * expected, rtol=1e-4, atol=0)


def test_a_confident_teacher_is_trusted_everywhere_and_an_undecided_one_nowhere(build, make_batch):
    method, batch = build(), make_batch(size=SIZE)
    sure = torch.stack([torch.zeros(4, SIZE, SIZE, SIZE), torch.full((4, SIZE, SIZE, SIZE), 9.0)], 1)
    for logits, share in ((sure, 1.0), (torch.zeros(4, 2, SIZE, SIZE, SIZE), 0.0)):
        method.teacher.network = Replay(logits[:2], *[logits] * 4)
        term = method.training_step(batch, 0)["consistency"]
        assert method.monitor["certain"] == share
        assert (term > 0) == bool(share)
        assert torch.isfinite(term)


def test_passes_differ_by_dropout_and_by_noise(build, make_batch):
    image = make_batch(size=SIZE).image
    for flags in (["--noise_sd", "0", "--dropout", "0.5"], ["--dropout", "0"]):
        method = build(*flags).train()
        assert not torch.equal(method._noisy_pass(image)["prob"], method._noisy_pass(image)["prob"])
    method = build("--noise_sd", "0", "--dropout", "0").train()
    assert torch.equal(method._noisy_pass(image)["prob"], method._noisy_pass(image)["prob"])


@pytest.mark.parametrize(("choice", "compared"), [("unlabeled", 2), ("all", 4)])
def test_gradient_of_the_consistency_reaches_the_student_alone_at_the_chosen_volumes(
    build, make_batch, choice, compared
):
    method, batch = build("--cons_on", choice), make_batch(size=SIZE)
    logits = logits_like(4).requires_grad_()
    method.student = Replay(logits)
    method.training_step(batch, 200)["consistency"].backward()
    moved = (logits.grad.flatten(1).abs().sum(1) > 0).tolist()
    assert moved == [False] * (4 - compared) + [True] * compared
    assert all(p.grad is None for p in method.teacher.parameters())


def test_labeled_cases_alone_suffice_with_cons_on_all(build, make_batch):
    method = build("--cons_on", "all", "--unlabelnum", "0")
    assert set(method.training_step(make_batch(4, 0, size=SIZE), 0)) == {"supervised", "consistency"}


def test_first_update_copies_the_student_but_not_its_batch_norm_statistics(build, make_batch):
    method, batch = build().train(), make_batch(size=SIZE)
    turn = method.turns()[0]
    sum(turn.step(batch, 0).values()).backward()
    turn.optimizer.step()
    student, teacher = method.student, method.teacher.network
    assert not torch.equal(student.heads["softmax"].weight, teacher.heads["softmax"].weight)
    method.after_step(0)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
    assert not torch.equal(student.encoder[0][1].running_mean, teacher.encoder[0][1].running_mean)
    assert teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_testing_the_student_does_not_run_the_teacher(build, make_batch):
    method = build().eval()
    method.teacher.network = Replay()
    assert list(method.predict(make_batch(size=SIZE).image, ["seg"])) == ["seg"]
    assert method.teacher.network.sizes == []


def test_probabilities_are_float32_in_mixed_precision(build, make_batch):
    method, batch = build().train(), make_batch(size=SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        terms = method.training_step(batch, 0)
        assert method._noisy_pass(batch.image)["prob"].dtype == torch.float32
    assert all(term.dtype == torch.float32 and torch.isfinite(term) for term in terms.values())
