"""What every entry of METHODS keeps to, so that training and testing need to know nothing else about a method."""

import contextlib
import shutil
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dataloaders.batch import Batch, BatchStream
from dataloaders.case_files import LABEL_KEY, case_path
from dataloaders.split import training_split
from dataloaders.store import CaseStore
from engine import Engine
from inference.trained import load_networks
from methods import METHODS
from networks import NETWORKS, Network
from runtime import runs
from runtime.device import memory_format
from utils.constants import MIN_BF16_PATCH
from utils.errors import InputError

CPU, META = torch.device("cpu"), torch.device("meta")
SMALL_BATCH = ["--batch_size", "2", "--n_filters", "4"]
VARIANTS = [  # flags that change networks, or what they are asked
    ("dtml", "--branch seg"),
    ("dtml", "--branch sdm"),
    ("dtml", "--sdm_supervision both --sdm_head block"),
    ("dtc", "--sdm_head block"),
    ("asdnet", "--sup_loss att_dice --semi_loss nll"),
]
SEMI_SUPERVISED = [name for name, method in METHODS.items() if method.uses_unlabeled]
SOFT = {name: ("--sdm_k", "5") for name in ("dtml", "dtc")}  # k = 1500 turns rounding into another mask
CLASSES = (1, 2, pytest.param(4, marks=pytest.mark.slow))
FEW = 2  # numbers that the CPU may hold for a step on another device: a draw, an optimizer's count

Build = Callable[..., Engine]


@pytest.fixture
def build(build_engine) -> Build:
    """An engine of few crops and passes."""

    def make(name: str, *flags: str, **settings: Any) -> Engine:
        engine = build_engine(name, *SMALL_BATCH, *flags, **settings)
        if hasattr(engine.options, "mc_passes"):
            engine.options.mc_passes = 2
        return engine

    return make


@pytest.fixture
def batch_for(make_batch) -> Callable[..., Batch]:
    """Of several classes, the last is in no label."""

    def make(name: str, seed: int = 0, classes: int = 1, **settings: int) -> Batch:
        counts = (1, 1) if METHODS[name].uses_unlabeled else (2, 0)
        return make_batch(*counts, seed=seed, classes=classes, absent=int(classes > 1), **settings)

    return make


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


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_in_bf16_is_nearly_that_of_float32(name, classes, build, batch_for):
    """Terms stay float32 and close; the trunk computes in bfloat16."""
    batch = batch_for(name, classes=classes, size=MIN_BF16_PATCH).to(CPU, memory_format(CPU, "bf16"))
    terms = []
    for amp in ("off", "bf16"):
        flags = "--n_filters", "2", "--amp", amp, "--dropout", "0", *SOFT.get(name, ())
        engine, types = build(name, *flags, "--num_classes", str(classes)), set()
        vnet = next(module for module in engine.method.modules() if isinstance(module, Network))
        vnet.encoder[1].register_forward_hook(lambda module, args, output, seen=types: seen.add(output.dtype))
        torch.manual_seed(1)
        values = engine.step(batch)
        terms.append({key: float(value) for key, value in values.items() if key.startswith("loss/")})
        assert all(value.dtype == torch.float32 for key, value in values.items() if key.startswith("loss/"))
        assert types == {torch.bfloat16 if amp == "bf16" else torch.float32}
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in engine.method.parameters())
    assert terms[1] == pytest.approx(terms[0], rel=0.05, abs=1e-3) and terms[1] != terms[0]


class OneDevice(TorchDispatchMode):
    """Forbids a tensor of more than a few numbers elsewhere than on the meta device, and copies between devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, outputs)) if isinstance(x, Tensor)]
        elsewhere = [tensor for tensor in tensors if tensor.device != META]
        assert not elsewhere or len(elsewhere) == len(tensors), f"{func} goes from one device to another"
        assert all(tensor.numel() <= FEW for tensor in elsewhere), f"{func} computes on {elsewhere[0].device}"
        return outputs


@pytest.mark.parametrize(
    ("name", "flags"), [*((name, f"--num_classes {count}") for name in METHODS for count in (1, 2)), *VARIANTS]
)
def test_a_step_and_a_prediction_stay_on_their_device_and_never_wait_for_it(
    build, make_batch, monkeypatch, name, flags
):
    """A meta tensor has no numbers: reading one, as `float(loss)` does, is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # knows no meta device
    engine = build(name, *flags.split(), device="meta")
    batch = make_batch(1, 1, size=32, classes=engine.method.num_classes).to(META)
    with OneDevice():
        engine.step(batch)
        engine.method.eval()
        probs = engine.method.predict(batch.image)
        maps = engine.method.signed_maps(batch.image)
    assert all(tensor.device == META for tensor in [*probs.values(), *maps.values(), *engine.method.parameters()])


@pytest.mark.parametrize("network", sorted(NETWORKS.keys() - {"vnet"}))
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_with_every_network(build, batch_for, tmp_path, name, network):
    """Two iterations; the checkpoint builds the same network again, and fits no other."""
    engine = build(name, "--network", network, "--n_filters", "4")
    kinds = {type(module) for module in engine.method.modules() if isinstance(module, Network)}
    assert kinds == {NETWORKS[network]}
    before = [parameter.clone() for parameter in engine.turns[0].parameters()]
    for seed in (0, 1):
        engine.step(batch_for(name, seed))
    assert not any(torch.equal(a, b) for a, b in zip(before, engine.turns[0].parameters(), strict=True))
    engine.save(runs.LAST)
    state = runs.load_checkpoint(tmp_path / runs.LAST)
    again, image = METHODS[name].of_run(state["options"]).eval(), torch.randn(1, 1, 32, 32, 32)
    load_networks(again, state, tmp_path / runs.LAST)
    with torch.no_grad():
        probs, expected = again.predict(image), engine.method.eval().predict(image)
    for output in expected:
        torch.testing.assert_close(probs[output], expected[output], rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError) as error:
        load_networks(METHODS[name].of_run(state["options"] | {"network": "vnet"}), state, tmp_path / runs.LAST)
    assert network in str(error.value) and str(tmp_path / runs.LAST) in str(error.value)


