"""What every entry of METHODS keeps to, so that training and testing need to know nothing else about a method."""

import shutil
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from dataloaders.batch import Batch, BatchStream
from dataloaders.case_files import LABEL_KEY, case_path
from dataloaders.split import Split, training_split
from dataloaders.store import CaseStore
from engine import Engine
from methods import METHODS
from methods.supervised import Supervised
from networks.vnet import VNet
from runtime import runs
from runtime.device import memory_format

CPU = torch.device("cpu")
NO_CASES = Split([], [], [])  # batches come from the tests
SMALL_BATCH = ["--batch_size", "2"]
QUICKER = {"mc_passes": 2}  # for the methods that have such a flag
VARIANTS = [  # flags that change networks, or what they are asked
    ("dtml", "--branch seg"),
    ("dtml", "--branch sdm"),
    ("dtml", "--sdm_supervision both --sdm_head block"),
    ("dtc", "--sdm_head block --bce"),
    ("sassnet", "--sdm_head block"),
    ("asdnet", "--critic_image --sup_loss att_dice --semi_loss nll"),
    ("tcse", "--public_zoom"),
    ("double_uncertainty", "--feat_level 2 --seg_unc variance"),
]
SEMI_SUPERVISED = [name for name, method in METHODS.items() if method.uses_unlabeled]

Build = Callable[..., Engine]


@pytest.fixture
def build(tiny_options, tmp_path) -> Build:
    """An engine at the last but one iteration, where ramps are high and delayed terms have set in."""

    def make(name: str, *flags: str, seed: int = 0) -> Engine:
        torch.manual_seed(seed)
        options = tiny_options(name, *SMALL_BATCH, *flags)
        vars(options).update({key: value for key, value in QUICKER.items() if key in options})
        engine = Engine(options, METHODS[name](options), split=NO_CASES, folder=tmp_path, device=CPU)
        engine.iteration = options.max_iterations - 2
        return engine

    return make


@pytest.fixture
def batch_for(make_batch) -> Callable[..., Batch]:
    def make(name: str, seed: int = 0) -> Batch:
        return make_batch(1, 1, seed=seed) if METHODS[name].uses_unlabeled else make_batch(2, 0, seed=seed)

    return make


