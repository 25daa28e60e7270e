"""What the rows of the benchmark share: two sides in turns, a process of its own, memory, made-up scans."""

import multiprocessing
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from dataloaders import case_files
from dataloaders.batch import BatchStream
from dataloaders.store import CaseStore

Measurement = dict[str, Any]  # `ratio` (reference / ours, the larger the better), `ours`, `reference`, `spread`, `unit`
LA_SHAPE = (200, 150, 88)  # voxels of a typical case of the LA set
DISTINCT_FILES = 8  # the other cases are links to these: many files to open, few to write


def timed_in_turns(ours: Callable[[], object], reference: Callable[[], object], pairs: int) -> Measurement:
    """Median seconds of both sides and of their ratio; the spread is between the quartiles of the ratios."""
    return compared([[_seconds(side) for side in (ours, reference)] for _ in range(pairs)])


def compared(pairs: Sequence[Sequence[float]]) -> Measurement:
    """A row from neighbouring measurements, (ours, reference) each."""
    ratios = [theirs / own for own, theirs in pairs]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    own, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {"ratio": statistics.median(ratios), "ours": own, "reference": theirs, "spread": [low, high], "unit": "s"}


def _seconds(side: Callable[[], object]) -> float:
    """Of a call, and of what it has left to the GPU."""
    _wait_for_gpu()
    start = time.perf_counter()
    side()
    _wait_for_gpu()
    return time.perf_counter() - start


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bench_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a fresh process, whose memory holds nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def added_gib(call: Callable[[], object]) -> float:
    """Memory in GiB that a call adds at its peak: resident, or allocated on the GPU if there is one.

    Linux hands the peak of a process on to those that it starts, so it is reset first.
    """
    device = bench_device()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """Resident memory of this process in GiB: VmRSS now, VmHWM at its peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 2**20  # given in kB


def balls(count: int, shape: Sequence[int], shift: float = 0.0) -> np.ndarray:
    """Rough balls, (count, *shape) boolean: what is segmented where there are no scans."""
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*(np.linspace(-1, 1, length) for length in shape), indexing="ij")
    noise = 0.05 * np.sin(9 * axes[0]) * np.cos(7 * axes[1]) * np.sin(8 * axes[2])
    centres = rng.uniform(-0.2, 0.2, (count, 3)) + shift
    return np.stack([sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) + noise < 0.3 for centre in centres])


def stream_of(options: Namespace, cases: Sequence[str], labeled: int) -> BatchStream:
    """The batches of a training run on these cases, the first of which are labeled."""
    groups = cases[:labeled], cases[labeled:]
    return BatchStream(options, CaseStore(options, *groups), *groups)


@contextmanager
def made_up_cases(count: int) -> Iterator[tuple[Path, list[str]]]:
    """A data folder of `count` cases of noisy balls, for the time of a `with`; its path and the names of the cases."""
    cases = [f"case{index:04}" for index in range(count)]
    with TemporaryDirectory() as folder:
        root = Path(folder)
        for index, label in enumerate(balls(min(count, DISTINCT_FILES), LA_SHAPE)):
            image = label + np.random.default_rng(index).standard_normal(label.shape, np.float32)
            case_files.write_case(root, cases[index], image, label, {})
        for index in range(DISTINCT_FILES, count):
            path = case_files.case_path(root, cases[index])
            path.parent.mkdir()
            path.hardlink_to(case_files.case_path(root, cases[index % DISTINCT_FILES]))
        yield root, cases
