"""The training loop: turns, precision, what stops it, what it saves."""

import contextlib
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import engine as engine_module
from dataloaders.split import Split
from engine import Engine, _gradient_norms
from inference.trained import load_networks
from methods.base import Method, Turn
from methods.dtml import DTML
from runtime import runs
from runtime.distributed import Ranks
from utils.constants import MIN_BF16_PATCH
from utils.errors import InputError
from utils.losses import dice_ce_loss
from utils.schedules import learning_rate

CPU = torch.device("cpu")
TINY = ("--n_filters", "2", "--batch_size", "2", "--max_iterations", "10")


class Toy(Method):
    """One convolution with dropout, and a number for the curves."""

    def __init__(self, options: Namespace):
        super().__init__(options)
        self.network = nn.Sequential(nn.Conv3d(1, 4, 1), nn.BatchNorm3d(4), nn.Dropout3d(0.5), nn.Conv3d(4, 1, 1))
        self.after: list[tuple[int, Tensor]] = []

    def training_step(self, batch, iteration):
        logits = self.network(batch.image)
        self.monitor["mean"] = logits.mean().detach()
        supervised = dice_ce_loss(logits[: batch.num_labeled], batch.label)
        return {"supervised": supervised, "size": 0.1 * logits.square().mean()}

    def after_step(self, iteration):
        self.after.append((iteration, self.network[0].weight.detach().clone()))

    def predict(self, image, outputs=None):
        return {"seg": torch.sigmoid(self.network(image))}


class TwoPlayers(Method):
    """A segmenter and a critic, each of whose terms reaches the other's parameters."""

    def __init__(self, options: Namespace):
        super().__init__(options)
        self.segmenter, self.critic = nn.Conv3d(1, 1, 1), nn.Conv3d(1, 1, 1)
        self.frozen = nn.Conv3d(1, 1, 1).requires_grad_(False)
        self.seen: list[dict] = []

    def turns(self):
        own = torch.optim.Adam(self.critic.parameters(), lr=1e-3)
        return [
            Turn("step", self.training_step, self.make_optimizer(self.segmenter.parameters())),
            Turn("critic", self.critic_step, own, scheduled=False),
        ]

    def _look(self, turn: str) -> None:
        parts = {"segmenter": self.segmenter, "critic": self.critic, "frozen": self.frozen}
        gradients = {name: part.weight.requires_grad for name, part in parts.items()}
        weights = {name: part.weight.detach().clone() for name, part in parts.items()}
        self.seen.append({"turn": turn, "gradients": gradients, "weights": weights, "training": self.training})

    def training_step(self, batch, iteration):
        self._look("step")
        return {"adversarial": self.critic(self.segmenter(self.frozen(batch.image))).square().mean()}

    def critic_step(self, batch, iteration):
        self._look("critic")
        return {"critic": (self.critic(self.segmenter(batch.image)) - 1).square().mean()}


@pytest.fixture
def make_engine(tiny_options, tmp_path) -> Callable[..., Engine]:
    """An engine of a method class, seeded, in the test's folder."""

    def build(cls: type[Method] = Toy, *flags: str) -> Engine:
        options = tiny_options("dtml" if issubclass(cls, DTML) else "supervised", *TINY, *flags)
        runs.seed_everything(options.seed)
        return Engine(options, cls(options), Split(["a", "b"], ["c"], []), tmp_path, CPU)

    return build


@pytest.fixture
def batch(make_batch):
    return make_batch(labeled=1, unlabeled=1)


