"""What processes tell each other, and that they train as one: forked here, started by torchrun elsewhere."""

import copy
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dataloaders.split import Split
from engine import Engine
from methods import METHODS
from runtime import distributed, runs
from runtime.distributed import ALONE, LOST, Ranks, joined
from utils.errors import InputError
from utils.schedules import learning_rate

CPU = torch.device("cpu")
SIZE = 2
NO_CASES = Split([], [], [])
QUICKER = {"mc_passes": 2}  # for the methods that have such a flag


def values(outcomes) -> list:
    assert [outcome.status for outcome in outcomes] == [0] * len(outcomes), [outcome.output for outcome in outcomes]
    return [outcome.value for outcome in outcomes]


# --- alone


def test_without_torchrun_there_is_one_rank_that_leads(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as ranks:
        assert ranks is ALONE and ranks.leads
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun --nproc_per_node 1
    with joined() as ranks:
        assert ranks is ALONE


def test_alone_nothing_changes():
    layer = nn.BatchNorm3d(2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1)
    layer.weight.grad = torch.tensor([1.0, 2.0])
    before, numbers, drawn = copy.deepcopy(layer.state_dict()), {"a": torch.tensor(1.0)}, torch.get_rng_state()
    ALONE.average_gradients(optimizer), ALONE.share_weights(layer), ALONE.share_buffers(layer), ALONE.draw_anew(1, 2)
    assert layer.weight.grad.tolist() == [1, 2] and layer.bias.grad is None
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    assert ALONE.mean(numbers) is numbers and ALONE.largest(3) == 3
    assert ALONE.from_leader(lambda: "x") == "x" and ALONE.to_leader("x") == ["x"]
    with ALONE.leader_first():
        ALONE.barrier()
    assert torch.equal(torch.get_rng_state(), drawn)


# --- together


def talk() -> dict:
    with joined() as ranks:
        calls: list[str] = []
        entered = time.monotonic()
        with ranks.leader_first():
            if ranks.leads:
                time.sleep(0.2)
            waited = time.monotonic() - entered
        layer = nn.Linear(3, 2)
        with torch.no_grad():
            layer.weight.fill_(ranks.rank), layer.bias.fill_(10 + ranks.rank)
        layer.register_buffer("statistic", torch.full((3,), 5.0 + ranks.rank))
        layer.register_buffer("counter", torch.tensor(ranks.rank))
        ranks.share_buffers(layer)
        buffers = {name: buffer.tolist() for name, buffer in layer.named_buffers()}
        only_buffers = float(layer.weight[0, 0]) == ranks.rank
        ranks.share_weights(layer)
        return {
            "who": (ranks.rank, ranks.size, ranks.local_rank, ranks.local_size, ranks.leads),
            "from_leader": ranks.from_leader(lambda: calls.append("x") or f"made by {ranks.rank}"),
            "calls": len(calls),
            "to_leader": ranks.to_leader(f"of {ranks.rank}"),
            "largest": (ranks.largest(15 * ranks.rank), ranks.largest(0)),
            "mean": ranks.mean({"a": 1.0 + ranks.rank, "b": torch.tensor(3.0 * ranks.rank)}),
            "waited": waited,
            "buffers": buffers,
            "only_buffers": only_buffers,
            "weights": [float(layer.weight[0, 0]), float(layer.bias[0])],
        }


def test_what_ranks_tell_each_other(in_ranks):
    first, second = values(in_ranks(talk))
    assert first["who"] == (0, 2, 0, 2, True) and second["who"] == (1, 2, 1, 2, False)
    for told in (first, second):
        assert told["from_leader"] == "made by 0" and told["largest"] == (15, 0)
        assert told["mean"] == {"a": 1.5, "b": 1.5}
        assert told["buffers"]["statistic"] == [5, 5, 5] and told["only_buffers"]
        assert told["weights"] == [0, 10]
        assert told["waited"] > 0.1  # the leader in the block, the other before it
    assert (first["calls"], second["calls"]) == (1, 0)
    assert (first["to_leader"], second["to_leader"]) == (["of 0", "of 1"], None)


# --- training


@pytest.fixture(scope="module")
def build(tiny_options):
    """An engine at the last but one iteration, where ramps are high and delayed terms have set in."""

    def make(name: str, *flags: str, ranks: Ranks = ALONE) -> Engine:
        runs.seed_everything(0)
        options = tiny_options(name, "--batch_size", "2", "--n_filters", "2", *flags)
        vars(options).update({key: value for key, value in QUICKER.items() if key in options})
        engine = Engine(options, METHODS[name](options), NO_CASES, Path("nowhere"), CPU, ranks)
        engine.iteration = options.max_iterations - 2
        return engine

    return make


@pytest.fixture(scope="module")
def batch_of(make_batch):
    def make(name: str, rank: int):
        labeled = 1 if METHODS[name].uses_unlabeled else 2
        return make_batch(labeled, 2 - labeled, seed=rank)

    return make


def gradients(engine: Engine) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in engine.method.named_parameters() if p.grad is not None}


NO_BATCH_STATISTICS = ("--norm", "instance")