def driven(turn) -> list[Tensor]:
    return [parameter for group in turn.optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_that_of_plain_layers(name, build, batch_for, plain_layers):
    """Losses, parameters and statistics, with the faster forms of the layers and with PyTorch's own.

    Not the parameters of critics: the first step of Adam has the size of the rate, whatever the gradient, so one
    that is 0 up to rounding moves either way.
    """

    def stepped() -> tuple[dict[str, float], dict[str, Tensor]]:
        engine = build(name, "--dropout", "0")
        values = engine.step(batch_for(name).to(CPU, memory_format(CPU, "off")))
        return {key: float(value) for key, value in values.items()}, engine.method.state_dict()

    values, state = stepped()
    plain_layers()
    expected_values, expected = stepped()
    assert values == pytest.approx(expected_values, rel=1e-4, abs=1e-5)
    for key, value in expected.items():
        if key.startswith("critic."):
            continue
        torch.testing.assert_close(state[key], value, rtol=1e-3, atol=5e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", METHODS)
def test_recomputing_changes_no_bit_of_a_step(name, build, batch_for):
    states = []
    for flags in ((), ("--recompute",)):
        engine = build(name, *flags)
        assert any(getattr(module, "recompute", False) for module in engine.method.modules()) == bool(flags)
        torch.manual_seed(1)
        engine.step(batch_for(name).to(CPU, memory_format(CPU, "off")))
        states.append(engine.method.state_dict())
    assert all(torch.equal(value, states[0][key]) for key, value in states[1].items())


@pytest.mark.parametrize(("name", "flags"), [*((name, "") for name in METHODS), *VARIANTS])
def test_every_term_reaches_its_player_and_nothing_else(build, batch_for, name, flags):
    engine, batch = build(name, *flags.split()), batch_for(name)
    parameters = dict(engine.method.train().named_parameters())
    trainable = {key for key, parameter in parameters.items() if parameter.requires_grad}
    trained: set[str] = set()
    for turn in engine.turns:
        engine._open_gradients(turn)
        own = {key for key, parameter in parameters.items() if any(parameter is p for p in driven(turn))}
        reached: set[str] = set()
        for label, term in turn.step(batch, engine.iteration).items():
            assert term.shape == () and torch.isfinite(term), label
            engine.method.zero_grad(set_to_none=True)
            term.backward(retain_graph=True)
            gradients = {key: p.grad for key, p in parameters.items() if p.grad is not None}
            assert any(gradient.abs().max() > 0 for gradient in gradients.values()), f"{label} has no gradient"
            reached |= gradients.keys()
        assert reached == own
        trained |= own
    assert trained == trainable
    assert all(torch.isfinite(torch.as_tensor(value)) for value in engine.method.monitor.values())


def first_player_after_a_step(engine: Engine, batch: Batch) -> list[Tensor]:
    torch.manual_seed(1)
    engine.step(batch)
    return [parameter.detach().clone() for parameter in driven(engine.turns[0])]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Without batch norm, nothing but a loss connects the cases of a batch.
@pytest.mark.parametrize("name", SEMI_SUPERVISED)
def test_unlabeled_images_change_the_parameters(build, make_batch, name):
    batch, other = make_batch(1, 1), make_batch(1, 1, seed=1)
    changed = replace(batch, image=torch.cat([batch.image[:1], other.image[1:]]))
    after = [first_player_after_a_step(build(name, "--norm", "instance"), b) for b in (batch, changed)]
    assert not equal(*after)


def test_the_check_above_sees_a_method_that_ignores_them(tiny_options, tmp_path, make_batch):
    batch, after = make_batch(1, 1), []
    for shift in (0, 1):
        torch.manual_seed(0)
        options = tiny_options("supervised", *SMALL_BATCH, "--norm", "instance")
        engine = Engine(options, Supervised(options), split=NO_CASES, folder=tmp_path, device=CPU)
        image = torch.cat([batch.image[:1], batch.image[1:] ** 2 + shift])
        after.append(first_player_after_a_step(engine, replace(batch, image=image)))
    assert equal(*after)


@pytest.fixture(scope="module")
def scrambled(phantom, tmp_path_factory) -> Path:
    """The phantom data set with noise for the labels of its unlabeled cases: all but the first 4."""
    root = tmp_path_factory.mktemp("scrambled") / "phantom"
    shutil.copytree(phantom, root)
    rng = np.random.default_rng(0)
    for case in (root / "train.list").read_text().split()[4:]:
        with h5py.File(case_path(root, case), "r+") as file:
            file[LABEL_KEY][...] = rng.integers(0, 2, file[LABEL_KEY].shape)
    return root


@pytest.mark.parametrize("name", METHODS)
def test_labels_of_unlabeled_cases_never_enter(build, phantom, scrambled, name):
    results = []
    for root in (phantom, scrambled):
        engine = build(name, "--root_path", str(root), "--labelnum", "4")
        split = training_split(engine.options)
        store = CaseStore(engine.options, split.labeled, split.unlabeled)
        batch = BatchStream(engine.options, store, split.labeled, split.unlabeled)[0]
        assert METHODS[name].uses_unlabeled == (len(batch.image) > batch.num_labeled)
        engine.method.train()
        torch.manual_seed(1)
        with torch.no_grad():
            results.append([turn.step(batch, engine.iteration) for turn in engine.turns])
    assert results[0] == results[1]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(2, 1, 32, 32, 32), (2, 1, 31, 32, 18)])
def test_predictions_are_probabilities_of_the_outputs_asked_for(build, name, shape):
    method, image = build(name).method.eval(), torch.randn(shape)
    with torch.no_grad():
        for head in (
            head for network in method.modules() if isinstance(network, VNet) for head in network.heads.values()
        ):
            head.weight.mul_(1000)  # so that probabilities come close to 0 and 1
        everything = method.predict(image)
        assert tuple(everything) == tuple(method.outputs)
        for output, prob in everything.items():
            assert prob.shape == shape and prob.dtype == torch.float32
            assert 0 <= prob.min() and prob.max() <= 1
            alone = method.predict(image, [output])
            assert list(alone) == [output]
            torch.testing.assert_close(alone[output], prob)
        assert max(float(prob.max()) for prob in everything.values()) > 0.9
        for sdm in method.signed_maps(image).values():
            assert sdm.shape == shape and sdm.abs().max() <= 1


@pytest.mark.parametrize("name", METHODS)
def test_a_run_from_before_a_flag_existed_has_its_default(tiny_options, name):
    options = vars(tiny_options(name))
    own = ArgumentParser()
    METHODS[name].add_arguments(own)
    flags = {action.dest for action in own._actions} - {"help", "consistency"}
    older = {key: value for key, value in options.items() if key not in flags}
    shapes = [
        {key: value.shape for key, value in METHODS[name].of_run(stored).state_dict().items()}
        for stored in (options, older)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(build, batch_for, tmp_path, name):
    straight = build(name, "--dropout", "0.5")
    straight.step(batch_for(name))
    straight.save(runs.LAST)
    expected = straight.step(batch_for(name, seed=1))

    resumed = build(name, "--dropout", "0.5", seed=7)
    resumed.load(runs.load_checkpoint(tmp_path / runs.LAST))
    assert resumed.step(batch_for(name, seed=1)) == expected
    ours, theirs = resumed.method.state_dict(), straight.method.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
