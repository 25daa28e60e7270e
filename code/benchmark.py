"""What a training step, a scan, a batch and a metric cost here, beside what a user would otherwise run.

Both sides run in turns in one process (A B A B ...), on the same data, weights and threads, on the first GPU if there
is one; the ratio is the median of the ratios of neighbouring runs, the spread their quartiles. Before steps, scans,
maps and metrics are timed, both sides must agree in float32; rows in bf16 and with other windows compute something
else.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from options.parser import Parser
from options.types import at_least
from utils import files
from utils.errors import run_script
from utils.words import counted


def parse_options(argv: Sequence[str] | None = None) -> Namespace:
    """Flags of the benchmark."""
    parser = Parser(description=__doc__, example="python code/benchmark.py --only step --json rows.json")
    parser.add_argument("--full", action="store_true", help="also the rows that take long")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows whose name contains one of these words")
    parser.add_argument("--threads", type=at_least(1), help="threads of PyTorch (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to this file, too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the rows; returns the exit status."""
    options = parse_options(argv)
    import torch  # --help does not wait for it

    from benchmarks.rows import chosen_rows, measured
    from benchmarks.timing import bench_device
    from runtime.device import set_determinism

    chosen = chosen_rows(options.full, options.only)
    if options.json:
        files.require_writable(options.json, "--json")
    if options.threads:
        torch.set_num_threads(options.threads)
    set_determinism(False)  # as in training: cuDNN picks its fastest kernels
    print(f"{bench_device()}, {counted(torch.get_num_threads(), 'thread')}, torch {torch.__version__}\n")
    rows = measured(chosen)
    if options.json:
        files.write_json(options.json, {"rows": rows}, "--json")
    return 0


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
