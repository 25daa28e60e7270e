"""Reproduce a table or figure of the paper: every row trained, tested and set beside the printed metrics.

What is missing is trained, what was interrupted is resumed, what is done is left alone: a row is done when its
scores, from the same options, are in <out>/runs. Stop at any time; the same command continues. Several copies
may run at once and share the work. Flags that are not listed here go to train.py, for every row. The printed metrics
appear only where the lists are the official ones of the left atrium.
"""

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence

from options.parser import Parser
from options.presets import PRESETS
from options.types import PathHere, split_name
from paper.systems import SYSTEMS, TABLES
from utils.errors import INTERRUPTED, InputError, run_script

TARGETS = (*TABLES, "figure2", "curves", "all", "paired")


def parse_options(argv: Sequence[str] | None = None) -> tuple[Namespace, list[str]]:
    """The flags, and those that are handed on to every training run."""
    parser = Parser(
        usage="%(prog)s TARGET [flags] [flags of train.py]",
        description=__doc__,
        example="python code/reproduce.py table3 --seeds 1337 1338 1339 --gpu 0",
    )
    add = parser.add_argument
    add(
        "target",
        choices=TARGETS,
        help="what to reproduce; curves: the training loss of the rows; all: tables, figure 2, curves; "
        "paired: per-case statistics between two rows of --only that are done",
    )
    add("--preset", choices=tuple(PRESETS), default="paper", help="settings of every training run")
    add("--split", type=split_name, metavar="NAME", help="lists of every run, as for train.py (default: official)")
    add("--seeds", type=int, nargs="+", default=[1337], help="seeds of every row")
    add(
        "--only",
        nargs="+",
        choices=tuple(SYSTEMS),
        metavar="ROW",
        default=[],
        help="work on these rows alone (default: all of the target); figure2 draws them beside V-Net and DTML. "
        f"There are: {', '.join(SYSTEMS)}",
    )
    add("--model_path", action=PathHere, default="model/reproduce", help="folder of the runs")
    add("--out", action=PathHere, default="model/reproduce", help="folder of tables, figures and scores")
    add("--cases", nargs="+", metavar="ID", help="cases of figure2 (default: best, median, worst)")
    add(
        "--class",
        dest="class_name",
        metavar="NAME",
        help="class of tables and statistics, of a data folder with several (default: the mean over all)",
    )
    add("--tables_only", action="store_true", help="write what can be written now, train nothing")
    add(
        "--report",
        action="store_true",
        help="write <out>/report.html: the tables, and cases, distributions and curves of each row's first seed",
    )
    options, handed_on = parser.parse_known_args(argv)
    options.seeds = list(dict.fromkeys(options.seeds))
    if options.target == "paired" and len(set(options.only)) != 2:
        raise InputError("paired compares two rows: reproduce.py paired --only dtml_labeled m_d")
    if options.target in TABLES and options.only and not set(options.only) & set(TABLES[options.target]):
        rows = ", ".join(TABLES[options.target])
        raise InputError(f"--only {' '.join(options.only)} has no row of {options.target}: {rows}")
    return options, handed_on


def main(argv: Sequence[str] | None = None) -> int:
    """Train, test and write; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options, handed_on = parse_options(argv)
    from paper.work import reproduce  # PyTorch, which --help and typing errors do not wait for

    try:
        reproduce(options, handed_on)
    except KeyboardInterrupt:
        command = shlex.join(["python", "code/reproduce.py", *argv])
        print(f"\ninterrupted; the same command continues: {command}", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    run_script(main)