class Listener:
    """Takes the place of a journal."""

    def __init__(self):
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def weights(method: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in method.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# --- one step


def test_a_step_minimises_the_sum_of_the_terms_and_reports_each(make_engine, batch):
    engine = make_engine()
    reference = make_engine().method
    torch.manual_seed(3)
    reference.train()
    terms = reference.training_step(batch, 0)
    sum(terms.values()).backward()
    terms = {name: float(term.detach()) for name, term in terms.items()}
    options = engine.options
    sgd = torch.optim.SGD(reference.parameters(), lr=options.base_lr, momentum=0.9, weight_decay=options.weight_decay)
    sgd.step()
    torch.manual_seed(3)
    values = engine.step(batch)
    assert_equal(weights(engine.method), weights(reference))
    assert set(values) == {"learning_rate", "loss/supervised", "loss/size", "mean"}
    assert {name: values[f"loss/{name}"] for name in terms} == terms
    assert engine.iteration == 1


def test_gradient_norms_of_each_term_are_logged_when_asked_for(make_engine, batch):
    reference = make_engine().method.train()
    torch.manual_seed(3)
    reference.training_step(batch, 0)["size"].backward()
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in reference.parameters()))
    engine = make_engine(Toy, "--log_gradients", "--log_every", "2")
    engine.iteration = 1
    torch.manual_seed(3)
    values = engine.step(batch)
    assert values["gradient/size"] == pytest.approx(expected, rel=1e-5) and values["gradient/supervised"] > 0
    assert not any(name.startswith("gradient/") for name in engine.step(batch))  # not due


def test_gradient_norms_are_not_those_that_half_precision_rounds_to_nothing():
    weight = torch.nn.Parameter(torch.tensor(1.0))
    turn = Turn("model", None, torch.optim.SGD([weight], 0.1))
    term = 1e-8 * weight.half().float()  # its gradient passes through float16, whose smallest number is 6e-8
    assert _gradient_norms({"a": term}, turn, 1.0)["gradient/a"] == 0
    assert _gradient_norms({"a": term}, turn, 2.0**16)["gradient/a"] == pytest.approx(1e-8, rel=1e-3)


def test_gradient_norms_change_nothing_and_are_those_of_the_player(make_engine, batch):
    for cls in (Toy, TwoPlayers):
        plain, logging = make_engine(cls), make_engine(cls, "--log_gradients", "--log_every", "1")
        for engine in (plain, logging):
            torch.manual_seed(3)
            values = engine.step(batch)
        assert_equal(weights(plain.method), weights(logging.method))
    engine = make_engine(TwoPlayers, "--log_gradients", "--log_every", "1")
    own = [engine.method.segmenter.weight, engine.method.segmenter.bias]
    grads = torch.autograd.grad(engine.method.training_step(batch, 0)["adversarial"], own)
    expected = math.sqrt(sum(float(g.square().sum()) for g in grads))
    assert engine.step(batch)["gradient/adversarial"] == pytest.approx(expected, rel=1e-5)
    assert values["gradient/critic"] > 0


def test_the_rate_of_the_schedule_reaches_the_optimizer(make_engine, batch):
    engine = make_engine(Toy, "--lr_schedule", "cosine", "--warmup", "3")
    for iteration in range(5):
        values = engine.step(batch)
        assert values["learning_rate"] == learning_rate(iteration, engine.options)
        assert engine.turns[0].optimizer.param_groups[0]["lr"] == values["learning_rate"]


def test_after_step_comes_last_and_numbers_of_the_last_iteration_are_forgotten(make_engine, batch):
    engine = make_engine()
    engine.method.monitor["stale"] = 1.0
    assert "stale" not in engine.step(batch)
    (iteration, seen), *_ = engine.method.after
    assert iteration == 0 and torch.equal(seen, engine.method.network[0].weight)


def test_gradients_are_open_only_for_the_player_whose_turn_it_is(make_engine, batch):
    engine = make_engine(TwoPlayers)
    for _ in range(2):
        engine.step(batch)
    for look in engine.method.seen:
        mine = "segmenter" if look["turn"] == "step" else "critic"
        assert look["gradients"] == {name: name == mine for name in ("segmenter", "critic", "frozen")}
        assert look["training"]
    first, second, third, _ = (look["weights"] for look in engine.method.seen)
    assert not torch.equal(first["segmenter"], second["segmenter"])  # moved by its own turn
    assert torch.equal(first["critic"], second["critic"])  # and the critic not
    assert not torch.equal(second["critic"], third["critic"])
    assert torch.equal(second["segmenter"], third["segmenter"])
    assert torch.equal(first["frozen"], engine.method.frozen.weight)


