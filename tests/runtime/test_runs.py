"""Run folders, checkpoints and their files: whole or not at all, and never someone else's."""

import errno
import json
import os
import random
import resource
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime import runs
from utils import files
from utils.errors import InputError
from utils.files import REPOSITORY

CPU = torch.device("cpu")


def run_options(tmp_path: Path, exp: str = "a", resume: bool = False, overwrite: bool = False, **rest) -> Namespace:
    return Namespace(model_path=str(tmp_path), exp=exp, resume=resume, overwrite=overwrite, **rest)


@pytest.fixture
def old_run(tmp_path) -> Path:
    """The folder of a run `a` with one checkpoint."""
    folder = tmp_path / "a"
    folder.mkdir()
    machine = {"device": "cuda", "gpu": 1, "save_every": 7, "overwrite": True}
    stored = {"seed": 1, "method": "dtml", "patch_size": [32, 32, 32], **machine}
    files.write_json(folder / runs.OPTIONS, stored)
    runs.save_checkpoint(folder / runs.LAST, {"networks": {}, "options": stored, "iteration": 1})
    return folder


# --- run folders


def test_a_run_from_before_the_flag_is_a_vnet(old_run, tmp_path):
    assert runs.load_checkpoint(old_run / runs.LAST)["options"]["network"] == "vnet"
    assert runs.stored_options(run_options(tmp_path, resume=True))["network"] == "vnet"


def test_a_run_lies_below_the_model_path_of_the_repository():
    assert runs.run_folder("model", "a") == REPOSITORY / "model" / "a"
    assert runs.run_folder("/tmp/m", "LA/a") == Path("/tmp/m/LA/a")


@pytest.mark.parametrize("exp", [".", "..", "../a", "a/../..", "/etc"])
def test_a_name_that_leads_elsewhere_is_refused(exp):
    with pytest.raises(InputError, match="--exp"):
        runs.run_folder("/tmp/m", exp)


def test_default_names_differ_by_what_makes_runs_differ():
    options = Namespace(method="dtml", preset="cpu", labelnum=16, seed=3)
    assert runs.default_exp(options) == "dtml_cpu_l16_s3"


def test_a_new_run_gets_its_folder_only_when_prepared(tmp_path):
    folder = runs.claim_run(run_options(tmp_path))
    assert folder == tmp_path / "a" and not folder.exists()
    runs.prepare_run(folder, overwrite=False)
    assert folder.is_dir()


@pytest.mark.parametrize("file", [runs.OPTIONS, runs.LAST])
def test_an_existing_run_is_neither_touched_nor_taken_for_granted(old_run, tmp_path, file):
    for name in (runs.OPTIONS, runs.LAST):
        if name != file:
            (old_run / name).unlink()
    with pytest.raises(InputError, match="--resume.*--overwrite.*--exp"):
        runs.claim_run(run_options(tmp_path))
    assert runs.claim_run(run_options(tmp_path, resume=True)) == old_run
    assert runs.claim_run(run_options(tmp_path, overwrite=True)) == old_run
    assert (old_run / file).exists()


def test_overwriting_deletes_the_old_run_and_nothing_but_a_run(old_run, tmp_path):
    runs.prepare_run(old_run, overwrite=True)
    assert list(old_run.iterdir()) == []
    notes = old_run / "notes.txt"
    notes.write_text("mine")
    runs.prepare_run(old_run, overwrite=True)
    assert notes.read_text() == "mine"


def test_resuming_clears_away_what_a_killed_process_left_half_written(old_run):
    left = old_run / f".{runs.LAST}.x1y2{files.PARTIAL}"
    left.write_bytes(b"half")
    runs.prepare_run(old_run, overwrite=False)
    assert sorted(path.name for path in old_run.iterdir()) == [runs.LAST, runs.OPTIONS]


