"""When the time that is left is told, and sizes as people read them."""

import itertools

import pytest
import torch

from inference import progress
from inference.progress import Progress, in_units


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by 10 s whenever it is looked at; calls of the GPU's synchronisation are counted."""
    ticks, waits = itertools.count(0, 10), []
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    return waits


def test_a_cpu_tells_after_the_first_group(clock, capsys):
    with Progress(14, torch.device("cpu")) as count:
        for size in (4, 4, 4, 2):
            count(size)
    assert capsys.readouterr().out == "  about 0:00:25 left\n" and not clock  # 10 windows at 2.5 s


def test_a_gpu_tells_after_the_second_group_and_waits_for_its_kernels_until_then(clock, capsys):
    with Progress(14, torch.device("cuda")) as count:
        for size in (4, 4, 4, 2):
            count(size)
    assert capsys.readouterr().out == "  about 0:00:15 left\n" and len(clock) == 2  # 6 windows at 2.5 s


def test_nothing_is_told_of_work_that_is_done(clock, capsys):
    with Progress(4, torch.device("cpu")) as count:
        count(4)
    assert capsys.readouterr().out == ""


def test_sizes():
    assert [in_units(size) for size in (1, 2**20, 900 * 2**20, 2**30, 1700 * 2**20)] == [
        "1 MiB",
        "1 MiB",
        "900 MiB",
        "1.0 GiB",
        "1.7 GiB",
    ]
