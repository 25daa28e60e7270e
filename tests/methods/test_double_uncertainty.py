"""Double-Uncertainty's two terms against its formulas, written out in float64 with all passes stored."""

import math

import pytest
import torch

from methods.double_uncertainty import FEAT, SEG
from utils.errors import InputError

ITERATION = 150  # of 200
SIZE = 16  # of the cubes: the smallest that the V-Net takes


@pytest.fixture
def build_du(build):
    """Without batch norm, so that a second call of a network gives the same."""
    return lambda *flags: build("double_uncertainty", "--norm", "group", *flags)


def plogp(prob: torch.Tensor) -> torch.Tensor:
    return -(prob * (prob + 1e-6).log()).sum(1, keepdim=True)


@pytest.mark.parametrize("classes", [1, 2])
def test_terms_are_the_formula(build_du, make_batch, classes):
    flags = "--mc_passes 3 --noise_sd 0.5 --noise_clip 1 --unc_weight 0.7 --num_classes".split()
    method, batch = build_du(*flags, str(classes)), make_batch(size=SIZE, classes=classes)
    torch.manual_seed(1)
    stored = [method._noisy_pass(batch.image) for _ in range(3)]
    torch.manual_seed(1)
    terms = method.training_step(batch, ITERATION)
    weight = method.consistency_weight(ITERATION)
    assert set(terms) == {"supervised", SEG, FEAT}
    features = method.student.features(batch.image)
    logits = method.student.apply_heads(features)["softmax"]
    for name, scores, largest in ((SEG, logits, 1.0), (FEAT, features, math.log(8))):
        prob = scores.double().softmax(1)
        mean = torch.stack([maps[name].double() for maps in stored]).mean(0)
        distance = (prob - mean).square().sum(1, keepdim=True)
        expected = (torch.exp(-plogp(mean) / largest) * distance).mean() + 0.7 * plogp(prob).mean() / largest
        torch.testing.assert_close(terms[name].double(), weight * expected, rtol=1e-4, atol=1e-8)
    assert 0 < method.monitor["segmentation_uncertainty"] <= math.log(classes + 1)
    assert 0 < method.monitor["feature_uncertainty"] <= 1


@pytest.mark.parametrize(("weight", "learns"), [("1", True), ("0", False)])
def test_where_student_and_teacher_agree_only_the_students_own_entropy_is_learned(build_du, make_batch, weight, learns):
    method = build_du("--mc_passes", "1", "--noise_sd", "0", "--unc_weight", weight)
    terms = method.training_step(make_batch(size=SIZE), ITERATION)
    (terms[SEG] + terms[FEAT]).backward()
    assert (method.student.encoder[0][0].weight.grad.abs().max() > 1e-7) == learns
    assert all(p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize(("flags", "calls"), [([], [4] * 8), (["--cons_on", "unlabeled"], [4] * 4)])
def test_passes_run_in_groups_of_the_batch(build_du, make_batch, monkeypatch, flags, calls):
    method, sizes = build_du(*flags), []
    features = method.teacher.network.features
    monkeypatch.setattr(method.teacher.network, "features", lambda x: sizes.append(len(x)) or features(x))
    method.training_step(make_batch(size=SIZE), 0)
    assert sizes == calls


def test_a_patch_that_the_features_cannot_take_is_refused(build_du):
    with pytest.raises(InputError, match="--patch_size"):
        build_du("--patch_size", "40", "32", "32")