def test_a_file_in_the_way_is_bad_input(tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(InputError, match=str(tmp_path / "a")):
        runs.claim_run(run_options(tmp_path))
    with pytest.raises(InputError, match="--model_path"):
        runs.prepare_run(tmp_path / "a" / "b", overwrite=False)


def test_an_unknown_run_is_answered_with_the_known_ones(old_run, tmp_path):
    assert runs.existing_run(str(tmp_path), "a") == old_run
    with pytest.raises(InputError, match="no run 'b' .*there are: a.*--exp"):
        runs.existing_run(str(tmp_path), "b")
    with pytest.raises(InputError, match="none yet"):
        runs.existing_run(str(tmp_path / "nothing"), "b")


# --- options of a resumed run


def resumed(tmp_path: Path, resume: bool = True, **given) -> Namespace:
    flags = {"seed": 0, "method": "dtml", "device": None, "gpu": None, "save_every": 100, **given}
    options = run_options(tmp_path, resume=resume, **flags)
    return runs.resumed_options(options, set(given), runs.stored_options(options))


def test_a_resumed_run_keeps_its_options(old_run, tmp_path):
    options = resumed(tmp_path)
    assert (options.seed, options.save_every, options.device, options.gpu) == (1, 7, "cuda", 1)
    assert (options.resume, options.overwrite) == (True, False)  # though it was once started with --overwrite
    assert "patch_size" not in options  # stored, but no flag of this command line


def test_without_a_checkpoint_or_the_flag_the_given_options_count(old_run, tmp_path):
    assert resumed(tmp_path, resume=False, seed=5).seed == 5
    (old_run / runs.LAST).unlink()
    assert resumed(tmp_path, seed=5).seed == 5


def test_repeating_what_the_run_has_is_no_contradiction(old_run, tmp_path):
    assert resumed(tmp_path, seed=1, method="dtml").seed == 1


@pytest.mark.parametrize("given", [{"seed": 2}, {"method": "supervised"}, {"new_flag": 1}])
def test_contradicting_the_run_is_an_error_that_names_the_flag(old_run, tmp_path, given):
    with pytest.raises(InputError, match=f"--{next(iter(given))} .* contradicts run a"):
        resumed(tmp_path, **given)


def test_a_number_that_the_list_overruled_may_be_typed_again(old_run, tmp_path):
    state = runs.load_checkpoint(old_run / runs.LAST)
    stored = state["options"] | {"labelnum": 8, "labeled_list": None}
    runs.save_checkpoint(old_run / runs.LAST, state | {"options": stored})
    with pytest.raises(InputError, match="--labelnum 16"):
        resumed(tmp_path, labelnum=16)
    runs.save_checkpoint(old_run / runs.LAST, state | {"options": stored | {"labeled_list": "eight.list"}})
    assert resumed(tmp_path, labelnum=16).labelnum == 8


def test_the_machine_may_change(old_run, tmp_path):
    options = resumed(tmp_path, save_every=3, device="cpu")
    assert (options.save_every, options.device, options.gpu) == (3, "cpu", None)
    assert options.seed == 1


# --- files, whole or not at all


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "f"
    for text in ("old", "new"):
        with files.atomic(path) as temporary:
            temporary.write_text(text)
            assert temporary.parent == tmp_path  # else renaming would copy
    assert path.read_text() == "new" and names(tmp_path) == ["f"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), OSError(errno.ENOSPC, "No space")])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)), files.atomic(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["f"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fills_at_the_last_moment_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "f"
    path.write_text("old")
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(InputError, match=f"{path}.*--model_path"), files.atomic(path) as t:
        t.write_text("new")
    assert path.read_text() == "old" and names(tmp_path) == ["f"]


def test_no_room_for_a_temporary_file_is_bad_input_too(tmp_path):
    with pytest.raises(InputError, match="cannot write"), files.atomic(tmp_path / "missing" / "f"):
        pass


def test_json_is_strict(tmp_path):
    files.write_json(tmp_path / "f.json", {"a": [1, 2.5, None, "ä"]})
    assert json.loads((tmp_path / "f.json").read_text()) == {"a": [1, 2.5, None, "ä"]}
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "f.json", {"a": float("nan")})
    assert json.loads((tmp_path / "f.json").read_text())["a"]


# --- checkpoints


def checkpoint(value: float = 1.0) -> dict:
    options = {"method": "dtml", "patch_size": [32, 32, 32], "head": None}
    weights = {"w": torch.full((50_000,), value)}
    return {"networks": weights, "options": options, "iteration": 1, "rng": runs.rng_state(CPU)}


def test_a_checkpoint_is_plain_data(tmp_path):
    runs.save_checkpoint(tmp_path / runs.LAST, checkpoint())
    state = torch.load(tmp_path / runs.LAST, weights_only=True)
    assert state["options"] == checkpoint()["options"] and names(tmp_path) == [runs.LAST]
    assert torch.equal(runs.load_checkpoint(tmp_path / runs.LAST)["networks"]["w"], torch.ones(50_000))


def failed_save(state, path):
    Path(path).write_bytes(b"half")
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nException raised from ...")


@pytest.mark.parametrize("save", [full_disk, failed_save])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch, save):
    runs.save_checkpoint(tmp_path / runs.LAST, checkpoint())
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(InputError, match=f"cannot write {tmp_path / runs.LAST}: .*--model_path") as error:
        runs.save_checkpoint(tmp_path / runs.LAST, checkpoint(2.0))
    assert "\n" not in str(error.value)
    assert runs.load_checkpoint(tmp_path / runs.LAST)["networks"]["w"][0] == 1 and names(tmp_path) == [runs.LAST]


