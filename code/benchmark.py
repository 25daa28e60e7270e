"""What a training step, a scan, a batch and a metric cost here, beside what a user would otherwise run.

Both sides run in turns in one process (A B A B ...), on the same data, weights and threads, on the first GPU if there
is one; the ratio is the median of the ratios of neighbouring runs, the spread their quartiles. Before steps, scans,
maps and metrics are timed, both sides must agree in float32; rows in bf16 and with other windows compute something
else.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.data import time_batch, time_maps, time_metrics, time_start
from benchmarks.network import memory_of_step, share_of_matrix_rate, time_inference, time_openvino, time_step
from benchmarks.timing import LA_SHAPE, Measurement, bench_device
from options.parser import Parser
from options.types import at_least
from runtime.device import set_determinism
from utils import files
from utils.errors import InputError, run_script
from utils.words import counted

CPU_SIZE, PAPER_SIZE, RECOMPUTE = ("--preset", "cpu"), (), "--recompute"
SMALL = (96, 80, 48)  # voxels of a scan at half resolution
MEMORY_TARGET = 1 / 0.6
BENCHMARKS: dict[str, tuple[float, Callable[[], Measurement]]] = {  # target, measurement
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
LONG_BENCHMARKS = {
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
}


def parse_options(argv: Sequence[str] | None = None) -> Namespace:
    """Flags of the benchmark."""
    parser = Parser(description=__doc__, example="python code/benchmark.py --only step --json rows.json")
    parser.add_argument("--full", action="store_true", help="also the rows that take long")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows whose name contains one of these words")
    parser.add_argument("--threads", type=at_least(1), help="threads of PyTorch (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to this file, too")
    return parser.parse_args(argv)


def chosen_rows(options: Namespace) -> dict[str, tuple[float, Callable[[], Measurement]]]:
    """The rows that --only and --full ask for."""
    rows = BENCHMARKS | LONG_BENCHMARKS
    if not options.only:
        return rows if options.full else BENCHMARKS
    chosen = {name: row for name, row in rows.items() if any(word in name for word in options.only)}
    if not chosen:
        raise InputError(f"--only {' '.join(options.only)} fits no row; rows are: {'; '.join(rows)}")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the rows; returns the exit status."""
    options = parse_options(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    set_determinism(False)  # as in training: cuDNN picks its fastest kernels
    print(f"{bench_device()}, {counted(torch.get_num_threads(), 'thread')}, torch {torch.__version__}\n")
    rows = measured(chosen_rows(options))
    if options.json:
        files.write_json(options.json, {"rows": rows})
    return 0


def measured(chosen: Mapping[str, tuple[float, Callable[[], Measurement]]]) -> list[Measurement]:
    """Measure the rows and print each as it is there."""
    rows = []
    print(f"{'':46}{'ratio':>7}{'quartiles':>14}{'target':>8}{'ours':>11}{'reference':>12}  unit")
    for name, (target, measure) in chosen.items():
        row = {"name": name, "target": target, **measure()}
        low, high = row["spread"]
        print(
            f"{name:46}{row['ratio']:7.2f}{low:8.2f}-{high:<5.2f}{target:8.2f}{row['ours']:11.4f}"
            f"{row['reference']:12.4f}  {row['unit']}",
            flush=True,
        )
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
