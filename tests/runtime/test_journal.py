"""Log, curves and TensorBoard of a run, fresh and resumed."""

import csv
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runtime import journal, runs
from runtime.journal import Journal, read_curves
from utils.errors import InputError


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until it is set."""
    clock = [0.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: clock[0])
    return clock


def written(folder: Path) -> list[dict[str, str]]:
    with open(folder / runs.CURVES, newline="") as file:
        return list(csv.DictReader(file))


def events(folder: Path) -> EventAccumulator:
    board = EventAccumulator(str(folder / runs.TENSORBOARD), size_guidance={"scalars": 0, "images": 0})
    return board.Reload()


def test_a_line_goes_to_the_terminal_and_with_its_time_to_the_log(tmp_path, capsys):
    book = Journal(tmp_path)
    book.say("first")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  first\n", (tmp_path / runs.LOG).read_text())
    book.close()
    Journal(tmp_path).say("second")
    assert capsys.readouterr().out == "first\nsecond\n"
    assert [line[21:] for line in (tmp_path / runs.LOG).read_text().splitlines()] == ["first", "second"]


def test_curves_hold_every_name_and_every_digit(tmp_path):
    book = Journal(tmp_path)
    book.scalars(10, {"loss/seg": 0.1 + 0.2, "rate": torch.tensor(0.5)})
    book.scalars(20, {"loss/seg": math.nan, "validation/dice": 1.0})
    book.close()
    rows = written(tmp_path)
    assert list(rows[0]) == ["iteration", "loss/seg", "rate", "validation/dice"]
    assert rows[0] == {"iteration": "10", "loss/seg": "0.30000000000000004", "rate": "0.5", "validation/dice": ""}
    assert rows[1] == {"iteration": "20", "loss/seg": "nan", "rate": "", "validation/dice": "1.0"}
    read = read_curves(tmp_path)
    assert read[0] == {"iteration": 10, "loss/seg": 0.1 + 0.2, "rate": 0.5}
    assert math.isnan(read[1]["loss/seg"])


def test_a_resumed_run_continues_its_curves_from_its_checkpoint(tmp_path):
    first = Journal(tmp_path)
    for iteration in (1, 2, 3):
        first.scalars(iteration, {"loss": iteration / 10})
    first.close()
    second = Journal(tmp_path, iteration=2)  # killed after iteration 3, saved after 2
    second.scalars(3, {"loss": 7.0})
    second.close()
    assert [(row["iteration"], row["loss"]) for row in written(tmp_path)] == [("1", "0.1"), ("2", "0.2"), ("3", "7.0")]
    fresh = Journal(tmp_path, iteration=0)  # nothing had been saved
    fresh.close()
    assert written(tmp_path) == []


def test_no_curves_yet(tmp_path):
    assert read_curves(tmp_path) == []


def test_curves_are_rewritten_seldom_but_always_when_asked(tmp_path, now, monkeypatch):
    count = []
    monkeypatch.setattr(os, "fsync", lambda handle: count.append(handle))
    book = Journal(tmp_path)
    for iteration in range(1, 101):
        book.scalars(iteration, {"loss/seg": 1.0})
    assert len(count) == 1 and len(written(tmp_path)) == 1
    book.write_curves()  # as before a checkpoint
    assert len(written(tmp_path)) == 100
    now[0] = journal.WRITE_EVERY
    book.scalars(101, {"loss/seg": 1.0})
    assert len(count) == 3 and len(written(tmp_path)) == 101
    book.scalars(102, {"loss/seg": 1.0})
    book.close()
    assert len(written(tmp_path)) == 102


def test_tensorboard_holds_scalars_and_pictures(tmp_path):
    book = Journal(tmp_path)
    book.scalars(10, {"loss/seg": 0.25, "learning_rate": 0.01})
    book.image(10, "training", np.zeros((4, 6, 3), np.uint8))
    book.close()
    board = events(tmp_path)
    assert [(e.step, e.value) for e in board.Scalars("loss/seg")] == [(10, 0.25)]
    assert board.Tags()["images"] == ["training"]
    assert (board.Images("training")[0].height, board.Images("training")[0].width) == (4, 6)


@pytest.mark.parametrize("iteration", [0, 2])
def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path, iteration):
    first = Journal(tmp_path)
    for step in (1, 2, 3):
        first.scalars(step, {"loss/seg": 1.0})
    first.close()
    # Files are named by the second and read in the order of their names.
    for path in (tmp_path / runs.TENSORBOARD).iterdir():
        path.rename(path.with_name(path.name.replace("tfevents.", "tfevents.0")))
    second = Journal(tmp_path, iteration)
    second.scalars(iteration + 1, {"loss/seg": 2.0})
    second.close()
    found = [(event.step, event.value) for event in events(tmp_path).Scalars("loss")]
    assert found == [(step, 1.0) for step in range(1, iteration + 1)] + [(iteration + 1, 2.0)]


def test_a_full_disk_is_one_sentence(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / runs.LOG).symlink_to("/dev/full")
    book = Journal(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path / runs.LOG}.*--model_path"):
        book.say("hello")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        Journal(tmp_path / "missing")
