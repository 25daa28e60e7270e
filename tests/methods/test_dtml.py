"""DTML's terms, gradients and variants against what the paper and the public code define."""

import pytest
import torch
import torch.nn.functional as F

from methods import dtml
from methods.dtml import DTML
from utils.losses import dice_ce_loss, dice_loss
from utils.sdm import prob_from_sdm

ITERATION = 150  # of 200: the consistency weight is well above 0
PAPER = "--sdm_k_start 0 --sdm_k 20 --mask_loss dice --labeled_bs 2 --norm instance".split()  # but for its k


@pytest.fixture
def build(tiny_options):
    def make(*flags: str) -> DTML:
        torch.manual_seed(0)
        return DTML(tiny_options("dtml", *PAPER, *flags))

    return make


def gradients(module: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True))


def parts(method: DTML, batch):
    """Supervised losses and both predictions, written out from the paper's Eqs. 3, 5 and 6."""
    logits, sdm = method.m_s(batch.image)["seg"], method.m_d(batch.image)["sdm"]
    seg = dice_ce_loss(logits[:2], batch.label)
    mask = dice_loss(torch.sigmoid(-method.k * sdm[:2]), batch.label)
    return seg, mask, torch.sigmoid(logits), torch.sigmoid(-method.k * sdm)


def assert_close(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert any(g.abs().max() > 0 for g in first)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_joint_backward_equals_two_losses_with_the_peer_detached(build, make_batch):
    method, batch = build(), make_batch()
    total = sum(method.training_step(batch, ITERATION).values())
    weight = method.consistency_weight(ITERATION)
    seg, mask, prob_s, prob_d = parts(method, batch)
    loss_s = seg + weight * F.mse_loss(prob_s, prob_d.detach())
    loss_d = mask + weight * F.mse_loss(prob_d, prob_s.detach())
    separate = gradients(method.m_s, loss_s) + gradients(method.m_d, loss_d)
    assert_close(gradients(method, total), separate)


def test_con_scale_2_equals_two_full_backward_passes(build, make_batch):
    method, batch = build("--con_scale", "2"), make_batch()
    total = sum(method.training_step(batch, ITERATION).values())
    weight = method.consistency_weight(ITERATION)
    seg, mask, prob_s, prob_d = parts(method, batch)
    agreement = weight * F.mse_loss(prob_s, prob_d)  # nothing detached: both backward passes reach both networks
    passes = gradients(method, seg + mask + agreement), gradients(method, agreement)
    assert_close(gradients(method, total), [a + b for a, b in zip(*passes, strict=True)])


def test_consistency_covers_every_case_and_supervision_only_labeled_ones(build, make_batch):
    method, batch = build(), make_batch()
    terms = method.training_step(batch, ITERATION)
    _, _, prob_s, prob_d = parts(method, batch)
    weight = method.consistency_weight(ITERATION)
    torch.testing.assert_close(terms["consistency"], weight * (prob_s - prob_d).square().mean())
    assert set(terms) == {"seg", "mask", "consistency"}


@pytest.mark.parametrize(
    ("flags", "terms"),
    [
        (["--sdm_supervision", "mask"], {"seg", "mask", "consistency"}),
        (["--sdm_supervision", "sdm"], {"seg", "dis", "consistency"}),
        (["--sdm_supervision", "both"], {"seg", "mask", "dis", "consistency"}),
        (["--branch", "seg"], {"seg"}),
        (["--branch", "sdm"], {"mask"}),
        (["--branch", "sdm", "--sdm_supervision", "both"], {"mask", "dis"}),
    ],
)
def test_variants_of_tables_1_and_2(build, make_batch, flags, terms):
    assert set(build(*flags).training_step(make_batch(), 0)) == terms


def test_distance_maps_are_computed_only_if_a_loss_asks_for_them(build, make_batch, monkeypatch):
    calls = []
    real = dtml.signed_distance_batch
    monkeypatch.setattr(dtml, "signed_distance_batch", lambda *a: calls.append(len(a[0])) or real(*a))
    build("--sdm_supervision", "mask").training_step(make_batch(), 0)
    assert calls == []
    build("--sdm_supervision", "both").training_step(make_batch(), 0)
    assert calls == [2]  # of the labeled cases, not of all four


def test_single_networks_hold_no_second_one(build):
    seg, sdm, both = build("--branch", "seg"), build("--branch", "sdm"), build()
    assert (seg.m_d, seg.outputs) == (None, ("seg",))
    assert (sdm.m_s, sdm.outputs) == (None, ("sdm",))
    assert both.outputs == ("seg", "sdm", "mean")


def test_predict_gives_the_mean_and_evaluates_only_what_was_asked_for(build, make_batch, monkeypatch):
    method, image = build().eval(), make_batch().image[:1]
    with torch.no_grad():
        probs = method.predict(image)
        torch.testing.assert_close(probs["mean"], (probs["seg"] + probs["sdm"]) / 2)
        torch.testing.assert_close(probs["sdm"], prob_from_sdm(method.m_d(image)["sdm"], method.k))
        monkeypatch.setattr(method.m_d, "forward", None)
        assert list(method.predict(image, ["seg"])) == ["seg"]


def test_steepness_grows_geometrically_from_start_to_end(build):
    method = build("--sdm_k", "1000", "--sdm_k_start", "10")
    steps = [method.steepness(t) for t in (0, method.iterations // 2, method.iterations)]
    assert steps == pytest.approx([10, 100, 1000])
    constant = build("--sdm_k", "1500", "--sdm_k_start", "0")
    assert [constant.steepness(t) for t in (0, 50, constant.iterations)] == [1500] * 3


def test_without_unlabeled_cases_the_cross_loss_stays(build, make_batch):
    method = build("--unlabelnum", "0")
    assert set(method.training_step(make_batch(labeled=4, unlabeled=0), ITERATION)) == {"seg", "mask", "consistency"}
