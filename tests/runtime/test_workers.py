"""Processes that work while the next item is made; their functions are a library's, for a test cannot be imported."""

import operator
import os
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest

from dataloaders.case_files import read_list
from runtime import workers
from runtime.workers import affordable_workers, in_order
from utils.errors import InputError

CODE = Path(workers.__file__).parents[1]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_come_in_the_order_of_the_items_and_few_items_are_held(workers):
    made: list[int] = []

    def items():
        for item in range(6):
            made.append(item)
            yield -item

    ahead = []
    for index, result in enumerate(in_order(abs, items(), workers, "--flag")):
        assert result == index
        ahead.append(len(made) - index)
    assert max(ahead) == workers + 1 and ahead[-1] == 1


def test_work_is_done_in_other_processes():
    call = operator.methodcaller("__call__")
    assert list(in_order(call, [os.getpid], 0, "--flag")) == [os.getpid()]
    assert os.getpid() not in list(in_order(call, [os.getpid] * 3, 1, "--flag"))


def test_an_input_error_arrives_as_such(tmp_path):
    with pytest.raises(InputError, match="nowhere.list.*--train_list"):
        list(in_order(partial(read_list, flag="--train_list"), [tmp_path / "nowhere.list"], 1, "--flag"))


def test_a_worker_that_dies_is_one_sentence():
    with pytest.raises(InputError, match="--score_workers"):
        list(in_order(os._exit, [1, 1, 1], 1, "--score_workers"))


HANGS = """
import operator, os, time
from runtime.workers import in_order
for pid in in_order(operator.methodcaller("__call__"), [os.getpid, os.getpid], 1, "--flag"):
    print(pid, flush=True)
    time.sleep(1000)
"""


def test_workers_end_with_a_command_that_is_killed():
    process = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, text=True, cwd=CODE)
    worker = int(process.stdout.readline())
    os.kill(worker, 0)
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < end:
            os.kill(worker, 0)
            time.sleep(0.05)


def test_an_error_while_items_are_made_ends_the_work():
    def items():
        yield 1
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(in_order(abs, items(), 1, "--flag"))


# --- loader processes


@pytest.mark.parametrize(
    "free, processes, started",
    [(900, 1, 4), (899, 1, 3), (700, 1, 3), (300, 1, 1), (299, 1, 0), (0, 1, 0), (1800, 2, 4), (900, 2, 1)],
)
def test_shared_memory_limits_the_loader_processes(monkeypatch, tmp_path, free, processes, started):
    """A batch takes 100 bytes: each process makes two in advance, and one is in use."""
    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: Namespace(free=free))
    monkeypatch.setattr(workers, "available_cores", lambda: 8)
    number, notices = affordable_workers(4, 100, processes)
    assert number == started and len(notices) == (started < 4)
    assert all(f"--num_workers {started}" in line and "--shm-size" in line for line in notices)


def test_no_more_loader_processes_than_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path / "none")
    monkeypatch.setattr(workers, "available_cores", lambda: 2)
    assert affordable_workers(9, 100) == (2, []) and affordable_workers(0, 100) == (0, [])