@pytest.fixture(scope="module")
def trained(in_ranks, build, batch_of) -> list[dict]:
    """Per rank and method: the gradients of a step, and everything that was trained after it."""

    def work() -> dict:
        with joined() as ranks:
            results = {}
            for name in METHODS:
                engine = build(name, *NO_BATCH_STATISTICS, ranks=ranks)
                engine.step(batch_of(name, ranks.rank))
                results[name] = (gradients(engine), engine.method.state_dict())
            return results

    return values(in_ranks(work, SIZE))


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_mean_of_the_ranks_losses(trained, build, batch_of, name):
    """One process, one set of parameters: the losses of both ranks' batches, their mean, one backward pass."""
    engine = build(name, *NO_BATCH_STATISTICS)
    engine.method.train()
    random = [torch.get_rng_state()]
    Ranks(1, SIZE).draw_anew(engine.options.seed, engine.iteration)
    random.append(torch.get_rng_state())
    players = [
        copy.copy(engine.method) for _ in range(SIZE)
    ]  # the same networks; what a turn leaves to the next is own
    for turn in engine.turns:
        engine._open_gradients(turn)
        losses = []
        for rank, player in enumerate(players):
            torch.set_rng_state(random[rank])
            terms = getattr(player, turn.step.__name__)(batch_of(name, rank), engine.iteration)
            losses.append(sum(terms.values()))
            random[rank] = torch.get_rng_state()
        torch.stack(losses).mean().backward()
        if turn.scheduled:
            turn.optimizer.param_groups[0]["lr"] = learning_rate(engine.iteration, engine.options)
        turn.optimizer.step()
    engine.method.after_step(engine.iteration)
    expected = gradients(engine)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    (first, state), (second, other) = (rank[name] for rank in trained)
    assert first.keys() == second.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(first[key], gradient, rtol=1e-4, atol=1e-5 * largest)
        assert torch.equal(first[key], second[key])  # to the last bit
    for key, value in engine.method.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(state[key], other[key])


def test_gradients_do_not_depend_on_the_size_of_a_message(in_ranks, monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET", 10)

    def work() -> list:
        with joined() as ranks:
            shapes = [(3,), (2, 3), (11,), (), (4, 1, 2)]
            parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
            parameters.append(nn.Parameter(torch.zeros(3)))  # without a gradient
            for index, p in enumerate(parameters[:-1]):
                p.grad = (1 + ranks.rank) * torch.full(p.shape, float(index))
            parameters[4].grad = parameters[4].grad.transpose(0, 2).contiguous().transpose(0, 2)  # another layout
            ranks.average_gradients(torch.optim.SGD(parameters, lr=1))
            return [None if p.grad is None else p.grad.flatten().tolist() for p in parameters]

    counts = [3, 6, 11, 1, 8]
    for averaged in values(in_ranks(work)):
        assert averaged == [*([1.5 * index] * count for index, count in enumerate(counts)), None]


def test_random_numbers_are_the_ranks_own_and_repeat(in_ranks, build, batch_of):
    def work() -> list[float]:
        with joined() as ranks:
            engine = build("supervised", ranks=ranks)
            drawn = []
            for _ in range(2):
                torch.manual_seed(3)  # whatever was drawn before does not matter above rank 0
                engine.step(batch_of("supervised", 0))
                drawn.append(float(torch.rand(())))
                engine.iteration -= 1
            engine.iteration += 1
            engine.step(batch_of("supervised", 0))
            return [*drawn, float(torch.rand(()))]

    first, second = values(in_ranks(work))
    engine = build("supervised")
    torch.manual_seed(3)
    engine.step(batch_of("supervised", 0))
    alone = float(torch.rand(()))
    assert first[0] == first[1] == alone and second[0] == second[1]
    assert len({alone, second[0], second[2]}) == 3


def test_all_end_a_step_with_the_running_statistics_of_rank_0(in_ranks, build, batch_of):
    def work(*flags: str) -> dict[str, Tensor]:
        with joined() as ranks:
            engine = build("supervised", "--norm", "batch", *flags, ranks=ranks)
            engine.step(batch_of("supervised", ranks.rank))
            return dict(engine.method.named_buffers())

    first, second = values(in_ranks(work))
    engine = build("supervised", "--norm", "batch")
    engine.step(batch_of("supervised", 0))
    for name, buffer in engine.method.named_buffers():
        assert torch.equal(first[name], buffer) and torch.equal(second[name], buffer)


# --- what goes wrong


def fail(rank: int, how) -> None:
    with joined() as ranks:
        ranks.barrier()
        if ranks.rank == rank:
            how()
        ranks.barrier()


def raise_input_error():
    raise InputError("the scan is damaged")


def test_the_rank_that_fails_says_why_and_rank_0_that_one_is_lost(in_ranks):
    first, second, third = in_ranks(lambda: fail(1, raise_input_error), size=3)
    assert (first.status, second.status, third.status) == (2, 2, 2)
    assert first.output == f"error: {LOST}\n" and third.output == ""
    assert second.output == "error: rank 1: the scan is damaged\n"
    first, second = in_ranks(lambda: fail(0, raise_input_error))
    assert (first.status, second.status) == (2, 2)
    assert (first.output, second.output) == ("error: the scan is damaged\n", "")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_is_missed_at_once(in_ranks, rank):
    outcomes = in_ranks(lambda: fail(rank, die), size=3)
    dead = outcomes.pop(rank)
    assert dead.status == -signal.SIGKILL and [outcome.status for outcome in outcomes] == [2, 2]
    assert outcomes[0].output == (f"error: {LOST}\n" if rank else "") and outcomes[1].output == ""


@pytest.mark.slow  # it waits; a shorter timeout would not be safe on a busy machine
def test_a_process_that_hangs_is_given_up(in_ranks, monkeypatch):
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=5))
    first, _ = in_ranks(lambda: fail(1, lambda: time.sleep(12)))
    assert first.status == 2 and first.output == f"error: {LOST}\n"


def test_processes_that_do_not_come_together_are_one_sentence(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="WORLD_SIZE"), joined():
        pass
