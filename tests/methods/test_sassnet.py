"""SASSNet: who learns what from whom, in which mode, and the adversarial terms against their formulas."""

import copy

import pytest
import torch

from engine import Engine
from methods.sassnet import LABELED, UNLABELED, SASSNet, critic_target, evaluating
from utils.schedules import rampup

ITERATION = 150  # of 200


@pytest.fixture
def build(tiny_options, tmp_path):
    def make(*flags: str) -> Engine:
        torch.manual_seed(0)
        options = tiny_options("sassnet", "--dropout", "0.5", *flags)
        engine = Engine(options, SASSNet(options), split=None, folder=tmp_path, device=torch.device("cpu"))
        engine.iteration = ITERATION
        engine.method.train()
        return engine

    return make


def changed(method, before: dict) -> set[str]:
    """Networks of which a parameter or buffer differs from a former state."""
    after = method.state_dict()
    return {key.split(".")[0] for key in after if not torch.equal(after[key], before[key])}


def test_no_turn_changes_or_reaches_the_other_player(build, make_batch):
    engine, batch = build(), make_batch(1, 1)
    method = engine.method
    for turn, own, other in zip(engine.turns, ("network", "critic"), ("critic", "network"), strict=True):
        method.zero_grad(set_to_none=True)
        before = copy.deepcopy(method.state_dict())
        engine._take_turn(turn, batch, rate=0.01)
        assert changed(method, before) == {own}
        assert all(parameter.grad is None for parameter in getattr(method, other).parameters())
        assert all(parameter.grad is not None for parameter in getattr(method, own).parameters())


def test_the_critic_keeps_its_own_rate(build, make_batch):
    engine = build("--lr_step", "10", "--critic_lr", "0.002")
    engine.step(make_batch())
    assert [turn.optimizer.param_groups[0]["lr"] for turn in engine.turns] == [pytest.approx(0.01 * 0.1**15), 0.002]
    assert build().turns[1].optimizer.param_groups[0]["lr"] == 1e-4


@pytest.mark.parametrize(("labeled", "unlabeled"), [(2, 2), (1, 3), (3, 1)])
def test_targets_follow_the_layout_of_the_batch(build, make_batch, labeled, unlabeled):
    batch = make_batch(labeled, unlabeled)
    assert critic_target(batch).tolist() == [LABELED] * labeled + [UNLABELED] * unlabeled
    terms = [turn.step(batch, ITERATION) for turn in build().turns]
    assert all(torch.isfinite(term) for turn in terms for term in turn.values())


def test_terms_are_those_of_the_public_code(build, make_batch):
    method, batch = build("--norm", "instance", "--dropout", "0").method, make_batch(1, 2)
    method.critic.dropout.p = 0.0
    terms = method.training_step(batch, ITERATION) | method.critic_step(batch, ITERATION)
    sdm = method.network(batch.image)["sdm"]
    verdict = method.critic(sdm, batch.image).log_softmax(dim=1)
    weight = 0.01 * rampup(ITERATION, 200)
    torch.testing.assert_close(terms["adversarial"], -weight * verdict[1:, LABELED].mean())
    said = [verdict[0, LABELED], verdict[1, UNLABELED], verdict[2, UNLABELED]]
    torch.testing.assert_close(terms["critic"], -torch.stack(said).mean())
    assert set(terms) == {"seg", "sdm", "adversarial", "critic"}


def test_only_maps_of_unlabeled_cases_are_to_deceive(build, make_batch):
    method, batch, maps = build().method, make_batch(), []
    method.network.register_forward_hook(lambda module, args, heads: maps.append(heads["sdm"]))
    terms = method.training_step(batch, ITERATION)
    (gradient,) = torch.autograd.grad(terms["adversarial"], maps)
    assert gradient[:2].abs().max() == 0 < gradient[2:].abs().max()


def test_modes_of_the_two_networks(build, make_batch):
    engine, seen = build(), []
    method = engine.method
    for name in ("network", "critic"):
        getattr(method, name).register_forward_hook(
            lambda module, *_, name=name: seen.append((name, module.training, torch.is_grad_enabled()))
        )
    engine.step(make_batch())
    # G learns in training mode and is judged without dropout; then it is looked at as it would be tested.
    assert seen == [("network", True, True), ("critic", False, True), ("network", False, False), ("critic", True, True)]
    assert all(module.training for module in method.modules())


def test_the_former_mode_comes_back_even_after_an_error():
    for training in (True, False):
        network = torch.nn.Sequential(torch.nn.Dropout()).train(training)
        with pytest.raises(RuntimeError), evaluating(network):
            assert not network[0].training
            raise RuntimeError
        assert network[0].training is training


def test_the_weight_goes_by_both_its_names(tiny_options):
    assert tiny_options("sassnet").consistency == 0.01
    assert tiny_options("sassnet", "--adv_weight", "0.001").consistency == 0.001
    assert tiny_options("sassnet", "--consistency", "0.015").consistency == 0.015
    weight = SASSNet(tiny_options("sassnet", "--adv_weight", "0.5")).consistency_weight(ITERATION)
    assert weight == 0.5 * rampup(ITERATION, 200)


def test_the_critic_grows_with_the_v_net_and_is_the_published_one_at_width_16(tiny_options):
    critic = SASSNet(tiny_options("sassnet", "--n_filters", "16")).critic
    assert sum(parameter.numel() for parameter in critic.parameters()) == 11_020_290
