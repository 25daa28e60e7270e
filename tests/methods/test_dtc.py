"""DTC's terms and gradients against what the paper and the public implementation define."""

from dataclasses import replace

import pytest
import torch

from utils.losses import dice_loss
from utils.schedules import rampup
from utils.sdm import prob_from_sdm, signed_distance

ITERATION = 150  # of 200: the consistency weight is well above 0
INSTANCE = ("--norm", "instance")  # a case's output depends on no other


@pytest.mark.parametrize("classes", [1, 2])
def test_terms_are_those_of_the_public_implementation(build, make_batch, classes):
    flags = ["--sdm_weight", "0.6", "--consistency", "3", "--num_classes", str(classes)]
    method, batch = build("dtc", *INSTANCE, *flags), make_batch(classes=classes)
    terms = method.training_step(batch, ITERATION)
    heads = method.network(batch.image)
    sdm, prob = heads["sdm"], torch.sigmoid(heads["seg"])
    masks = batch.label.flatten(0, 1) > 0.5
    target = torch.stack([torch.from_numpy(signed_distance(mask.numpy())) for mask in masks]).view(batch.label.shape)
    weight = 3 * rampup(ITERATION, 200)
    expected = {
        "seg": dice_loss(prob[:2], batch.label),
        "sdm": 0.6 * (sdm[:2] - target).square().mean(),
        "consistency": weight * (torch.sigmoid(-1500 * sdm) - prob).square().mean(),  # all four cases
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    assert method.monitor["consistency_weight"] == weight
    assert (method.options.sdm_weight, build("dtc").options.sdm_weight, build("dtc").options.consistency) == (
        0.6,
        0.3,
        1,
    )


def test_consistency_trains_both_heads_and_supervision_each_its_own(build, make_batch):
    method, batch = build("dtc", *INSTANCE, "--sdm_k", "20"), make_batch(1, 1)
    weights, reached = [method.network.heads[name].weight for name in ("seg", "sdm")], {}
    for name, term in method.training_step(batch, ITERATION).items():
        gradients = torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
        reached[name] = [gradient is not None and bool(gradient.abs().max() > 0) for gradient in gradients]
    assert reached == {"seg": [True, False], "sdm": [False, True], "consistency": [True, True]}


def test_unlabeled_images_enter_the_consistency_alone(build, make_batch):
    method, batch = build("dtc", *INSTANCE, "--sdm_k", "20"), make_batch()
    changed = replace(batch, image=torch.cat([batch.image[:2], make_batch(seed=1).image[2:]]))
    before, after = (method.training_step(b, ITERATION) for b in (batch, changed))
    assert [name for name in before if before[name] != after[name]] == ["consistency"]


def test_it_trains_without_unlabeled_cases(build, make_batch):
    terms = build("dtc", "--unlabelnum", "0").training_step(make_batch(labeled=2, unlabeled=0), ITERATION)
    assert set(terms) == {"seg", "sdm", "consistency"}
    assert all(torch.isfinite(term) for term in terms.values())


@pytest.mark.parametrize("method", ["dtc", "sassnet"])
@pytest.mark.parametrize(
    ("flags", "rule"), [("", "sign"), ("--sdm_empty zeros", "zeros"), ("--compat public", "zeros")]
)
def test_maps_are_asked_of_the_loader_by_the_rule_of_the_flags(build, method, flags, rule):
    assert build(method, *flags.split()).sdm_empty == rule


def test_predictions_are_of_the_two_heads(build, make_batch):
    method, image = build("dtc", "--sdm_k", "20").eval(), make_batch().image[:1]
    heads, probs = method.network(image), method.predict(image)
    torch.testing.assert_close(probs["seg"], torch.sigmoid(heads["seg"]))
    torch.testing.assert_close(probs["sdm"], prob_from_sdm(heads["sdm"], 20))
    assert list(probs) == ["seg", "sdm"]  # the reported one first
    torch.testing.assert_close(method.signed_maps(image)["sdm"], heads["sdm"])
