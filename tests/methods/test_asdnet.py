"""ASDNet: the terms against their formulas, when the unlabeled one sets in, and what the critic sees."""

import math

import pytest
import torch

from utils.errors import InputError
from utils.losses import attention_dice_loss, dice_ce_loss
from utils.schedules import rampup

ITERATION = 150  # of 200; the unlabeled term starts at 50


class FixedCritic(torch.nn.Module):
    """Confidence 0.6 in the first half of each crop and 0.4 in the other, whatever it is asked."""

    def forward(self, prob: torch.Tensor) -> torch.Tensor:
        logits = torch.full_like(prob[:, :1], math.log(0.4 / 0.6))
        logits[:, :, : prob.shape[2] // 2] *= -1
        return logits


@pytest.fixture
def half_trusted(build):
    def make(*flags: str):
        method = build("asdnet", *flags)
        method.critic = FixedCritic()
        return method

    return make


@pytest.mark.parametrize(("labeled", "unlabeled", "classes"), [(2, 2, 1), (1, 3, 1), (2, 2, 2)])
def test_terms_are_those_of_the_formulas(build, make_batch, labeled, unlabeled, classes):
    flags = "--norm instance --gamma 0.45 --adv_weight 0.06 --num_classes".split()
    method, batch = build("asdnet", *flags, str(classes)), make_batch(labeled, unlabeled, classes=classes)
    with torch.no_grad():  # so that every class is preferred somewhere
        method.network.heads["softmax"].bias -= method.network(batch.image)["softmax"].mean(dim=(0, 2, 3, 4))
    terms = method.training_step(batch, ITERATION)
    logits = method.network(batch.image)["softmax"]
    prob = logits.softmax(dim=1)
    confidence = method.critic(prob).sigmoid()
    torch.testing.assert_close(terms["supervised"], dice_ce_loss(logits[:labeled], batch.label))
    torch.testing.assert_close(terms["adversarial"], -0.06 * confidence.log().mean())  # labeled and unlabeled
    trusted, own = (confidence > 0.45).float()[labeled:], prob[labeled:, 1:]
    assert 0 < trusted.mean() < 1
    preferred, dice = prob[labeled:].argmax(dim=1, keepdim=True), []
    for number in range(classes):
        p, target = own[:, number : number + 1], (preferred == number + 1).float()
        assert (trusted * target).sum() > 0
        overlap = 2 * (trusted * p * target).sum()
        dice.append(overlap / ((trusted * p.square()).sum() + (trusted * target).sum()))
    semi = 1 - sum(dice) / classes
    torch.testing.assert_close(terms["semi"], 0.3 * rampup(100, 150) * semi, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method.monitor["trusted_voxels"], trusted.mean())

    critic = method.critic_step(batch, ITERATION)
    background = 1 - batch.label.sum(dim=1, keepdim=True)
    real = method.critic(torch.cat((background, batch.label), dim=1)).sigmoid()
    fake = method.critic(prob[:labeled]).sigmoid()  # labeled cases only
    torch.testing.assert_close(critic["critic_real"], -real.log().mean())
    torch.testing.assert_close(critic["critic_fake"], -(1 - fake).log().mean())


@pytest.mark.parametrize(("flags", "start"), [([], 50), (["--semi_start", "20"], 20), (["--semi_start", "0"], 0)])
def test_the_unlabeled_term_sets_in_at_its_start_and_ramps_from_there(half_trusted, make_batch, flags, start):
    method, batch = half_trusted(*flags), make_batch(1, 1)
    if start:
        assert set(method.training_step(batch, start - 1)) == {"supervised", "adversarial"}
        assert "consistency_weight" not in method.monitor
    assert set(method.training_step(batch, start)) == {"supervised", "adversarial", "semi"}
    for iteration, weight in ((start, math.exp(-5)), ((start + 200) // 2, math.exp(-5 / 4)), (200, 1)):
        assert method.consistency_weight(iteration) == pytest.approx(0.3 * weight)


def test_a_start_that_the_run_does_not_reach_is_refused(build):
    for total, start in (("100", "99"), ("0", "5"), ("1", "0")):  # 0 iterations save the initial weights alone
        build("asdnet", "--max_iterations", total, "--semi_start", start)
    for start in ("100", "150"):
        with pytest.raises(InputError, match=f"--semi_start {start}.*--max_iterations 100"):
            build("asdnet", "--max_iterations", "100", "--semi_start", start)


def test_a_ramp_of_given_length_counts_from_the_start(half_trusted):
    method = half_trusted("--consistency_rampup", "0.5", "--semi_start", "20")  # 0.5 x 150 iterations
    assert method.consistency_weight(20 + 74) < method.consistency_weight(20 + 75) == pytest.approx(0.3)


@pytest.mark.parametrize("loss", ["dice", "nll"])
def test_the_unlabeled_term_trains_on_trusted_voxels_of_unlabeled_cases_only(half_trusted, make_batch, loss):
    method, batch, seen = half_trusted("--semi_loss", loss), make_batch(), []
    method.network.register_forward_hook(lambda module, args, heads: seen.append(heads["softmax"]))
    terms = method.training_step(batch, ITERATION)
    (gradient,) = torch.autograd.grad(terms["semi"], seen)
    assert gradient[:2].abs().max() == 0  # labeled
    assert gradient[2:, :, 16:].abs().max() == 0 < gradient[2:, :, :16].abs().max()
    assert method.monitor["trusted_voxels"] == 0.5


@pytest.mark.parametrize("classes", [1, 2])
def test_the_log_likelihood_is_a_mean_over_trusted_voxels(half_trusted, make_batch, classes):
    flags = "--semi_loss nll --norm instance --num_classes".split()
    method, batch = half_trusted(*flags, str(classes)), make_batch(classes=classes)
    semi = method.training_step(batch, ITERATION)["semi"]
    log_prob = method.network(batch.image)["softmax"].log_softmax(dim=1)
    expected = -log_prob[2:, :, :16].max(dim=1).values.mean()  # of the class that the network itself prefers
    torch.testing.assert_close(semi, 0.3 * rampup(100, 150) * expected)


@pytest.mark.parametrize("loss", ["dice", "nll"])
def test_without_a_trusted_voxel_the_term_is_zero(half_trusted, make_batch, loss):
    method = half_trusted("--semi_loss", loss, "--gamma", "0.7")
    semi = method.training_step(make_batch(1, 1), ITERATION)["semi"]
    semi.backward()
    assert semi == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in method.network.parameters())


def test_the_segmenter_is_evaluated_once_and_the_critic_sees_that_result(build_engine, make_batch):
    engine, batch, seen, asked = build_engine("asdnet", "--dropout", "0.5"), make_batch(), [], []
    method = engine.method
    method.network.register_forward_hook(lambda module, args, heads: seen.append(heads["softmax"].softmax(dim=1)))
    method.critic.register_forward_hook(lambda module, args, logits: asked.append(args[0]))
    engine.step(batch)
    assert len(seen) == 1
    prob = seen[0].detach()
    for given, expected in zip(asked, (prob, torch.cat((1 - batch.label, batch.label), dim=1), prob[:2]), strict=True):
        torch.testing.assert_close(given, expected)
    assert [given.requires_grad for given in asked] == [True, False, False]
    assert method._segmented is None  # nothing is kept until the next iteration


def test_attention_dice_by_its_flag(build, make_batch):
    batch = make_batch()
    method = build("asdnet", "--sup_loss", "att_dice", "--att_beta", "1.5", "--norm", "instance")
    loss = method.training_step(batch, 0)["supervised"]
    prob = method.network(batch.image)["softmax"].softmax(dim=1)[:2, 1:]
    torch.testing.assert_close(loss, attention_dice_loss(prob, batch.label, 1.5))


def test_the_critic_grows_with_the_v_net_and_has_the_published_width_at_16(build):
    assert build("asdnet", "--n_filters", "16").critic.stem.out_channels == 32
