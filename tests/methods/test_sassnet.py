"""SASSNet: who learns what from whom, in which mode, and the adversarial terms against their formulas."""

import pytest
import torch

from methods.sassnet import LABELED_CLASS, UNLABELED_CLASS, critic_target, evaluating
from utils.schedules import rampup

ITERATION = 150  # of 200


@pytest.mark.parametrize(("labeled", "unlabeled"), [(2, 2), (1, 3), (3, 1)])
def test_targets_follow_the_layout_of_the_batch(make_batch, labeled, unlabeled):
    target = critic_target(make_batch(labeled, unlabeled, size=16))
    assert target.tolist() == [LABELED_CLASS] * labeled + [UNLABELED_CLASS] * unlabeled


@pytest.mark.parametrize("classes", [1, 2])
def test_terms_are_those_of_the_public_implementation(build, make_batch, classes):
    flags = "--norm instance --dropout 0 --num_classes".split()
    method, batch = build("sassnet", *flags, str(classes)), make_batch(1, 2, classes=classes)
    method.critic.dropout.p = 0.0
    terms = method.training_step(batch, ITERATION) | method.critic_step(batch, ITERATION)
    sdm = method.network(batch.image)["sdm"]
    verdict = method.critic(sdm, batch.image).log_softmax(dim=1)
    weight = 0.01 * rampup(ITERATION, 200)
    torch.testing.assert_close(terms["adversarial"], -weight * verdict[1:, LABELED_CLASS].mean())
    said = [verdict[0, LABELED_CLASS], verdict[1, UNLABELED_CLASS], verdict[2, UNLABELED_CLASS]]
    torch.testing.assert_close(terms["critic"], -torch.stack(said).mean())
    assert set(terms) == {"seg", "sdm", "adversarial", "critic"}


def test_only_maps_of_unlabeled_cases_are_to_deceive(build, make_batch):
    method, batch, maps = build("sassnet"), make_batch(), []
    method.network.register_forward_hook(lambda module, args, heads: maps.append(heads["sdm"]))
    terms = method.training_step(batch, ITERATION)
    (gradient,) = torch.autograd.grad(terms["adversarial"], maps)
    assert gradient[:2].abs().max() == 0 < gradient[2:].abs().max()


def test_modes_of_the_two_networks(build_engine, make_batch):
    engine, seen = build_engine("sassnet"), []
    method = engine.method
    for name in ("network", "critic"):
        getattr(method, name).register_forward_hook(
            lambda module, *_, name=name: seen.append((name, module.training, torch.is_grad_enabled()))
        )
    engine.step(make_batch(1, 1))
    # G learns in training mode and is judged without dropout; then it is looked at as it would be tested.
    assert seen == [("network", True, True), ("critic", False, True), ("network", False, False), ("critic", True, True)]
    assert all(module.training for module in method.modules())


@pytest.mark.parametrize("training", [True, False])
def test_the_former_mode_comes_back_even_after_an_error(training):
    network = torch.nn.Sequential(torch.nn.Dropout()).train(training)
    with pytest.raises(RuntimeError), evaluating(network):
        assert not network[0].training
        raise RuntimeError
    assert network[0].training is training


@pytest.mark.parametrize(
    ("flags", "weight"), [("", 0.01), ("--adv_weight 0.001", 0.001), ("--consistency 0.015", 0.015)]
)
def test_the_weight_goes_by_both_its_names(build, flags, weight):
    method = build("sassnet", *flags.split())
    assert method.options.consistency == weight
    assert method.consistency_weight(ITERATION) == weight * rampup(ITERATION, 200)


def test_the_critic_grows_with_the_v_net_and_is_the_published_one_at_width_16(build):
    critic = build("sassnet", "--n_filters", "16").critic
    assert sum(parameter.numel() for parameter in critic.parameters()) == 11_020_290