def test_a_write_that_the_system_refuses_halfway_leaves_the_last_checkpoint(tmp_path):
    runs.save_checkpoint(tmp_path / runs.LAST, checkpoint())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # bytes; the checkpoint has 200 000
    try:
        with pytest.raises(InputError, match="cannot write") as error:
            runs.save_checkpoint(tmp_path / runs.LAST, checkpoint(2.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert runs.load_checkpoint(tmp_path / runs.LAST)["networks"]["w"][0] == 1 and names(tmp_path) == [runs.LAST]


def test_what_is_no_checkpoint_of_this_project_is_bad_input(tmp_path):
    path = tmp_path / runs.LAST
    with pytest.raises(InputError, match="there is no checkpoint"):
        runs.load_checkpoint(path)
    runs.save_checkpoint(path, checkpoint())
    whole = path.read_bytes()
    for content in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=str(path)):
            runs.load_checkpoint(path)
    empty = {"networks": {}, "options": {}, "iteration": 0}
    for content in ({"block_one.conv.0.weight": torch.ones(1)}, [1], empty, {**checkpoint(), "options": None}):
        torch.save(content, path)
        with pytest.raises(InputError, match="published weights go to --pretrained"):
            runs.load_checkpoint(path)
    torch.save({"networks": Path("code that would run")}, path)
    with pytest.raises(InputError, match=str(path)):
        runs.load_checkpoint(path)


def draw() -> list:
    return [random.random(), np.random.rand(), float(np.random.randn()), torch.rand(3).tolist()]  # noqa: NPY002


def test_random_states_survive_a_checkpoint(tmp_path):
    runs.seed_everything(7)
    first = draw()  # leaves a second Gaussian in NumPy's generator
    runs.save_checkpoint(tmp_path / runs.LAST, checkpoint())
    second = draw()
    assert second != first
    runs.restore_rng(runs.load_checkpoint(tmp_path / runs.LAST)["rng"], CPU)
    assert draw() == second
    runs.seed_everything(7)
    assert draw() == first


@pytest.mark.parametrize("old", [False, True])
def test_a_run_goes_on_with_the_generator_of_its_own_gpu_on_another(monkeypatch, old):
    generators = {0: torch.tensor([10]), 1: torch.tensor([11]), 2: torch.tensor([12])}
    restored = {}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: generators[device.index])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.update({device.index: int(state)}))
    state = runs.rng_state(torch.device("cuda", 1))
    if old:  # those of all GPUs of a machine with two
        state["cuda"] = [generators[0], generators[1]]
    for index in (0, 2):
        runs.restore_rng(state, torch.device("cuda", index))
    assert restored == ({0: 10, 2: 11} if old else {0: 11, 2: 11})
    runs.restore_rng(state, CPU)
    assert runs.rng_state(CPU)["cuda"] == []


def test_overwriting_a_run_leaves_runs_within_its_folder(old_run, tmp_path):
    nested = tmp_path / "a" / "group" / "b"
    nested.mkdir(parents=True)
    (nested / runs.OPTIONS).write_text("{}")
    (old_run / runs.PREDICTIONS).mkdir()
    runs.prepare_run(old_run, overwrite=True)
    assert [path.name for path in old_run.iterdir()] == ["group"] and (nested / runs.OPTIONS).exists()


def test_a_flipped_bit_in_the_weights_is_bad_input(old_run):
    path = old_run / runs.LAST
    state = runs.load_checkpoint(path)
    weights = torch.full((1000,), 1.5)
    runs.save_checkpoint(path, state | {"networks": {"w": weights}})
    content = bytearray(path.read_bytes())
    content[content.index(weights.numpy().tobytes()) + 402] ^= 1
    path.write_bytes(content)
    assert torch.load(path)["networks"]["w"].ne(1.5).any()  # PyTorch takes it as it is
    with pytest.raises(InputError, match=runs.LAST):
        runs.load_checkpoint(path)


def test_the_scores_of_other_weights_do_not_replace_those_of_the_last():
    folders = {weights: runs.scores_folder(Path("a"), weights) for weights in ("last", "best_val", "iteration_7")}
    assert folders == {"last": Path("a"), "best_val": Path("a/best_val"), "iteration_7": Path("a/iteration_7")}
