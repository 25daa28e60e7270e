"""The command lines of a training run, from flags to files: resume, signals, kill, bad input."""

import csv
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import Mock

import h5py
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import make_phantom
import train
import train_dtml
from dataloaders.batch import BatchStream
from dataloaders.case_files import class_attributes, read_classes
from dataloaders.split import settle
from dataloaders.store import CaseStore
from engine import Engine
from methods import METHODS
from runtime import device, journal, runs
from runtime import workers as loaders
from runtime.distributed import Ranks
from scans.preprocess import RECORD, Preprocessing
from training import _steep_in_bf16
from utils import files
from utils.errors import InputError, run_script
from utils.labels import ONE_CLASS, LabelClass, classes_of_record

SMALL = "--preset demo --patch_size 32 32 32 --n_filters 2 --batch_size 2 --labelnum 3 --device cpu --image_every 0"
FLAGS = [*SMALL.split(), *"--log_every 1 --dropout 0.5 --lr_schedule steps --base_lr 0.01".split()]
TIMES = ("step_seconds", "data_wait")  # the only columns that may differ between two runs


@pytest.fixture
def command(phantom, tmp_path) -> Callable[..., list[str]]:
    """A command line for a small run in the test's folder."""

    def build(*flags: str, exp: str = "run") -> list[str]:
        return [*FLAGS, "--root_path", str(phantom), "--model_path", str(tmp_path), "--exp", exp, *flags]

    return build


@pytest.fixture(scope="session")
def two_classes(tmp_path_factory) -> Path:
    """As `phantom`, with two classes."""
    folder = tmp_path_factory.mktemp("two")
    flags = ["--train", "6", "--test", "2", "--shape", "40", "36", "32", "--classes", "2"]
    assert make_phantom.main(["--dest", str(folder), "--overwrite", *flags]) == 0
    return folder


@pytest.fixture
def scans(phantom, tmp_path) -> Path:
    """A copy of the phantom that a test may damage."""
    return Path(shutil.copytree(phantom, tmp_path / "scans"))


def state_of(folder: Path) -> dict:
    return runs.load_checkpoint(folder / runs.LAST)


