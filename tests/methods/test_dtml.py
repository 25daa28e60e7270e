"""DTML's terms, gradients and variants against what the paper and the public implementation define."""

import pytest
import torch
import torch.nn.functional as F

from inference.trained import trained_method
from methods.dtml import DTML
from runtime import runs
from utils.losses import dice_ce_loss, dice_loss
from utils.sdm import prob_from_sdm

ITERATION = 150  # of 200: the consistency weight is well above 0
K = 20.0
LAST_LOSS = 0.641539
PAPER = f"--sdm_k_start 0 --sdm_k {K} --mask_loss dice --labeled_bs 2 --norm instance".split()  # but for its k


@pytest.fixture
def dtml(build):
    return lambda *flags: build("dtml", *PAPER, *flags)


def gradients(module: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True))


def parts(method: DTML, batch):
    """Supervised losses and both predictions, written out from Sect. 2.2."""
    logits, sdm = method.m_s(batch.image)["seg"], method.m_d(batch.image)["sdm"]
    seg = dice_ce_loss(logits[:2], batch.label)
    mask = dice_loss(torch.sigmoid(-K * sdm[:2]), batch.label)
    return seg, mask, torch.sigmoid(logits), torch.sigmoid(-K * sdm)


def agreement(prob, target):
    """L_con of each class, averaged."""
    return torch.stack([F.mse_loss(p, t) for p, t in zip(prob.unbind(1), target.unbind(1), strict=True)]).mean()


def assert_close(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert any(g.abs().max() > 0 for g in first)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [1, 2])
def test_joint_backward_equals_the_objectives_of_eqs_5_and_6_with_the_peer_detached(dtml, make_batch, classes):
    method, batch = dtml("--num_classes", str(classes)), make_batch(classes=classes)
    total = sum(method.training_step(batch, ITERATION).values())
    weight = method.consistency_weight(ITERATION)
    seg, mask, prob_s, prob_d = parts(method, batch)
    loss_s = seg + weight * agreement(prob_s, prob_d.detach())
    loss_d = mask + weight * agreement(prob_d, prob_s.detach())
    separate = gradients(method.m_s, loss_s) + gradients(method.m_d, loss_d)
    assert_close(gradients(method, total), separate)


def test_con_scale_2_equals_two_full_backward_passes(dtml, make_batch):
    method, batch = dtml("--con_scale", "2"), make_batch()
    total = sum(method.training_step(batch, ITERATION).values())
    weight = method.consistency_weight(ITERATION)
    seg, mask, prob_s, prob_d = parts(method, batch)
    shared = weight * F.mse_loss(prob_s, prob_d)  # nothing detached: both backward passes reach both networks
    passes = gradients(method, seg + mask + shared), gradients(method, shared)
    assert_close(gradients(method, total), [a + b for a, b in zip(*passes, strict=True)])


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("", "seg mask consistency"),
        ("--sdm_supervision sdm", "seg dis consistency"),
        ("--sdm_supervision both", "seg mask dis consistency"),
        ("--branch seg", "seg"),
        ("--branch sdm", "mask"),
        ("--branch sdm --sdm_supervision both", "mask dis"),
        ("--unlabelnum 0", "seg mask consistency"),  # the cross loss stays
    ],
)
def test_terms_of_every_variant_in_the_papers_order(dtml, make_batch, flags, names):
    method, batch = dtml(*flags.split()), make_batch()
    terms = method.training_step(batch, ITERATION)
    both = dtml()  # of the same seed: a network by itself is drawn as M_s of the pair
    if flags.startswith("--branch sdm"):
        both.m_d = method.m_d
    seg, mask, prob_s, prob_d = parts(both, batch)
    con = both.consistency_weight(ITERATION) * (prob_s - prob_d).square().mean()
    dis = (both.m_d(batch.image)["sdm"][:2] - batch.sdm).square().mean()
    expected = {"seg": seg, "mask": mask, "dis": dis, "consistency": con}
    assert list(terms) == names.split()
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name])


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ("", None),
        ("--branch sdm", None),
        ("--branch seg --sdm_supervision both", None),
        ("--sdm_supervision both", "sign"),
        ("--branch sdm --sdm_supervision sdm --sdm_empty zeros", "zeros"),
    ],
)
def test_distance_maps_are_asked_of_the_loader_only_for_l_dis(dtml, flags, rule):
    assert dtml(*flags.split()).sdm_empty == rule


def test_single_networks_hold_no_second_one(dtml):
    seg, sdm, both = dtml("--branch", "seg"), dtml("--branch", "sdm"), dtml()
    assert (seg.m_d, seg.outputs) == (None, ("seg",))
    assert (sdm.m_s, sdm.outputs) == (None, ("sdm",))
    assert both.outputs == ("seg", "sdm", "mean")


def test_predict_gives_the_mean_and_evaluates_only_what_was_asked_for(dtml, make_batch, monkeypatch):
    method, image = dtml().eval(), make_batch().image[:1]
    with torch.no_grad():
        probs = method.predict(image)
        torch.testing.assert_close(probs["mean"], (probs["seg"] + probs["sdm"]) / 2)
        torch.testing.assert_close(probs["sdm"], prob_from_sdm(method.m_d(image)["sdm"], K))
        monkeypatch.setattr(method.m_d, "forward", None)
        assert list(method.predict(image, ["seg"])) == ["seg"]


@pytest.mark.parametrize(("start", "k"), [("10", [10, 100, 1000]), ("0", [1000] * 3)])
def test_k_grows_geometrically_from_start_to_end(dtml, start, k):
    method = dtml("--sdm_k", "1000", "--sdm_k_start", start)
    assert [method.steepness(t) for t in (0, 100, 200)] == pytest.approx(k)


def test_predictions_use_the_k_of_the_iterations_that_the_weights_have_seen(build_engine, make_batch, tmp_path):
    """In pictures and validations of a run, after resuming it, and in a test of its checkpoint."""
    flags, batch = ("--sdm_k", "1000", "--sdm_k_start", "10"), make_batch(1, 1)
    engine, resumed = (build_engine("dtml", *flags) for _ in range(2))
    engine.iteration = 99
    engine.step(batch)
    engine.save(runs.LAST)
    state = runs.load_checkpoint(tmp_path / runs.LAST)
    resumed.load(state)
    tested = trained_method(engine.options, state, tmp_path / runs.LAST)
    with torch.no_grad():
        for method in (engine.method, resumed.method, tested):
            method.eval()
            sdm = method.m_d(batch.image)["sdm"]
            torch.testing.assert_close(method.predict(batch.image, ["sdm"])["sdm"], prob_from_sdm(sdm, 100))


def test_twenty_iterations_end_where_they_did(build_engine, make_batch):
    """One number for all that must not move unnoticed: network, initial values, losses, schedules, optimizer.

    Instance norm, because batch norm over two crops turns rounding into per cents within these steps.
    """
    engine = build_engine("dtml", *"--norm instance --n_filters 4 --dropout 0 --sdm_k 20 --sdm_k_start 0".split())
    for engine.iteration in range(20):
        values = engine.step(make_batch(1, 1, seed=engine.iteration))
    loss = sum(float(value) for name, value in values.items() if name.startswith("loss/"))
    assert loss == pytest.approx(LAST_LOSS, rel=5e-3)
