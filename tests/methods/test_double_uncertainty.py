"""Double-Uncertainty's two terms against its formulas, written out in float64 with all passes stored."""

import math

import pytest
import torch

from methods.double_uncertainty import FEAT, SEG, DoubleUncertainty
from utils.errors import InputError
from utils.losses import entropy

ITERATION = 150  # of 200
SIZE = 16  # of the cubes: the smallest that the V-Net takes


@pytest.fixture
def build(tiny_options):
    def make(*flags: str) -> DoubleUncertainty:
        """Without batch norm, so that a second call of a network gives the same."""
        torch.manual_seed(0)
        return DoubleUncertainty(tiny_options("double_uncertainty", "--norm", "group", *flags)).train()

    return make


def plogp(prob: torch.Tensor) -> torch.Tensor:
    return -(prob * (prob + 1e-6).log()).sum(1, keepdim=True)


def expected_terms(method: DoubleUncertainty, batch, passes: int, seed: int, variance: bool, own: bool) -> dict:
    """The two terms without their weights, from the docstring's formula."""
    torch.manual_seed(seed)
    stored = [method._noisy_pass(batch.image) for _ in range(passes)]
    features = method.student.features(batch.image)
    logits = method.student.apply_heads(features)["softmax"]
    terms = {}
    for name, scores, largest in ((SEG, logits, 1.0), (FEAT, features, math.log(8))):
        prob = scores.double().softmax(1)
        samples = torch.stack([maps[name].double() for maps in stored])
        mean = samples.mean(0)
        uncertainty = samples.var(0, unbiased=False).mean(1, keepdim=True) if variance else plogp(mean) / largest
        added = plogp(prob) / largest if own else uncertainty
        distance = (prob - mean).square().sum(1, keepdim=True)
        terms[name] = (torch.exp(-uncertainty) * distance).mean() + 0.7 * added.mean()
    return terms


def test_entropy_over_channels():
    prob = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25] * 4]).view(2, 4, 1, 1, 1)
    torch.testing.assert_close(entropy(prob).flatten(), torch.tensor([0.0, math.log(4)]), atol=5e-6, rtol=0)
    with pytest.raises(ValueError, match="all classes"):
        entropy(prob[:, :1])


@pytest.mark.parametrize("kind", ["entropy", "variance"])
@pytest.mark.parametrize("source", ["student", "teacher"])
def test_terms_are_the_formula(build, make_batch, kind, source):
    flags = ["--seg_unc", kind, "--feat_unc", kind, "--unc_reg", source, "--unc_weight", "0.7"]
    method, batch = build("--mc_passes", "3", "--noise_sd", "0.5", "--noise_clip", "1", *flags), make_batch(size=SIZE)
    expected = expected_terms(method, batch, 3, seed=1, variance=kind == "variance", own=source == "student")
    torch.manual_seed(1)
    terms = method.training_step(batch, ITERATION)
    weight = method.consistency_weight(ITERATION)
    assert set(terms) == {"supervised", SEG, FEAT}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].double(), weight * value, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("level", [1, 3])
def test_features_may_be_those_of_a_deeper_block(build, make_batch, level):
    method, batch = build("--mc_passes", "1", "--noise_sd", "0", "--feat_level", str(level)), make_batch(size=SIZE)
    term = method.training_step(batch, ITERATION)[FEAT] / method.consistency_weight(ITERATION)
    maps = []
    method.student.decoder[3 - level].register_forward_hook(lambda module, args, output: maps.append(output))
    method.student(batch.image)
    assert maps[0].shape == (4, 8 << level, *[SIZE >> level] * 3)
    expected = plogp(maps[0].double().softmax(1)).mean() / math.log(8 << level)  # b H: student and teacher agree
    torch.testing.assert_close(term.double(), expected, rtol=1e-4, atol=1e-8)


def test_terms_have_weights_of_their_own(build, make_batch):
    batch = make_batch(size=SIZE)

    def terms(*flags):
        method = build("--mc_passes", "1", *flags)
        torch.manual_seed(1)
        return method.training_step(batch, ITERATION)

    plain, weighted = terms(), terms("--seg_weight", "3", "--feat_weight", "0.5")
    for name, factor in (("supervised", 1), (SEG, 3), (FEAT, 0.5)):
        torch.testing.assert_close(weighted[name], factor * plain[name])


def test_the_uncertainty_is_learnable_only_through_the_student(build, make_batch):
    """With a teacher that agrees perfectly, only the student's own entropy leaves a gradient."""
    batch = make_batch(size=SIZE)
    for source, learns in (("student", True), ("teacher", False)):
        method = build("--mc_passes", "1", "--noise_sd", "0", "--unc_reg", source)
        terms = method.training_step(batch, ITERATION)
        (terms[SEG] + terms[FEAT]).backward()
        gradient = method.student.encoder[0][0].weight.grad.abs().max()
        assert (gradient > 1e-7) == learns
        assert all(p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize(("flags", "calls"), [([], [4] * 8), (["--cons_on", "unlabeled"], [4] * 4)])
def test_passes_run_in_groups_of_the_batch(build, make_batch, monkeypatch, flags, calls):
    method, sizes = build(*flags), []
    features = method.teacher.network.features
    monkeypatch.setattr(method.teacher.network, "features", lambda x: sizes.append(len(x)) or features(x))
    method.training_step(make_batch(size=SIZE), 0)
    assert sizes == calls


@pytest.mark.parametrize(("flags", "alike"), [(["0"], True), (["0.1"], False), (["0", "--dropout", "0.5"], False)])
def test_passes_differ_by_noise_and_by_dropout(build, make_batch, flags, alike):
    method, image = build("--noise_sd", *flags), make_batch(size=SIZE).image
    first, second = method._noisy_pass(image), method._noisy_pass(image)
    assert torch.equal(first[SEG], second[SEG]) == alike


def test_uncertainties_stay_in_range(build, make_batch):
    method = build()
    method.training_step(make_batch(size=SIZE), 0)
    assert 0 < method.monitor["segmentation_uncertainty"] <= math.log(2)
    assert 0 < method.monitor["feature_uncertainty"] <= 1


def test_mixed_precision_keeps_the_distributions_in_float32(build, make_batch):
    method, batch = build("--mc_passes", "1"), make_batch(size=SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        maps, terms = method._noisy_pass(batch.image), method.training_step(batch, 0)
    assert all(x.dtype == torch.float32 for x in [*maps.values(), *terms.values()])


def test_labeled_cases_alone_suffice(build, make_batch):
    terms = build("--unlabelnum", "0", "--mc_passes", "1").training_step(make_batch(4, 0, size=SIZE), ITERATION)
    assert all(torch.isfinite(term) for term in terms.values())


def test_a_patch_that_the_features_cannot_take_is_refused(build):
    with pytest.raises(InputError, match="--patch_size"):
        build("--patch_size", "40", "32", "32")