def test_a_player_gets_no_gradient_from_the_others_turn(make_engine, batch, monkeypatch):
    engine = make_engine(TwoPlayers)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    engine.step(batch)
    assert engine.method.critic.weight.grad is not None
    fresh = make_engine(TwoPlayers)
    fresh._take_turn(fresh.turns[0], batch, 0.01)
    assert torch.equal(engine.method.segmenter.weight.grad, fresh.method.segmenter.weight.grad)
    assert fresh.method.critic.weight.grad is None


def test_a_critic_keeps_its_own_rate(make_engine, batch):
    engine = make_engine(TwoPlayers, "--base_lr", "0.5")
    values = engine.step(batch)
    assert [turn.optimizer.param_groups[0]["lr"] for turn in engine.turns] == [0.5, 1e-3]
    assert {"loss/adversarial", "loss/critic"} <= set(values)


# --- precision


class Looks(DTML):
    """DTML that remembers in which types its networks computed and what it minimised."""

    def training_step(self, batch, iteration):
        types = self.types = {}

        def look(name: str):
            return lambda layer, inputs, output: types.update({name: output.dtype})

        self.m_d.encoder[1].register_forward_hook(look("trunk"))
        self.m_d.heads["sdm"].register_forward_hook(look("head"))
        terms = super().training_step(batch, iteration)
        types |= {name: term.dtype for name, term in terms.items()}
        return terms


@pytest.fixture
def wide_batch(make_batch):
    """As small as bf16 may be on a CPU."""
    return make_batch(labeled=1, unlabeled=1, size=MIN_BF16_PATCH)


def test_in_mixed_precision_the_trunk_is_low_and_transform_and_losses_are_not(make_engine, wide_batch):
    engine = make_engine(Looks, "--amp", "bf16")
    values = engine.step(wide_batch)
    types = engine.method.types
    assert types.pop("trunk") == torch.bfloat16
    assert set(types) >= {"head", "seg", "mask", "consistency"} and set(types.values()) == {torch.float32}
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in engine.method.parameters())
    assert all(math.isfinite(value) for value in values.values())


def test_mixed_precision_gives_nearly_the_same_losses(make_engine, wide_batch):
    flags = ("--dropout", "0", "--sdm_k", "5")  # a soft transform, lest L_mask be 1 in both
    exact = make_engine(DTML, *flags).step(wide_batch)
    rough = make_engine(DTML, *flags, "--amp", "bf16").step(wide_batch)
    for name in ("loss/seg", "loss/mask"):
        torch.testing.assert_close(rough[name], exact[name], rtol=0.02, atol=0)
        assert rough[name] != exact[name]