@pytest.mark.parametrize("classes", [1, 2, 4])
@pytest.mark.parametrize(("name", "flags"), [*((name, "") for name in METHODS), *VARIANTS])
def test_every_term_reaches_its_player_and_nothing_else(build, batch_for, name, flags, classes):
    engine = build(name, *flags.split(), "--num_classes", str(classes))
    batch = batch_for(name, classes=classes)
    parameters = dict(engine.method.train().named_parameters())
    trainable = {key for key, parameter in parameters.items() if parameter.requires_grad}
    trained: set[str] = set()
    for turn in engine.turns:
        engine._open_gradients(turn)
        own = {key for key, parameter in parameters.items() if any(parameter is p for p in turn.parameters())}
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
    return [parameter.detach().clone() for parameter in engine.turns[0].parameters()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Without batch norm, nothing but a loss connects the cases of a batch.
@pytest.mark.parametrize("name", SEMI_SUPERVISED)
def test_unlabeled_images_change_the_parameters(build, make_batch, name):
    batch, other = make_batch(1, 1), make_batch(1, 1, seed=1)
    changed = replace(batch, image=torch.cat([batch.image[:1], other.image[1:]]))
    after = [first_player_after_a_step(build(name, "--norm", "instance"), b) for b in (batch, changed)]
    assert not equal(*after)


def test_the_check_above_sees_a_method_that_ignores_them(build, make_batch):
    batch = make_batch(1, 1)
    other = replace(batch, image=torch.cat([batch.image[:1], batch.image[1:] ** 2 + 1]))
    after = [first_player_after_a_step(build("supervised", "--norm", "instance"), b) for b in (batch, other)]
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
        cases = split.labeled, split.unlabeled
        batch = BatchStream(engine.options, store, *cases, sdm_empty=engine.method.sdm_empty)[0]
        assert METHODS[name].uses_unlabeled == (len(batch.image) > batch.num_labeled)
        engine.method.train()
        torch.manual_seed(1)
        with torch.no_grad():
            results.append([turn.step(batch, engine.iteration) for turn in engine.turns])
    assert results[0] == results[1]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("shape", "classes"), [((2, 1, 32, 32, 32), 1), ((2, 1, 31, 32, 18), 2), ((1, 1, 16, 16, 16), 4)]
)
def test_predictions_are_probabilities_of_the_outputs_asked_for(build, name, shape, classes):
    method, image = build(name, "--num_classes", str(classes)).method.eval(), torch.randn(shape)
    with torch.no_grad():
        for head in (
            head for network in method.modules() if isinstance(network, Network) for head in network.heads.values()
        ):
            head.weight.mul_(1000)  # so that probabilities come close to 0 and 1
        everything = method.predict(image)
        assert tuple(everything) == tuple(method.outputs)
        for output, prob in everything.items():
            assert prob.shape == (shape[0], classes, *shape[2:]) and prob.dtype == torch.float32
            assert 0 <= prob.min() and prob.max() <= 1
            assert not method.exclusive or prob.sum(dim=1).max() <= 1 + 1e-6
            alone = method.predict(image, [output])
            assert list(alone) == [output]
            torch.testing.assert_close(alone[output], prob)
        assert max(float(prob.max()) for prob in everything.values()) > 0.9
        assert classes == 1 or method.exclusive == (float(everything["seg"].sum(dim=1).max()) <= 1 + 1e-6)
        for sdm in method.signed_maps(image).values():
            assert sdm.shape == (shape[0], classes, *shape[2:]) and sdm.abs().max() <= 1


@pytest.mark.parametrize("name", METHODS)
def test_a_run_from_before_a_flag_existed_has_its_default(tiny_options, name):
    options = vars(tiny_options(name))
    own = ArgumentParser()
    METHODS[name].add_arguments(own)
    flags = {action.dest for action in own._actions} - {"help", "consistency"} | {"num_classes"}
    older = {key: value for key, value in options.items() if key not in flags}
    shapes = [
        {key: value.shape for key, value in METHODS[name].of_run(stored).state_dict().items()}
        for stored in (options, older)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("classes", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(build, batch_for, tmp_path, name, classes):
    flags = "--dropout", "0.5", "--num_classes", str(classes)
    straight = build(name, *flags)
    straight.step(batch_for(name, classes=classes))
    straight.save(runs.LAST)
    expected = straight.step(batch_for(name, seed=1, classes=classes))

    resumed = build(name, *flags, seed=7)
    resumed.load(runs.load_checkpoint(tmp_path / runs.LAST))
    assert resumed.step(batch_for(name, seed=1, classes=classes)) == expected
    ours, theirs = resumed.method.state_dict(), straight.method.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_of_another_number_of_classes_does_not_fit(build, tmp_path, name):
    build(name, "--num_classes", "2").save(runs.LAST)
    state = runs.load_checkpoint(tmp_path / runs.LAST)
    with pytest.raises(InputError) as error:
        load_networks(build(name).method, state, tmp_path / runs.LAST)
    assert "'num_classes': 2" in str(error.value) and "\n" not in str(error.value)
