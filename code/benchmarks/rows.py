"""The rows of benchmark.py: what each measures, the ratio that it should reach, and the table of them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from benchmarks.data import time_batch, time_maps, time_metrics, time_start
from benchmarks.network import (
    memory_of_step,
    share_of_matrix_rate,
    time_inference,
    time_method,
    time_openvino,
    time_step,
)
from benchmarks.timing import LA_SHAPE, Measurement
from options.methods import FLAGS
from utils.errors import InputError

Row = tuple[float | None, Callable[[], Measurement]]  # target, if there is one, and the measurement

CPU_SIZE, PAPER_SIZE, RECOMPUTE = ("--preset", "cpu"), (), "--recompute"
SMALL = (96, 80, 48)  # voxels of a scan at half resolution
MEMORY_TARGET = 1 / 0.6
BENCHMARKS: dict[str, Row] = {
    "step, cpu preset, bf16": (2.5, lambda: time_step(CPU_SIZE, "bf16", 7)),
    "step, cpu preset, float32": (2.5, lambda: time_step(CPU_SIZE, "off", 7)),
    "memory, cpu preset, bf16": (MEMORY_TARGET, lambda: memory_of_step(CPU_SIZE, "bf16", 3)),
    "memory, cpu preset, float32": (MEMORY_TARGET, lambda: memory_of_step(CPU_SIZE, "off", 3)),
    "step, cpu preset, float32, --recompute": (2.5, lambda: time_step((*CPU_SIZE, RECOMPUTE), "off", 7)),
    "memory, cpu preset, float32, --recompute": (
        MEMORY_TARGET,
        lambda: memory_of_step((*CPU_SIZE, RECOMPUTE), "off", 3),
    ),
    "matrix rate, cpu preset, bf16": (0.35, lambda: share_of_matrix_rate(CPU_SIZE, "bf16", 3)),
    "matrix rate, cpu preset, float32": (0.35, lambda: share_of_matrix_rate(CPU_SIZE, "off", 3)),
    "scan, cpu preset, paper's strides, float32": (3.0, lambda: time_inference(CPU_SIZE, SMALL, "off", "paper", 3)),
    "scan, cpu preset, paper's strides, bf16": (3.0, lambda: time_inference(CPU_SIZE, SMALL, "bf16", "paper", 3)),
    "scan, cpu preset, fast, bf16": (25.0, lambda: time_inference(CPU_SIZE, SMALL, "bf16", "fast", 3)),
    "batch, cases in memory": (20.0, lambda: time_batch(15)),
    "start, 80 cases, cpu preset": (1.0, lambda: time_start(CPU_SIZE, 3)),
    "start, 80 cases, paper's size": (1.0, lambda: time_start(PAPER_SIZE, 3)),
    "distance maps of a batch": (4.0, lambda: time_maps(9)),
    "metrics of a case": (8.0, lambda: time_metrics(False, 5)),
    "metrics of a case with false voxels far away": (8.0, lambda: time_metrics(True, 5)),
}
LONG_BENCHMARKS: dict[str, Row] = {
    "OpenVINO, cpu preset, fast, float32": (1.0, lambda: time_openvino(CPU_SIZE, SMALL, "off", 9)),
    "OpenVINO, cpu preset, fast, bf16": (1.0, lambda: time_openvino(CPU_SIZE, SMALL, "bf16", 9)),
    "step, paper's size, bf16": (2.5, lambda: time_step(PAPER_SIZE, "bf16", 3)),
    "step, paper's size, float32": (2.5, lambda: time_step(PAPER_SIZE, "off", 3)),
    "memory, paper's size, bf16": (MEMORY_TARGET, lambda: memory_of_step(PAPER_SIZE, "bf16", 1)),
    "memory, paper's size, float32": (MEMORY_TARGET, lambda: memory_of_step(PAPER_SIZE, "off", 1)),
    "memory, paper's size, float32, --recompute": (MEMORY_TARGET, lambda: memory_of_step((RECOMPUTE,), "off", 1)),
    "matrix rate, paper's size, bf16": (0.59, lambda: share_of_matrix_rate(PAPER_SIZE, "bf16", 3)),
    "matrix rate, paper's size, float32": (0.59, lambda: share_of_matrix_rate(PAPER_SIZE, "off", 3)),
    "scan, paper's size and strides, bf16": (3.0, lambda: time_inference(PAPER_SIZE, LA_SHAPE, "bf16", "paper", 2)),
    "scan, paper's size, fast, bf16": (25.0, lambda: time_inference(PAPER_SIZE, LA_SHAPE, "bf16", "fast", 2)),
    **{
        f"{size} preset, step of {method} beside V-Net": (None, partial(time_method, method, ("--preset", size), 15))
        for size in ("cpu", "hippocampus")
        for method in FLAGS
        if method != "supervised"
    },
}


def chosen_rows(full: bool, only: Sequence[str] | None) -> dict[str, Row]:
    """The rows that --only and --full ask for."""
    rows = BENCHMARKS | LONG_BENCHMARKS
    if not only:
        return rows if full else BENCHMARKS
    chosen = {name: row for name, row in rows.items() if any(word in name for word in only)}
    if not chosen:
        raise InputError(f"--only {' '.join(only)} fits no row; rows are: {'; '.join(rows)}")
    return chosen


def measured(chosen: Mapping[str, Row]) -> list[Measurement]:
    """Measure the rows and print each as it is there."""
    rows = []
    print(f"{'':58}{'ratio':>7}{'quartiles':>14}{'target':>8}{'ours':>11}{'reference':>12}  unit")
    for name, (target, measure) in chosen.items():
        row = {"name": name, "target": target, **measure()}
        low, high = row["spread"]
        aim = "" if target is None else f"{target:.2f}"
        print(
            f"{name:58}{row['ratio']:7.2f}{low:8.2f}-{high:<5.2f}{aim:>8}{row['ours']:11.4f}"
            f"{row['reference']:12.4f}  {row['unit']}",
            flush=True,
        )
        rows.append(row)
    return rows