@pytest.fixture
def make_scaled(make_engine, monkeypatch) -> Callable[[], Engine]:
    """Two players that step as in fp16, with `float32`, as a CPU has no fp16."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=1024.0))
    return lambda: make_engine(TwoPlayers, "--amp", "fp16")


@pytest.fixture
def float32(monkeypatch):
    monkeypatch.setattr(engine_module, "precision", lambda device, amp: contextlib.nullcontext())


@pytest.mark.parametrize(("overflows", "after"), [("step", []), ("critic", [0])])
def test_a_player_that_overflows_skips_its_own_step_only(make_scaled, batch, monkeypatch, float32, overflows, after):
    """Its scale is halved and the step counted; without a move of the network, the teacher has nothing to follow."""
    engine, called = make_scaled(), []
    monkeypatch.setattr(engine.method, "after_step", called.append)
    turn = next(turn for turn in engine.turns if turn.name == overflows)
    step = turn.step
    turn.step = lambda *a: {name: 1e38 * term for name, term in step(*a).items()}  # finite, but not when scaled
    before = weights(engine.method)
    values = engine.step(batch)
    moved = {name.split(".")[0] for name, value in engine.method.state_dict().items() if not value.equal(before[name])}
    assert moved == ({"critic"} if overflows == "step" else {"segmenter"})
    assert {name: scaler.get_scale() for name, scaler in engine.scalers.items()} == {
        name: 512.0 if name == overflows else 1024.0 for name in ("step", "critic")
    }
    assert values["skipped_steps"] == 1 and called == after


def test_a_resumed_run_keeps_the_scale_of_each_player(make_scaled, batch, tmp_path, float32):
    engine = make_scaled()
    engine.step(batch)
    engine.scalers["critic"].update(256.0)
    engine.skipped = 2
    engine.save(runs.LAST)
    resumed = make_scaled()
    resumed.load(runs.load_checkpoint(tmp_path / runs.LAST))
    assert [scaler.get_scale() for scaler in resumed.scalers.values()] == [1024.0, 256.0]
    assert resumed.step(batch)["skipped_steps"] == 2


# --- what stops a run


def broken(batch, value: float):
    return replace(batch, image=torch.full_like(batch.image, value))


def test_the_first_loss_that_is_not_finite_is_named_and_never_saved(make_engine, batch, tmp_path):
    engine = make_engine()
    engine.step(batch)
    engine.check_losses()
    engine.step(broken(batch, math.nan))
    engine.step(batch)  # the weights are lost by now
    with pytest.raises(InputError) as error:
        engine.save(runs.LAST)
    for words in ("iteration 2", "supervised = nan", "size = nan", "case0, case1", "--base_lr"):
        assert words in str(error.value)
    assert not (tmp_path / runs.LAST).exists()


def test_the_stop_names_the_last_good_checkpoint(make_engine, batch, tmp_path):
    engine = make_engine()
    engine.step(batch)
    engine.save(runs.LAST)
    engine.step(broken(batch, math.inf))
    with pytest.raises(InputError, match=str(tmp_path / runs.LAST)):
        engine.check_losses()


def test_one_term_that_is_not_finite_is_enough(make_engine, batch, monkeypatch):
    engine = make_engine()
    step = engine.method.training_step
    monkeypatch.setattr(engine.turns[0], "step", lambda *a: step(*a) | {"extra": torch.tensor(-math.inf)})
    engine.step(batch)
    with pytest.raises(InputError, match="extra = -inf"):
        engine.check_losses()


def test_weights_that_are_not_finite_never_reach_a_checkpoint(make_engine, batch, tmp_path):
    engine = make_engine()
    engine.step(batch)
    engine.save(runs.LAST)
    good = (tmp_path / runs.LAST).read_bytes()
    with torch.no_grad():
        engine.method.network[0].weight[0] = math.nan  # as after a finite loss with an infinite gradient
    with pytest.raises(InputError, match="network.0.weight"):
        engine.save(runs.LAST)
    assert (tmp_path / runs.LAST).read_bytes() == good


# --- checkpoints


def test_a_checkpoint_holds_all_that_a_resumed_run_needs(make_engine, batch, tmp_path):
    engine = make_engine()
    for _ in range(3):
        engine.step(batch)
    engine.seconds, engine.best_val = 12.5, 0.75
    engine.save(runs.LAST)
    expected = [engine.step(batch) for _ in range(2)]
    state = runs.load_checkpoint(tmp_path / runs.LAST)
    assert state["cases"] == {"labeled": ["a", "b"], "unlabeled": ["c"], "validation": []}
    resumed = make_engine()
    torch.rand(7)  # whatever was drawn in between must not matter
    resumed.load(state)
    assert (resumed.iteration, resumed.seconds, resumed.best_val) == (3, 12.5, 0.75)
    assert [resumed.step(batch) for _ in range(2)] == expected
    assert_equal(weights(resumed.method), weights(engine.method))


def test_rank_0_alone_saves(make_engine, tmp_path):
    engine = make_engine()
    for engine.ranks in (Ranks(1, 2), Ranks(0, 2)):
        assert not (tmp_path / runs.LAST).exists()
        engine.save(runs.LAST)
    assert runs.load_checkpoint(tmp_path / runs.LAST)["world_size"] == 2


def test_both_players_are_resumed(make_engine, batch, tmp_path):
    engine = make_engine(TwoPlayers)
    engine.step(batch)
    engine.save(runs.LAST)
    engine.step(batch)
    resumed = make_engine(TwoPlayers)
    resumed.load(runs.load_checkpoint(tmp_path / runs.LAST))
    resumed.step(batch)
    assert_equal(weights(resumed.method), weights(engine.method))


def test_a_run_may_be_resumed_in_another_precision(make_engine, batch, tmp_path):
    engine = make_engine()
    engine.save(runs.LAST)
    resumed = make_engine()
    resumed.scalers = {"step": torch.amp.GradScaler("cpu", enabled=True)}
    resumed.load(runs.load_checkpoint(tmp_path / runs.LAST))
    resumed.step(batch)


def test_weights_of_another_network_are_bad_input(make_engine, tmp_path):
    make_engine().save(runs.LAST)
    state = runs.load_checkpoint(tmp_path / runs.LAST)
    with pytest.raises(InputError, match=str(tmp_path / runs.LAST)):
        load_networks(make_engine(TwoPlayers).method, state, tmp_path / runs.LAST)


# --- pace


def announced(make_engine, seconds: float, *flags: str) -> list[str]:
    """With the pace of three steps after one of warm-up."""
    engine, listener = make_engine(Toy, *flags), Listener()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine_module.PACE, "cpu", (1, 4))
        for iteration in range(1, 30):
            engine.iteration, engine.seconds = iteration, engine.seconds + (100.0 if iteration == 1 else seconds)
            engine._announce_pace(listener)
    return listener.lines


def test_the_pace_is_announced_once_and_without_the_warm_up(make_engine):
    (line,) = announced(make_engine, 2.0, "--max_iterations", "1804")
    for words in ("2.00 s per iteration", "1:00:00 left", "until about 20", "peak memory", "GiB"):
        assert words in line


def test_days_on_a_cpu_are_said_as_days_and_lead_to_the_cpu_preset(make_engine):
    _, warning = announced(make_engine, 60.0, "--preset", "paper", "--max_iterations", "6004")
    assert "4.2 days" in warning and "--preset cpu" in warning
    assert len(announced(make_engine, 10.0, "--preset", "paper", "--max_iterations", "6004")) == 1
    assert len(announced(make_engine, 60.0, "--preset", "cpu", "--max_iterations", "6004")) == 1


def test_the_pace_has_a_warm_up_on_every_device():
    assert all(0 <= warm_up < timed for warm_up, timed in engine_module.PACE.values())
    assert set(engine_module.PACE) == {"cpu", "cuda"}


def test_what_is_due(make_engine):
    engine = make_engine(Toy, "--max_iterations", "25")
    due = []
    for engine.iteration in range(1, 26):
        due += [engine.iteration] if engine._due(10) else []
        assert not engine._due(0)
    assert due == [10, 20, 25]


@pytest.mark.slow  # the compiler takes about a minute
def test_compiled_networks_train_and_predict_alike(make_engine, batch):
    flags = ("--dropout", "0", "--sdm_k", "5")
    plain, compiled = make_engine(DTML, *flags), make_engine(DTML, *flags, "--compile")
    assert compiled.method.m_s._compiled_call_impl is not None
    expected, values = plain.step(batch), compiled.step(batch)
    for name in ("loss/seg", "loss/mask"):
        torch.testing.assert_close(values[name], expected[name], rtol=1e-3, atol=0)
    assert weights(compiled.method).keys() == weights(plain.method).keys()
    compiled.method.eval(), plain.method.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            compiled.method.predict(batch.image)["seg"], plain.method.predict(batch.image)["seg"], rtol=1e-2, atol=1e-2
        )