def curves_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / runs.CURVES, newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def assert_same(first, second, where: str = "state") -> None:
    """Equal to the last bit: nested data, tensors included."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), where
    else:
        assert first == second, where


def assert_same_run(first: Path, second: Path) -> None:
    for part in ("networks", "optimizers", "scalers", "iteration", "best_val", "rng", "cases"):
        assert_same(state_of(first)[part], state_of(second)[part], part)
    assert curves_of(first) == curves_of(second)


def send_at(monkeypatch, iteration: int, number: int = signal.SIGTERM) -> None:
    """This process gets a signal while it computes an iteration."""
    step = Engine.step

    def step_and_send(self, batch):
        if self.iteration + 1 == iteration:
            os.kill(os.getpid(), number)
        return step(self, batch)

    monkeypatch.setattr(Engine, "step", step_and_send)


# --- a run from start to end


def test_a_run_writes_its_folder_and_says_what_it_does(command, tmp_path, capsys):
    flags = ("--max_iterations", "4", "--val_cases", "1", "--val_every", "4", "--image_every", "4")
    assert train_dtml.main(command(*flags)) == 0
    folder = tmp_path / "run"
    files = {path.name for path in folder.iterdir()}
    assert files == {runs.LAST, runs.BEST_VAL, runs.LOG, runs.OPTIONS, runs.CURVES, runs.TENSORBOARD}
    options = json.loads((folder / runs.OPTIONS).read_text())
    assert (options["method"], options["labelnum"], options["unlabelnum"]) == ("dtml", 3, 3)
    assert state_of(folder)["options"] == options and state_of(folder)["iteration"] == 4
    assert state_of(folder)["cases"]["validation"] == ["phantom_002"]
    assert len(state_of(folder)["cases"]["labeled"]) == 2
    log, shown = (folder / runs.LOG).read_text(), capsys.readouterr().out
    for words in ("2 labeled and 3 unlabeled", "32 x 32 x 32", "s per iteration", f"--logdir {tmp_path}", "Dice"):
        assert words in log and words in shown, words
    assert f"python code/test_LA.py --exp run --model_path {tmp_path}" in shown
    losses = [float(loss) for loss in re.findall(r"iteration \d+ of 4: loss ([\d.]+)", log)]
    assert losses and losses[-1] == pytest.approx(sum_of_losses(curves_of(folder)), abs=1e-3)
    assert_curves_and_pictures(folder)


def sum_of_losses(rows: list[dict[str, str]]) -> float:
    """Of the last row that has them."""
    last = [row for row in rows if row["loss/seg"]][-1]
    return sum(float(value) for name, value in last.items() if name.startswith("loss/"))


def assert_curves_and_pictures(folder: Path) -> None:
    names = {"loss", "loss/seg", "loss/mask", "loss/consistency", "validation/dice"}
    names |= {f"training/{name}" for name in ("learning_rate", "consistency_weight", "disagreement", *TIMES)}
    board = EventAccumulator(str(folder / runs.TENSORBOARD), size_guidance={"scalars": 0}).Reload()
    assert set(board.Tags()["scalars"]) == names
    assert [event.step for event in board.Scalars("loss/seg")] == [1, 2, 3, 4]
    assert [event.step for event in board.Images("training")] == [4]
    rows = curves_of(folder)
    untimed = {name.removeprefix("training/") for name in names} - {"loss", *TIMES}
    assert set(rows[0]) == {"iteration", *untimed}
    assert [row["iteration"] for row in rows if row["loss/seg"]] == ["1", "2", "3", "4"]


def test_schedules_in_the_log_follow_their_flags(command, tmp_path):
    flags = "--method supervised --lr_schedule cosine --warmup 2 --base_lr 0.5 --optimizer adamw --max_iterations 1"
    assert train.main(command(*flags.split())) == 0
    log = (tmp_path / "run" / runs.LOG).read_text()
    assert "consistency" not in log
    assert all(word in log for word in ("adamw", "0.5", "cosine", "2 iterations of warm-up"))


def test_a_run_without_a_name_gets_one(command, tmp_path):
    argv = command("--method", "supervised", "--max_iterations", "1")
    del argv[argv.index("--exp") : argv.index("--exp") + 2]
    assert train.main(argv) == 0
    assert (tmp_path / "supervised_demo_l3_s1337" / runs.LAST).exists()


# --- resume


@pytest.mark.parametrize(("method", "scans"), [("dtml", "phantom"), ("supervised", "phantom"), ("dtml", "two_classes")])
def test_k_and_n_minus_k_iterations_equal_n(command, request, tmp_path, monkeypatch, method, scans):
    root = str(request.getfixturevalue(scans))
    flags = ("--method", method, "--root_path", root, "--max_iterations", "3", "--save_every", "10")
    assert train.main(command(*flags, exp="whole")) == 0
    with monkeypatch.context() as patch:
        send_at(patch, iteration=2)
        assert train.main(command(*flags, exp="parts")) == 128 + signal.SIGTERM
    assert state_of(tmp_path / "parts")["iteration"] == 2
    assert train.main(command(*flags, "--resume", exp="parts")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    log = (tmp_path / "parts" / runs.LOG).read_text()
    assert "stopped and saved at iteration 2; continue with --resume" in log and "resumed at iteration 2" in log


def test_a_resumed_run_may_read_its_data_in_another_way(command, tmp_path, monkeypatch):
    flags = ("--method", "supervised", "--max_iterations", "3")
    assert train.main(command(*flags, exp="whole")) == 0
    with monkeypatch.context() as patch:
        send_at(patch, iteration=1)
        train.main(command(*flags, "--overwrite", exp="parts"))  # the switch must not outlive its command
    short = ["--exp", "parts", "--model_path", str(tmp_path), "--resume"]  # nothing else: the run knows its options
    assert train.main([*short, "--cache", "none", "--num_workers", "1", "--save_every", "1"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resume_starts_fresh_where_nothing_was_saved(command, tmp_path):
    flags = ("--method", "supervised", "--max_iterations", "1")
    assert train.main(command(*flags, "--resume")) == 0
    (tmp_path / "run" / runs.LAST).unlink()  # as after a kill before the first checkpoint
    assert train.main(command(*flags, "--resume", "--seed", "2")) == 0
    assert state_of(tmp_path / "run")["options"]["seed"] == 2
    assert [row["iteration"] for row in curves_of(tmp_path / "run")] == ["1"]


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(command, tmp_path):
    flags = ("--method", "supervised", "--max_iterations", "1")
    train.main(command(*flags))
    before = (tmp_path / "run" / runs.LAST).read_bytes()
    assert train.main(command(*flags, "--resume")) == 0
    assert (tmp_path / "run" / runs.LAST).read_bytes() == before
    assert train.main(command(*flags, "--overwrite", "--seed", "2")) == 0
    assert state_of(tmp_path / "run")["options"]["seed"] == 2


def test_resuming_on_other_cases_is_refused(command, scans, tmp_path):
    flags = ("--method", "supervised", "--max_iterations", "1", "--root_path", str(scans))
    train.main(command(*flags))
    lines = (scans / "train.list").read_text().split()
    (scans / "train.list").write_text("\n".join(reversed(lines)))
    with pytest.raises(InputError, match="--train_list"):
        train.main(command(*flags, "--resume"))


# --- processes: what only a real one can show


def start(argv: Sequence[str], output: Path) -> multiprocessing.Process:
    """A training in a process (and process group) of its own, forked: PyTorch is loaded already."""

    def run() -> None:
        os.setsid()
        with open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        run_script(lambda: train.main(argv))

    output.touch()
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait_for(condition: Callable[[], bool], process: multiprocessing.Process, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < end, "the training ended or hangs"
        time.sleep(0.01)


ENDLESS = ("--method", "supervised", "--max_iterations", "100000", "--save_every", "100000")


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 1)])
def test_ctrl_c_and_sigterm_save_and_end_with_a_clear_line(command, tmp_path, number, workers):
    process = start(command(*ENDLESS, "--num_workers", str(workers)), tmp_path / "output")
    wait_for(lambda: "s per iteration" in (tmp_path / "output").read_text(), process)
    os.killpg(process.pid, number)  # a terminal, `timeout` and schedulers reach the loader's workers, too
    process.join(120)
    assert process.exitcode == 128 + number
    state = state_of(tmp_path / "run")
    last = (tmp_path / "output").read_text().splitlines()[-1]
    assert last == f"stopped and saved at iteration {state['iteration']}; continue with --resume"
    assert state["iteration"] >= 1 and not list((tmp_path / "run").glob(".*"))
    assert len(curves_of(tmp_path / "run")) == state["iteration"]


def test_a_signal_ends_a_run_that_waits_for_a_batch(command, tmp_path, monkeypatch):
    def load_for_ever(*arguments):
        (tmp_path / "loading").touch()
        time.sleep(1000)

    monkeypatch.setattr(BatchStream, "__getitem__", load_for_ever)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # seconds of patience with a loader
    process = start(command(*ENDLESS, "--num_workers", "1"), tmp_path / "output")
    wait_for((tmp_path / "loading").exists, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    assert state_of(tmp_path / "run")["iteration"] == 0


@pytest.mark.parametrize("failure", ["killed", "no room"])
def test_a_loader_process_that_dies_is_a_sentence(command, tmp_path, monkeypatch, failure):
    def fail(*arguments):
        if failure == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return lambda: None  # cannot be pickled, as a batch for which there is no shared memory

    monkeypatch.setattr(BatchStream, "__getitem__", fail)
    with pytest.raises(InputError, match="--num_workers.*--resume"):
        train.main(command(*ENDLESS, "--num_workers", "1"))
    assert "--num_workers" in (tmp_path / "run" / runs.LOG).read_text().splitlines()[-1]


def test_no_loader_process_is_started_for_which_there_is_no_shared_memory(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loaders, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(loaders.shutil, "disk_usage", lambda path: Namespace(free=0))
    monkeypatch.setattr(loaders, "available_cores", lambda: 8)
    assert train.main(command("--method", "supervised", "--max_iterations", "1", "--num_workers", "3")) == 0
    assert "--num_workers 0" in capsys.readouterr().out
    assert "--shm-size" in (tmp_path / "run" / runs.LOG).read_text()


def test_kill_9_at_any_moment_then_resume_equals_the_run_that_was_left_alone(command, tmp_path):
    flags = ("--method", "supervised", "--max_iterations", "9", "--save_every", "1")
    assert train.main(command(*flags, exp="whole")) == 0
    argv, curves = command(*flags, "--resume", exp="killed"), tmp_path / "killed" / runs.CURVES
    for _ in range(2):
        since = curves.stat().st_mtime_ns if curves.exists() else 0
        process = start(argv, tmp_path / "output")
        wait_for(lambda since=since: curves.exists() and curves.stat().st_mtime_ns > since, process)
        time.sleep(random.SystemRandom().uniform(0, 0.2))
        process.kill()
        process.join()
    assert train.main(argv) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob(".*"))


def test_kill_9_in_the_middle_of_a_save_costs_one_checkpoint_at_most(command, tmp_path, monkeypatch):
    flags = ("--method", "supervised", "--max_iterations", "4", "--save_every", "1")
    assert train.main(command(*flags, exp="whole")) == 0
    monkeypatch.setattr(journal, "WRITE_EVERY", 1e9)  # seconds: no curves but those that a checkpoint asks for
    save = torch.save

    def save_half(state, path):
        save(state, path)
        if state["iteration"] == 3:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_half)
        process = start(command(*flags, exp="killed"), tmp_path / "output")
        process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert state_of(tmp_path / "killed")["iteration"] == 2
    assert len(list((tmp_path / "killed").glob(f".*{files.PARTIAL}"))) == 1
    assert train.main(command(*flags, "--resume", exp="killed")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob(".*"))


# --- stops


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(command, tmp_path, monkeypatch, capsys):
    step = Engine.step

    def poisoned(self, batch):
        if self.iteration == 2:
            batch.image[1] = torch.nan
        return step(self, batch)

    monkeypatch.setattr(Engine, "step", poisoned)
    argv = command("--method", "supervised", "--max_iterations", "4", "--save_every", "1")
    error = refused(lambda: train.main(argv), capsys)
    for words in ("iteration 3", "phantom_00", f"last good checkpoint is {tmp_path / 'run' / runs.LAST}", "--base_lr"):
        assert words in error
    assert state_of(tmp_path / "run")["iteration"] == 2
    assert f"stopped: {error.removeprefix('error: ').strip()}" in (tmp_path / "run" / runs.LOG).read_text()


def test_a_disk_that_fills_up_stops_the_run_with_one_sentence(command, tmp_path, monkeypatch, capsys):
    save = torch.save

    def fill_up(state, path):
        if state["iteration"] == 2:
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        save(state, path)

    monkeypatch.setattr(torch, "save", fill_up)
    argv = command("--method", "supervised", "--max_iterations", "3", "--save_every", "1")
    error = refused(lambda: train.main(argv), capsys)
    assert f"cannot write {tmp_path / 'run' / runs.LAST}" in error and "--model_path" in error
    assert state_of(tmp_path / "run")["iteration"] == 1


def test_the_first_error_is_told_though_closing_the_files_fails_too(command, monkeypatch, capsys):
    def no_room(self):
        raise InputError("no room for the curves")

    def first(self, batch):
        monkeypatch.setattr(journal.Journal, "close", no_room)
        raise InputError("what went wrong first")

    monkeypatch.setattr(Engine, "step", first)
    assert refused(lambda: train.main(command("--max_iterations", "1")), capsys) == "error: what went wrong first\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--method dtml --sdm_k_start 10 --sdm_k 100 --rampup_share 1",
            "consistency rising to 1 over 3; k from 10 to 100",
        ),
        ("--method dtml --branch sdm --sdm_k_start 0", "times 0.1 every"),
        ("--method asdnet --semi_start 1", "consistency rising to 0.3 over 2 from iteration 1 on"),
        ("--method ua_mt", "over 3; uncertainty threshold from 0.521 to 0.693"),
        ("--method supervised", "times 0.1 every"),
    ],
)
def test_the_log_has_what_changes_over_the_training(command, tmp_path, flags, words):
    assert train.main(command("--max_iterations", "3", *flags.split())) == 0
    assert words in (tmp_path / "run" / runs.LOG).read_text()


def test_too_little_gpu_memory_is_one_sentence(command, monkeypatch, capsys):
    def out_of_memory(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmany lines")

    monkeypatch.setattr(Engine, "step", out_of_memory)
    error = refused(lambda: train.main(command("--max_iterations", "1")), capsys)
    assert "--batch_size" in error


def test_too_little_memory_of_the_machine_is_one_sentence_and_makes_no_folder(command, tmp_path, capsys):
    error = refused(lambda: train.main(command("--n_filters", "1000000")), capsys)
    assert "cpu" in error and "--batch_size" in error
    assert not (tmp_path / "run").exists()


# --- several classes


VALIDATED = "--labelnum 4 --val_cases 1 --val_every 1 --report_every 1 --image_every 1".split()


def test_a_run_of_two_classes_says_so_and_logs_the_dice_of_each(command, two_classes, tmp_path):
    flags = ["--root_path", str(two_classes), "--max_iterations", "1", *VALIDATED]
    assert train_dtml.main(command(*flags)) == 0
    folder, state = tmp_path / "run", state_of(tmp_path / "run")
    classes = classes_of_record(state["classes"])
    names = [one.name for one in classes]
    assert classes == read_classes(two_classes, "phantom_000") and len(names) == 2
    assert state["options"]["num_classes"] == json.loads((folder / runs.OPTIONS).read_text())["num_classes"] == 2
    log = (folder / runs.LOG).read_text()
    assert f"2 classes ({', '.join(names)})" in log
    for line in (line for line in log.splitlines() if "Dice" in line):
        found = re.findall(rf"([\d.]+) \({names[0]} ([\d.]+), {names[1]} ([\d.]+)\)", line)
        assert found and all(abs(float(a) - (float(b) + float(c)) / 2) < 0.11 for a, b, c in found)
    row = curves_of(folder)[-1]
    each = [float(row[f"validation/dice_{name}"]) for name in names]
    assert float(row["validation/dice"]) == pytest.approx(sum(each) / 2)
    events = EventAccumulator(str(folder / runs.TENSORBOARD)).Reload()
    assert "training" in events.Tags()["images"]


def test_a_run_of_one_class_records_it_and_does_not_mention_classes(command, tmp_path):
    assert train_dtml.main(command("--max_iterations", "1", *VALIDATED)) == 0
    assert classes_of_record(state_of(tmp_path / "run")["classes"]) == ONE_CLASS
    assert "classes (" not in (tmp_path / "run" / runs.LOG).read_text()
    assert {key for key in curves_of(tmp_path / "run")[-1] if key.startswith("validation")} == {"validation/dice"}


def test_resuming_with_other_classes_is_one_sentence(command, two_classes, tmp_path, capsys):
    scans = Path(shutil.copytree(two_classes, tmp_path / "copy"))
    flags = command("--root_path", str(scans), "--max_iterations", "1")
    assert train_dtml.main(flags) == 0
    capsys.readouterr()
    assert "--num_classes 1" in refused(lambda: train_dtml.main([*flags, "--resume", "--num_classes", "1"]), capsys)
    for case in scans.glob("phantom_*"):
        with h5py.File(case / "mri_norm2.h5", "r+") as file:
            file.attrs.update(class_attributes((LabelClass("other", (1,)), LabelClass("two", (2,)))))
    error = refused(lambda: train_dtml.main([*flags, "--resume"]), capsys)
    assert "other, two" in error and "--root_path" in error
    state = state_of(tmp_path / "run")
    del state["classes"]  # a run from before there were several, which goes by its options
    runs.save_checkpoint(tmp_path / "run" / runs.LAST, state)
    assert train_dtml.main([*flags, "--resume"]) == 0


def test_a_run_from_before_there_were_classes_goes_on_with_one(command, tmp_path):
    flags = command("--max_iterations", "1")
    assert train_dtml.main(flags) == 0
    state = state_of(tmp_path / "run")
    del state["classes"], state["options"]["num_classes"]
    runs.save_checkpoint(tmp_path / "run" / runs.LAST, state)
    assert train_dtml.main([*flags, "--resume", "--num_classes", "1"]) == 0
    assert state_of(tmp_path / "run")["options"]["num_classes"] == 1


def test_weights_of_one_class_are_no_start_for_two(command, two_classes, tmp_path, capsys):
    flags = ["--method", "supervised", "--max_iterations", "1"]
    assert train.main(command(*flags)) == 0
    capsys.readouterr()
    tuned = command(*flags, "--root_path", str(two_classes), "--init_from", "run", exp="tuned")
    assert "'num_classes': 1" in refused(lambda: train.main(tuned), capsys)
    assert not (tmp_path / "tuned").exists()


def test_two_ranks_train_two_classes_as_one_run(command, two_classes, tmp_path, in_ranks):
    flags = ["--method", "supervised", "--root_path", str(two_classes), "--max_iterations", "1", *VALIDATED]
    outcomes = in_ranks(lambda: train.main(command(*flags)))
    assert [outcome.status for outcome in outcomes] == [0, 0]
    state = state_of(tmp_path / "run")
    assert len(state["classes"]) == state["networks"]["network.heads.softmax.bias"].numel() - 1 == 2


# --- bad input: one sentence, status 2, no folder


def refused(call: Callable[[], int], capsys) -> str:
    """The one line on stderr of a script that ends with status 2."""
    with pytest.raises(SystemExit) as end:
        run_script(call)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


def edit(root: Path, case: str, **changes) -> None:
    """Replace data sets of a case; None deletes one."""
    with h5py.File(root / case / "mri_norm2.h5", "r+") as file:
        for key, value in changes.items():
            del file[key]
            if value is not None:
                file[key] = value


def no_list(root: Path) -> None:
    (root / "train.list").unlink()


def empty_list(root: Path) -> None:
    (root / "train.list").write_text("\n")


def misspelt_case(root: Path) -> None:
    (root / "train.list").write_text("phantom_000\nphantom_001\nphantom_002\nphantomm_003\n")


def overlap(root: Path) -> None:
    (root / "test.list").write_text("phantom_005\nphantom_006\n")


def no_image(root: Path) -> None:
    edit(root, "phantom_005", image=None)


def no_label(root: Path) -> None:
    edit(root, "phantom_001", label=None)


def other_shape(root: Path) -> None:
    edit(root, "phantom_001", label=np.zeros((4, 4, 4), np.uint8))


def other_values(root: Path) -> None:
    shape = (40, 36, 32)
    edit(root, "phantom_001", label=np.full(shape, 255, np.uint8), image=np.random.default_rng(0).normal(size=shape))


def nan_in_image(root: Path) -> None:
    edit(root, "phantom_004", image=np.full((40, 36, 32), np.nan, np.float32))


def truncated(root: Path) -> None:
    path = root / "phantom_003" / "mri_norm2.h5"
    os.truncate(path, path.stat().st_size // 2)


def nothing(root: Path) -> None:
    pass


def two_values(root: Path) -> None:
    label = np.random.default_rng(0).integers(0, 3, (40, 36, 32)).astype(np.uint8)
    edit(root, "phantom_001", label=label, image=label.astype(np.float32))


def two_recorded(root: Path) -> None:
    for case in root.glob("phantom_*"):
        with h5py.File(case / "mri_norm2.h5", "r+") as file:
            file.attrs.update(class_attributes((LabelClass("one", (1,)), LabelClass("two", (2,)))))


def no_foreground(root: Path) -> None:
    for path in root.glob("*/mri_norm2.h5"):
        with h5py.File(path, "r+") as file:
            file["label"][...] = 0


def garbage(root: Path) -> None:
    (root / "weights.pth").write_bytes(b"no weights")


BAD_INPUT = [
    (no_list, "", ["train.list does not exist", "--train_list"]),
    (nothing, "--train_list nowhere.list", ["nowhere.list does not exist", "--train_list"]),
    (nothing, "--root_path nowhere", ["nowhere", "--root_path"]),
    (nothing, "--labeled_list nowhere.list", ["nowhere.list does not exist", "--labeled_list"]),
    (nothing, "--test_list nowhere.list", ["nowhere.list does not exist", "--test_list"]),
    (empty_list, "", ["train.list names no case", "--train_list"]),
    (misspelt_case, "", ["phantomm_003/mri_norm2.h5 does not exist", "correct case phantomm_003"]),
    (overlap, "", ["phantom_005", "train.list", "test.list"]),
    (no_image, "", ["phantom_005/mri_norm2.h5", "'image'"]),
    (no_label, "", ["phantom_001/mri_norm2.h5", "'label'"]),
    (other_shape, "", ["phantom_001/mri_norm2.h5", "shape (4, 4, 4)"]),
    (other_values, "", ["phantom_001/mri_norm2.h5", "values other than 0 and 1", "255"]),
    (nan_in_image, "", ["phantom_004/mri_norm2.h5", "NaN"]),
    (nan_in_image, "--cache none", ["phantom_004/mri_norm2.h5", "NaN"]),
    (other_values, "--cache none", ["phantom_001/mri_norm2.h5", "values other than 0 and 1"]),
    (nan_in_image, "--labelnum 5 --val_cases 1", ["phantom_004/mri_norm2.h5", "NaN"]),
    (two_values, "", ["phantom_001/mri_norm2.h5", "--num_classes 2"]),
    (two_values, "--cache none", ["phantom_001/mri_norm2.h5", "--num_classes 2"]),
    (two_values, "--num_classes 3", ["label 3", "--num_classes"]),
    (two_values, "--num_classes 3 --cache none", ["label 3", "--num_classes"]),
    (two_recorded, "", ["two", "--num_classes"]),
    (two_recorded, "--num_classes 1", ["phantom_000", "--num_classes 1", "one, two"]),
    (nothing, "--num_classes 0", ["--num_classes"]),
    (nothing, "--num_classes 256", ["--num_classes"]),
    (no_foreground, "", ["foreground", "--labelnum"]),
    (truncated, "", ["phantom_003/mri_norm2.h5", "damaged"]),
    (nothing, "--labelnum 7", ["--labelnum 7", "6 cases"]),
    (nothing, "--labelnum 6", ["--labelnum", "unlabeled"]),
    (nothing, "--val_cases 3", ["--val_cases 3"]),
    (nothing, "--patch_size 0 32 32", ["--patch_size"]),
    (nothing, "--patch_size 112 112 80", ["--patch_size 48 48 32"]),
    (garbage, "--pretrained {root}/weights.pth", ["weights.pth", "--pretrained"]),
    (nothing, "--pretrained nowhere.pth", ["nowhere.pth", "--pretrained"]),
    (nothing, "--device cpu --gpu 0", ["--device cpu", "--gpu 0"]),
    (nothing, "--amp fp16", ["--amp fp16"]),
    (nothing, "--head teacher", ["--head teacher", "seg, sdm, mean"]),
    (nothing, "--exp ../run", ["--exp ../run"]),
    (nothing, "--model_path {root}/train.list", ["train.list", "--model_path"]),
]


@pytest.mark.parametrize(("damage", "flags", "words"), BAD_INPUT, ids=lambda value: getattr(value, "__name__", None))
def test_bad_input_is_one_sentence_and_writes_nothing(command, scans, tmp_path, capsys, damage, flags, words):
    damage(scans)
    argv = [*command("--root_path", str(scans)), *flags.format(root=scans).split()]
    before = sorted(path for path in tmp_path.rglob("*"))
    error = refused(lambda: train_dtml.main(argv), capsys)
    assert all(word in error for word in words), error
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flag", [["--gpu", "0"], ["--device", "cuda"]])
def test_a_gpu_that_is_not_there_is_one_sentence(command, tmp_path, capsys, flag, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = command(*flag)
    del argv[argv.index("--device") : argv.index("--device") + 2]  # the first one: cpu
    error = refused(lambda: train_dtml.main(argv), capsys)
    assert f"{' '.join(flag)} was asked for" in error and "--device cpu" in error
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_an_error_and_bad_input_does_not_overwrite_it(command, scans, tmp_path, capsys):
    flags = ("--method", "supervised", "--max_iterations", "1", "--root_path", str(scans))
    train.main(command(*flags))
    before = (tmp_path / "run" / runs.LAST).read_bytes()
    error = refused(lambda: train.main(command(*flags)), capsys)
    assert "--resume" in error and "--overwrite" in error and "--exp" in error
    truncated(scans)
    edit(scans, "phantom_001", label=None)
    assert "phantom_001" in refused(lambda: train.main(command(*flags, "--overwrite")), capsys)
    assert (tmp_path / "run" / runs.LAST).read_bytes() == before


@pytest.mark.parametrize("cause", ["batch norm of several processes", "no room on the device"])
def test_what_the_device_refuses_does_not_overwrite_a_run(command, tmp_path, capsys, monkeypatch, cause):
    flags = ("--method", "supervised", "--max_iterations", "1")
    train.main(command(*flags))
    before = (tmp_path / "run" / runs.LAST).read_bytes()
    if cause == "no room on the device":
        full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
        monkeypatch.setattr(torch.nn.Module, "to", full)
    else:
        monkeypatch.setattr(device, "syncs_batch_norm", lambda *_: True)
    error = refused(lambda: train.main(command(*flags, "--overwrite", "--recompute")), capsys)
    assert "--recompute" in error
    assert (tmp_path / "run" / runs.LAST).read_bytes() == before


@pytest.mark.parametrize("folder", ["runs", "runs of today"])
def test_the_printed_next_command_is_right_where_it_was_typed(phantom, tmp_path, monkeypatch, capsys, folder):
    monkeypatch.chdir(tmp_path)
    where = ["--root_path", str(phantom), "--model_path", folder, "--exp", "my run"]
    assert train.main([*FLAGS, *where, "--method", "supervised", "--max_iterations", "1"]) == 0
    words = shlex.split(re.search(r"next: (.*)", capsys.readouterr().out).group(1))
    assert Path(words[1]).name == "test_LA.py" and Path(words[1]).exists()
    asked = dict(zip(words[2::2], words[3::2], strict=True))
    assert (Path(asked["--model_path"]) / asked["--exp"] / runs.LAST).exists()


@pytest.mark.parametrize(("k", "amp", "warned"), [(1500, "bf16", True), (1500, "off", False), (100, "bf16", False)])
def test_a_steep_transform_in_bf16_warns(k, amp, warned):
    assert bool(_steep_in_bf16(Namespace(sdm_k=k, amp=amp))) == warned
    assert not _steep_in_bf16(Namespace(amp=amp))  # a method without that transform


def test_a_wrong_checkpoint_is_one_sentence(command, tmp_path, capsys):
    flags = ("--method", "supervised", "--max_iterations", "1")
    train.main(command(*flags))
    path = tmp_path / "run" / runs.LAST
    os.truncate(path, path.stat().st_size // 2)
    assert str(path) in refused(lambda: train.main(command(*flags, "--resume")), capsys)


def test_a_run_carries_the_preprocessing_of_its_scans_and_does_not_go_on_with_another(command, scans, tmp_path, capsys):
    argv = command("--method", "supervised", "--max_iterations", "1", "--root_path", str(scans))
    chosen = Preprocessing((1.0, 1.0, 2.0), "percentile", (1.0, 99.0), "RAS")
    files.write_json(scans / RECORD, chosen.as_record())
    train.main(argv)
    assert Preprocessing.from_record(state_of(tmp_path / "run")["preprocessing"]) == chosen
    files.write_json(scans / RECORD, Preprocessing().as_record())
    error = refused(lambda: train.main([*argv, "--resume"]), capsys)
    assert str(scans) in error
    files.write_json(scans / RECORD, {"normalise": "minmax"})
    error = refused(lambda: train.main([*argv, "--overwrite"]), capsys)
    assert "minmax" in error and str(scans / RECORD) in error
    assert state_of(tmp_path / "run")["iteration"] == 1  # the old run is still there


def test_resuming_with_other_settings_is_one_sentence(command, capsys):
    base = command("--method", "supervised", "--max_iterations", "1")
    train.main(base)
    for flag, value in (("--seed", 5), ("--method", "dtml"), ("--preset", "cpu")):
        error = refused(lambda flag=flag, value=value: train.main([*base, "--resume", flag, str(value)]), capsys)
        assert f"{flag} {value}" in error
    shorter = command("--method", "supervised", "--max_iterations", "2", exp="longer")
    train.main(shorter)
    assert "--max_iterations 1" in refused(lambda: train.main([*shorter, "--resume", "--max_iterations", "1"]), capsys)


def test_resuming_knows_the_method_of_the_run_and_a_larger_length(command, capsys):
    base = command("--method", "ua_mt", "--max_iterations", "1")
    train.main(base)
    folder = Path(base[base.index("--model_path") + 1]) / "run"
    where = base[: base.index("--method")] + base[base.index("--method") + 2 :]
    assert train.main([*where, "--resume", "--max_iterations", "2"]) == 0
    options = json.loads((folder / runs.OPTIONS).read_text())
    assert options["method"] == "ua_mt" and options["max_iterations"] == 2
    assert "sdm_k" not in options and "mc_passes" in options
    assert runs.load_checkpoint(folder / runs.LAST)["iteration"] == 2
    assert "--ema_decay 0.5" in refused(lambda: train.main([*where, "--resume", "--ema_decay", "0.5"]), capsys)
    (folder / runs.OPTIONS).unlink()
    longer = ["--resume", "--max_iterations", "2"]
    assert "--method" in refused(lambda: train.main([*where, *longer]), capsys)
    assert train.main([*base, *longer]) == 0


def test_the_published_command_does_not_resume_another_method(command, capsys):
    train.main(command("--method", "supervised", "--max_iterations", "1"))
    error = refused(lambda: train_dtml.main(command("--max_iterations", "1", "--resume")), capsys)
    assert "--method dtml" in error


@pytest.mark.slow  # switching determinism on imports the compiler
def test_deterministic_kernels_cover_a_training(command):
    try:
        assert train_dtml.main(command("--max_iterations", "1", "--deterministic", "--sdm_supervision", "both")) == 0
    finally:
        torch.use_deterministic_algorithms(False)


# --- several processes


def test_two_ranks_train_as_one_run_and_rank_0_alone_writes(command, tmp_path, in_ranks):
    flags = ("--max_iterations", "4", "--val_cases", "1", "--val_every", "4", "--image_every", "4")
    first, second = in_ranks(lambda: train_dtml.main(command(*flags)))
    assert (first.status, second.status, second.output) == (0, 0, "")
    folder = tmp_path / "run"
    assert_curves_and_pictures(folder)
    log = (folder / runs.LOG).read_text()
    notices = (
        "run: dtml, 2 labeled and 3 unlabeled cases",
        "2 processes, each with such a batch: 4 crops per iteration",
        "batch norm per process, running statistics of rank 0",
        "validation Dice",
        "done: 4 iterations",
    )
    for words in notices:
        assert log.count(words) == 1 and first.output.count(words) == 1, words
    assert first.output.count("volumes are smaller than the patch") <= 1
    assert state_of(folder)["world_size"] == 2 and state_of(folder)["iteration"] == 4


def test_logged_losses_are_means_over_ranks(command, tmp_path, in_ranks):
    """At the first iteration: the losses of both halves of the batch, which one process can compute apart."""
    flags = ("--method", "supervised", "--max_iterations", "1", "--dropout", "0")
    in_ranks(lambda: train.main(command(*flags)))
    losses = []
    for rank in (0, 1):
        options = train.parse_options(command(*flags, exp="other"))
        split = settle(options)
        runs.seed_everything(options.seed)
        engine = Engine(options, METHODS["supervised"](options), split, tmp_path, torch.device("cpu"))
        store = CaseStore(options, split.labeled, split.unlabeled)
        batch = BatchStream(options, store, split.labeled, split.unlabeled, Ranks(rank, 2))[0]
        losses.append(engine.step(batch)["loss/supervised"])
    assert losses[0] != losses[1]
    assert float(curves_of(tmp_path / "run")[0]["loss/supervised"]) == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on_as_if_it_had_not(command, tmp_path, in_ranks, monkeypatch):
    """SASSNet: two players, dropout, and a turn that reads batch norm's running statistics."""
    flags = ("--method", "sassnet", "--max_iterations", "3", "--save_every", "10")
    work = in_ranks(lambda: train.main(command(*flags, exp="whole")))
    assert [outcome.status for outcome in work] == [0, 0]
    step = Engine.step

    def step_and_send(self, batch):
        if self.iteration == 1 and self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # torchrun repeats what a scheduler sent
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", step_and_send)
        first, second = in_ranks(lambda: train.main(command(*flags, exp="parts")))
    assert (first.value, second.value) == (128 + signal.SIGTERM,) * 2
    assert first.output.count("stopped and saved at iteration 2; continue with --resume") == 1
    assert state_of(tmp_path / "parts")["iteration"] == 2
    work = in_ranks(lambda: train.main(["--exp", "parts", "--model_path", str(tmp_path), "--resume"]))
    assert [outcome.status for outcome in work] == [0, 0], work
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert "processes, resumed with" not in (tmp_path / "parts" / runs.LOG).read_text()


