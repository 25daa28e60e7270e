"""DTC's terms and gradients against what the paper and the public code define."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from methods.dtc import DTC
from utils.losses import dice_loss
from utils.schedules import rampup
from utils.sdm import prob_from_sdm, signed_distance

ITERATION = 150  # of 200: the consistency weight is well above 0


@pytest.fixture
def build(tiny_options):
    """Without batch norm, so that a case's output depends on no other."""

    def make(*flags: str) -> DTC:
        torch.manual_seed(0)
        return DTC(tiny_options("dtc", "--norm", "instance", *flags))

    return make


def test_terms_are_those_of_the_public_code(build, make_batch):
    method, batch = build(), make_batch()
    terms = method.training_step(batch, ITERATION)
    heads = method.network(batch.image)
    sdm, prob = heads["sdm"], torch.sigmoid(heads["seg"])
    target = torch.stack([torch.from_numpy(signed_distance(mask.numpy() > 0.5)) for mask in batch.label[:, 0]])[:, None]
    expected = {
        "seg": dice_loss(prob[:2], batch.label),
        "sdm": 0.3 * (sdm[:2] - target).square().mean(),
        "consistency": rampup(ITERATION, 200) * (torch.sigmoid(-1500 * sdm) - prob).square().mean(),  # all four cases
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    assert method.monitor["consistency_weight"] == rampup(ITERATION, 200)


def test_consistency_trains_both_heads_and_supervision_each_its_own(build, make_batch):
    method, batch = build("--sdm_k", "20"), make_batch()
    terms = method.training_step(batch, ITERATION)
    weights = [method.network.heads[name].weight for name in ("seg", "sdm")]
    reached = {
        name: [g is not None and bool(g.abs().max() > 0) for g in grads]
        for name, grads in (
            (name, torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True))
            for name, term in terms.items()
        )
    }
    assert reached == {"seg": [True, False], "sdm": [False, True], "consistency": [True, True]}


def test_unlabeled_images_enter_the_consistency_alone(build, make_batch):
    method, batch = build("--sdm_k", "20"), make_batch()
    changed = replace(batch, image=torch.cat([batch.image[:2], make_batch(seed=1).image[2:]]))
    before, after = (method.training_step(b, ITERATION) for b in (batch, changed))
    assert before["seg"] == after["seg"] and before["sdm"] == after["sdm"]
    assert before["consistency"] != after["consistency"]


def test_it_trains_without_unlabeled_cases(build, make_batch):
    method = build("--unlabelnum", "0")
    terms = method.training_step(make_batch(labeled=4, unlabeled=0), ITERATION)
    assert set(terms) == {"seg", "sdm", "consistency"}
    assert all(torch.isfinite(term) for term in terms.values())


def test_bce_is_added_by_its_flag(build, make_batch):
    method, batch = build("--bce"), make_batch()
    terms = method.training_step(batch, 0)
    logits = method.network(batch.image)["seg"][:2]
    torch.testing.assert_close(terms["bce"], F.binary_cross_entropy(logits.sigmoid(), batch.label))
    plain = build().training_step(batch, 0)
    torch.testing.assert_close(terms["seg"], plain["seg"])
    assert set(terms) - set(plain) == {"bce"}


def test_weights_are_flags(build, make_batch):
    batch = make_batch()
    plain = build().training_step(batch, ITERATION)
    scaled = build("--sdm_weight", "0.6", "--consistency", "3").training_step(batch, ITERATION)
    torch.testing.assert_close(scaled["sdm"], 2 * plain["sdm"])
    torch.testing.assert_close(scaled["consistency"], 3 * plain["consistency"])


@pytest.mark.parametrize(
    ("flags", "target"), [([], 1.0), (["--sdm_empty", "zeros"], 0.0), (["--compat", "public"], 0.0)]
)
def test_map_of_an_empty_crop(build, make_batch, flags, target):
    method, batch = build(*flags), make_batch()
    empty = replace(batch, label=torch.zeros_like(batch.label))
    sdm = method.network(batch.image)["sdm"][:2]
    torch.testing.assert_close(
        method.training_step(empty, 0)["sdm"], 0.3 * (sdm - target).square().mean(), rtol=1e-5, atol=1e-7
    )


def test_predictions_are_of_the_two_heads(build, make_batch):
    method, image = build("--sdm_k", "20").eval(), make_batch().image[:1]
    heads, probs = method.network(image), method.predict(image)
    torch.testing.assert_close(probs["seg"], torch.sigmoid(heads["seg"]))
    torch.testing.assert_close(probs["sdm"], prob_from_sdm(heads["sdm"], 20))
    assert list(probs) == ["seg", "sdm"]  # the reported one first
    torch.testing.assert_close(method.signed_maps(image)["sdm"], heads["sdm"])
