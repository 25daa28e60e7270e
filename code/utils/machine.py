"""What this process may use of its machine: memory and cores, within the limits of containers and schedulers."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def available_memory() -> int:
    """Bytes that can be used without swapping, at most what the control groups of this process leave.

    Files in the page cache count as free.
    """
    try:
        fields = dict(line.split(":") for line in (ROOT / "proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024  # given in kB
    except (OSError, KeyError):  # not Linux: all that is installed
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min([free, *(_left(folder) for folder in _control_groups("memory"))]))


def available_cores() -> int:
    """Processors that this process may run on: its affinity, and the quota of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(_quota(folder) for folder in _control_groups("cpu"))]))


def _control_groups(controller: str) -> Iterator[Path]:
    """Folders with the limits of this process, of both versions of cgroups, from its own group to the outermost."""
    try:
        lines = (ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        base = ROOT / "sys/fs/cgroup" / (controller if names else "")
        folder = base / path.strip("/")  # in a container only the outermost may be there
        yield from (one for one in (folder, *folder.parents) if one.is_relative_to(base))


def _left(folder: Path) -> float:
    """Bytes that a control group has left; infinite without a limit."""
    for limit, usage, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            most = float((folder / limit).read_text().strip().replace("max", "inf"))
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        return most if math.isinf(most) else int(most - used + cached)
    return math.inf


def _quota(folder: Path) -> float:
    """Processors' worth of time that a control group grants, rounded up; infinite without a limit."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text() for name in files).split()
        except (OSError, ValueError):
            continue
        return math.inf if quota in ("max", "-1") else math.ceil(int(quota) / int(period))
    return math.inf