def test_a_loss_of_rank_1_that_is_not_finite_stops_all(command, tmp_path, in_ranks, monkeypatch):
    step = Engine.step

    def poisoned(self, batch):
        if self.iteration == 1 and self.ranks.rank == 1:
            batch.image[0] = torch.nan
        return step(self, batch)

    monkeypatch.setattr(Engine, "step", poisoned)
    flags = ("--method", "supervised", "--max_iterations", "4", "--save_every", "1")
    first, second = in_ranks(lambda: train.main(command(*flags)))
    assert (first.status, second.status) == (2, 2)
    assert second.output.startswith("error: rank 1: the loss is not finite in iteration 2")
    last = tmp_path / "run" / runs.LAST
    message = first.output.splitlines()[-1]
    assert f"{last} with --resume" in message
    assert message.removeprefix("error: ") in (tmp_path / "run" / runs.LOG).read_text()
    assert state_of(tmp_path / "run")["iteration"] == 1 and len(curves_of(tmp_path / "run")) == 1


def test_a_run_goes_on_with_another_number_of_processes(command, tmp_path, in_ranks, monkeypatch):
    flags = ("--method", "supervised", "--max_iterations", "3")
    with monkeypatch.context() as patch:
        send_at(patch, iteration=1)
        assert train.main(command(*flags)) == 128 + signal.SIGTERM
    first, _ = in_ranks(lambda: train.main(command(*flags, "--resume")))
    assert first.status == 0 and first.output.count("1 before, 2 now") == 1
    assert state_of(tmp_path / "run")["iteration"] == 3
    assert [row["iteration"] for row in curves_of(tmp_path / "run")] == ["1", "2", "3"]


