"""ASDNet: who learns what from whom, when the unlabeled term sets in, and the terms against their formulas."""

import copy
import math

import pytest
import torch

from engine import Engine
from methods.asdnet import ASDNet
from utils.errors import InputError
from utils.losses import attention_dice_loss, dice_ce_loss
from utils.schedules import rampup

ITERATION = 150  # of 200; the unlabeled term starts at 50


@pytest.fixture
def build(tiny_options, tmp_path):
    def make(*flags: str) -> Engine:
        torch.manual_seed(0)
        options = tiny_options("asdnet", *flags)
        engine = Engine(options, ASDNet(options), split=None, folder=tmp_path, device=torch.device("cpu"))
        engine.iteration = ITERATION
        engine.method.train()
        return engine

    return make


class FixedCritic(torch.nn.Module):
    """Answers with given logits, and remembers what it was asked."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits, self.asked = logits, []

    def forward(self, prob: torch.Tensor) -> torch.Tensor:
        self.asked.append(prob)
        return self.logits[: len(prob)].expand(-1, 1, *prob.shape[2:])


def half_trusted(size: int = 32) -> torch.Tensor:
    """Logits of confidence 0.6 in the first half of each volume and 0.4 in the other, (4, 1, W, H, D)."""
    logits = torch.full((4, 1, size, size, size), math.log(0.4 / 0.6))
    logits[:, :, : size // 2] *= -1
    return logits


def test_no_turn_changes_or_reaches_the_other_player(build, make_batch):
    engine, batch = build(), make_batch(1, 1)
    method = engine.method
    for turn, own, other in zip(engine.turns, ("network", "critic"), ("critic", "network"), strict=True):
        method.zero_grad(set_to_none=True)
        before = copy.deepcopy(method.state_dict())
        engine._take_turn(turn, batch, rate=0.01)
        after = method.state_dict()
        assert {key.split(".")[0] for key in after if not torch.equal(after[key], before[key])} == {own}
        assert all(parameter.grad is None for parameter in getattr(method, other).parameters())
        assert all(parameter.grad is not None for parameter in getattr(method, own).parameters())


@pytest.mark.parametrize(("labeled", "unlabeled"), [(2, 2), (1, 3)])
def test_terms_are_those_of_the_formulas(build, make_batch, labeled, unlabeled):
    method, batch = build("--norm", "instance", "--gamma", "0.45").method, make_batch(labeled, unlabeled)
    terms = method.training_step(batch, ITERATION)
    logits = method.network(batch.image)["softmax"]
    prob = logits.softmax(dim=1)
    confidence = method.critic(prob).sigmoid()
    torch.testing.assert_close(terms["supervised"], dice_ce_loss(logits[:labeled], batch.label))
    torch.testing.assert_close(terms["adversarial"], -0.03 * confidence.log().mean())  # labeled and unlabeled
    trusted, own = (confidence > 0.45).float()[labeled:], prob[labeled:, 1:]
    assert 0 < trusted.mean() < 1
    target = (own > 0.5).float()
    overlap = 2 * (trusted * own * target).sum()
    dice = overlap / ((trusted * own.square()).sum() + (trusted * target).sum())
    torch.testing.assert_close(terms["semi"], 0.3 * rampup(100, 150) * (1 - dice), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method.monitor["trusted_voxels"], trusted.mean())

    critic = method.critic_step(batch, ITERATION)
    real = method.critic(torch.cat((1 - batch.label, batch.label), dim=1)).sigmoid()
    fake = method.critic(prob[:labeled]).sigmoid()  # labeled cases only
    torch.testing.assert_close(critic["critic_real"], -real.log().mean())
    torch.testing.assert_close(critic["critic_fake"], -(1 - fake).log().mean())


@pytest.mark.parametrize(("flags", "start"), [([], 50), (["--semi_start", "20"], 20), (["--semi_start", "0"], 0)])
def test_the_unlabeled_term_sets_in_at_its_start_and_ramps_from_there(build, make_batch, flags, start):
    method, batch = build(*flags).method, make_batch()
    method.critic = FixedCritic(half_trusted())
    if start:
        assert set(method.training_step(batch, start - 1)) == {"supervised", "adversarial"}
        assert "consistency_weight" not in method.monitor
    assert set(method.training_step(batch, start)) == {"supervised", "adversarial", "semi"}
    assert method.monitor["consistency_weight"] == pytest.approx(0.3 * math.exp(-5))
    method.training_step(batch, (start + 200) // 2)
    assert method.monitor["consistency_weight"] == pytest.approx(0.3 * math.exp(-5 / 4))
    method.training_step(batch, 199)
    assert method.monitor["consistency_weight"] == pytest.approx(0.3, rel=1e-3)


def test_a_ramp_given_by_hand_counts_from_the_start(build, make_batch):
    method = build("--consistency_rampup", "0.5", "--semi_start", "20").method  # 0.5 x 150 iterations
    method.critic = FixedCritic(half_trusted())
    method.training_step(make_batch(), 20 + 75)
    assert method.monitor["consistency_weight"] == pytest.approx(0.3)


@pytest.mark.parametrize("loss", ["dice", "nll"])
def test_the_unlabeled_term_trains_on_trusted_voxels_of_unlabeled_cases_only(build, make_batch, loss):
    method, batch, seen = build("--semi_loss", loss).method, make_batch(), []
    method.critic = FixedCritic(half_trusted())
    method.network.register_forward_hook(lambda module, args, heads: seen.append(heads["softmax"]))
    terms = method.training_step(batch, ITERATION)
    (gradient,) = torch.autograd.grad(terms["semi"], seen)
    assert gradient[:2].abs().max() == 0  # labeled
    assert gradient[2:, :, 16:].abs().max() == 0 < gradient[2:, :, :16].abs().max()
    assert method.monitor["trusted_voxels"] == 0.5


def test_the_log_likelihood_is_a_mean_over_trusted_voxels(build, make_batch):
    method, batch = build("--semi_loss", "nll", "--norm", "instance").method, make_batch()
    method.critic = FixedCritic(half_trusted())
    semi = method.training_step(batch, ITERATION)["semi"]
    log_prob = method.network(batch.image)["softmax"].log_softmax(dim=1)
    expected = -log_prob[2:, :, :16].max(dim=1).values.mean()  # of the class that the network itself prefers
    torch.testing.assert_close(semi, 0.3 * rampup(100, 150) * expected)


@pytest.mark.parametrize("loss", ["dice", "nll"])
def test_without_a_trusted_voxel_the_term_is_zero(build, make_batch, loss):
    method = build("--semi_loss", loss, "--gamma", "0.7").method
    method.critic = FixedCritic(half_trusted())
    semi = method.training_step(make_batch(), ITERATION)["semi"]
    semi.backward()
    assert semi == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in method.network.parameters())


def test_the_segmenter_is_evaluated_once_and_the_critic_sees_that_result(build, make_batch):
    engine, batch, seen = build("--dropout", "0.5"), make_batch(), []
    method = engine.method
    method.network.register_forward_hook(lambda module, args, heads: seen.append(heads["softmax"].softmax(dim=1)))
    asked = []
    method.critic.register_forward_hook(lambda module, args, logits: asked.append(args[0]))
    engine.step(batch)
    assert len(seen) == 1
    prob = seen[0].detach()
    for given, expected in zip(asked, (prob, torch.cat((1 - batch.label, batch.label), dim=1), prob[:2]), strict=True):
        torch.testing.assert_close(given, expected)
    assert [given.requires_grad for given in asked] == [True, False, False]
    assert method._segmented is None  # nothing is kept until the next iteration


def test_the_critic_sees_the_image_if_asked_to(build, make_batch):
    engine, batch, asked = build("--critic_image"), make_batch(), []
    engine.method.critic.register_forward_hook(lambda module, args, logits: asked.append(args[0]))
    engine.step(batch)
    assert [len(given) for given in asked] == [4, 2, 2]  # S's turn on all cases; truth and segmentation of the labeled
    assert all(torch.equal(given[:, 2:], batch.image[: len(given)]) for given in asked)
    assert torch.equal(asked[1][:, 1:2], batch.label)


def test_attention_dice_by_its_flag(build, make_batch):
    batch = make_batch()
    method = build("--sup_loss", "att_dice", "--att_beta", "1.5", "--norm", "instance").method
    loss = method.training_step(batch, 0)["supervised"]
    prob = method.network(batch.image)["softmax"].softmax(dim=1)[:2, 1:]
    torch.testing.assert_close(loss, attention_dice_loss(prob, batch.label, 1.5))


def test_weights_and_rates_are_flags(build, make_batch):
    batch = make_batch()
    plain, scaled = (
        build(*flags) for flags in ([], ["--adv_weight", "0.06", "--critic_lr", "0.002", "--lr_step", "10"])
    )
    adversarial = [engine.method.training_step(batch, 0)["adversarial"] for engine in (plain, scaled)]
    torch.testing.assert_close(adversarial[1], 2 * adversarial[0])
    scaled.step(batch)
    assert [turn.optimizer.param_groups[0]["lr"] for turn in scaled.turns] == [pytest.approx(0.01 * 0.1**15), 0.002]
    assert plain.turns[1].optimizer.param_groups[0]["lr"] == 1e-4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gamma", "1.5"], "--gamma"),
        (["--semi_start", "-1"], "--semi_start"),
    ],
)
def test_bad_input_is_one_sentence(tiny_options, flags, message):
    with pytest.raises(InputError, match=message):
        ASDNet(tiny_options("asdnet", *flags))


def test_the_critic_grows_with_the_v_net_and_has_the_published_width_at_16(tiny_options):
    critic = ASDNet(tiny_options("asdnet", "--n_filters", "16")).critic
    assert critic.stem.out_channels == 32
