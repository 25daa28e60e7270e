"""Memory and cores against the files of a made-up machine, in both versions of control groups."""

import os

import pytest

from utils import machine
from utils.machine import available_cores, available_memory

MIB = 2**20
VERSION_2 = {
    "proc/self/cgroup": "0::/job/step",
    "sys/fs/cgroup/job/memory.max": "max",
    "sys/fs/cgroup/job/memory.current": "0",
    "sys/fs/cgroup/job/memory.stat": "",
    "sys/fs/cgroup/job/step/memory.max": 100 * MIB,
    "sys/fs/cgroup/job/step/memory.current": 70 * MIB,
    "sys/fs/cgroup/job/step/memory.stat": f"anon 5\nactive_file {10 * MIB}\ninactive_file {20 * MIB}",
    "sys/fs/cgroup/job/cpu.max": "150000 100000",
    "sys/fs/cgroup/job/step/cpu.max": "max 100000",
}
VERSION_1 = {
    "proc/self/cgroup": "9:name=systemd:/\n4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": 100 * MIB,  # in a container, its own group is the outermost
    "sys/fs/cgroup/memory/memory.usage_in_bytes": 70 * MIB,
    "sys/fs/cgroup/memory/memory.stat": f"active_file 1\ntotal_active_file {10 * MIB}\ntotal_inactive_file {20 * MIB}",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
}


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A machine of 8 processors, with 400 MiB free, and further files."""

    def build(files):
        for name, text in {"proc/meminfo": "MemFree: 1 kB\nMemAvailable: 409600 kB\n", **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(str(text))
        monkeypatch.setattr(machine, "ROOT", tmp_path)
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)

    return build


@pytest.mark.parametrize("files, memory, cores", [({}, 400, 8), (VERSION_2, 60, 2), (VERSION_1, 60, 2)])
def test_the_least_of_all_limits_counts(made_up, files, memory, cores):
    made_up(files)
    assert (available_memory(), available_cores()) == (memory * MIB, cores)


def test_a_limit_above_what_is_free_does_not(made_up):
    made_up(VERSION_2 | {"sys/fs/cgroup/job/step/memory.max": 1000 * MIB, "sys/fs/cgroup/job/cpu.max": "max 100000"})
    assert (available_memory(), available_cores()) == (400 * MIB, 8)


def test_elsewhere_than_on_linux(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert available_memory() > MIB and available_cores() == 3


def test_this_machine():
    assert MIB < available_memory() < 2**50 and 1 <= available_cores() <= os.cpu_count()