def test_bad_input_is_one_sentence_of_one_rank(command, tmp_path, in_ranks):
    first, second = in_ranks(lambda: train.main(command("--method", "supervised", "--labelnum", "7")))
    assert (first.status, second.status, second.output) == (2, 2, "")
    assert first.output.startswith("error: --labelnum 7") and first.output.count("\n") == 1
    first, second = in_ranks(lambda: train.main(command("--no_such_flag")))
    assert second.output == "" and "--no_such_flag" in first.output
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_the_weights_of_another(command, capsys, tmp_path):
    base = ["--method", "supervised", "--max_iterations", "1"]
    train.main(command(*base))
    first = runs.load_checkpoint(tmp_path / "run" / runs.LAST)
    tuned = command("--method", "supervised", "--max_iterations", "0", "--init_from", "run", exp="tuned")
    assert train.main(tuned) == 0
    second = runs.load_checkpoint(tmp_path / "tuned" / runs.LAST)
    assert_same(first["networks"], second["networks"])
    assert second["iteration"] == 0
    capsys.readouterr()
    other = command("--method", "dtml", "--max_iterations", "1", "--init_from", "run", exp="other")
    assert "run" in refused(lambda: train.main(other), capsys)
    assert "--init_from" in refused(lambda: train.main([*tuned, "--overwrite", "--pretrained", "x.pth"]), capsys)
    assert "--exp" in refused(lambda: train.main(command(*base, "--init_from", "none", exp="other")), capsys)
    assert not (tmp_path / "other").exists()


def test_a_run_that_saw_test_cases_is_no_start(command, capsys, phantom, tmp_path):
    base = ["--method", "supervised", "--max_iterations", "1"]
    train.main(command(*base))
    seen = tmp_path / "seen.list"
    seen.write_text((phantom / "train.list").read_text().splitlines()[0] + "\n")
    mine = tmp_path / "train.list"
    mine.write_text("\n".join((phantom / "train.list").read_text().splitlines()[1:]) + "\n")
    lists = ["--train_list", str(mine), "--test_list", str(seen)]
    assert "--init_from" in refused(lambda: train.main(command(*base, *lists, "--init_from", "run", exp="b")), capsys)
