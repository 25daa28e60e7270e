"""Score trained runs on the test list: a row per case, mean and spread; several runs are set side by side.

Runs that differ in nothing but their seed are one method; each method is compared with the first, paired by case and
seed. Settings that are not given here are those of the training; the defaults below are for one that set nothing.
Scores go to metrics.csv and metrics.json in the folder of the run, masks and pictures to folders beside them. On
several devices, torchrun --nproc_per_node N code/test_LA.py ... deals the cases out to N processes.
"""

import re
import shlex
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from options import flags
from options.parser import Parser
from options.parsing import of_training
from options.presets import COMPAT
from options.types import PathHere, at_least
from utils import files
from utils.errors import InputError, run_script
from utils.words import counted

if TYPE_CHECKING:
    from evaluation.comparison import TestedRun
    from runtime.distributed import Ranks

WEIGHTS = re.compile(r"last|best_val|iteration_\d+")


def make_parser() -> Parser:
    """Flags of a test; what a run was trained with is taken from the run."""
    parser = Parser(
        usage="%(prog)s --exp NAME [NAME ...] [flags]",
        description=__doc__,
        example="python code/test_LA.py --exp my_run --gpu 0",
    )
    parser.add_argument(
        "--exp",
        nargs="+",
        required=True,
        metavar="NAME",
        help="run to score; several are compared, and those that differ only in --seed are one method",
    )
    parser.add_argument("--model_path", action=PathHere, default="model", help="folder of all runs")
    parser.add_argument(
        "--weights",
        type=_weights,
        default="last",
        help="checkpoint to score: last, best_val, or iteration_<N> of a run with --keep_checkpoints; the scores of "
        "the latter two go to a folder of that name in the run",
    )
    parser.add_argument(
        "--skip", nargs="*", choices=("predictions", "figures"), default=[], help="what not to write: NIfTI, pictures"
    )
    parser.add_argument(
        "--score_workers",
        type=at_least(0),
        help="processes that score and write cases while the network goes on with the next; 0: no such process "
        "(default: none for fewer than 8 cases, else one for each two other cores, 4 at most)",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="write report.html to the folder of the run: tables, plots, slices, surfaces, curves; opens offline. Of "
        "several runs one report, in the folder of the first",
    )
    parser.add_argument(
        "--class", dest="class_name", metavar="NAME", help="compare this class (default: the mean over all classes)"
    )
    parser.add_argument("--verbose", action="store_true", help="print every output and filter, and every case")
    parser.add_argument("--verify_metrics", action="store_true", help="compare every score with medpy (slow)")
    flags.add_compat_option(parser)
    flags.add_path_options(parser)
    flags.add_device_options(parser, engine=True)
    flags.add_inference_options(parser, protocol="paper")
    return parser


def _weights(text: str) -> str:
    if not WEIGHTS.fullmatch(text):
        raise ArgumentTypeError(f"{text!r} is neither last, best_val nor iteration_<N>")
    return text


def parse_options(argv: Sequence[str] | None, exp: str, trained: dict[str, Any]) -> Namespace:
    """Options of one run: flags that are given > --protocol > --compat if given > those of its training.

    A --compat that is given takes the place of the training's: what came from that one has its default again.
    """
    parser = make_parser()
    stored = of_training(trained)
    given = parser.given(argv)
    if "compat" in given:
        compat = given["compat"]
        gone = COMPAT.get(trained["compat"], {}).items()
        stored = {key: value for key, value in stored.items() if (key, value) not in gone} | COMPAT.get(compat, {})
    protocol = given.get("protocol", parser.get_default("protocol"))
    parser.layer(stored, flags.protocol_defaults(protocol, trained["patch_size"]))
    return Namespace(**{**trained, **parser.defaults(), **given, "exp": exp})


def main(argv: Sequence[str] | None = None) -> int:
    """Score every run that is named; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"}.intersection(argv):
        make_parser().print_help()
        return 0
    from runtime.distributed import joined  # PyTorch, which --help does not wait for

    with joined() as ranks:
        score_runs(argv, ranks)
    return 0


def score_runs(argv: Sequence[str], ranks: "Ranks") -> None:
    """Score runs one after the other, each once, and on rank 0 print what came out."""
    from inference.scoring import score_run
    from paper.block import paper_block

    asked, folders = ranks.from_leader(lambda: _asked(argv))
    tested, printed = {}, []
    for exp, folder in folders.items():
        state, options = ranks.from_leader(partial(_load, argv, asked, exp, folder))
        run = score_run(folder, state, options, ranks)
        if run is not None:
            tested[exp] = run
            printed.append(paper_block(run.scores, options, state))
    if ranks.leads:
        print_scores([tested[exp] for exp in asked.exp], printed, asked)
        print_files([*tested.values()], printed, argv, asked)


def _asked(argv: Sequence[str]) -> tuple[Namespace, dict[str, Path]]:
    from runtime import runs

    asked = make_parser().parse_args(argv)
    if asked.report and "predictions" in asked.skip:
        raise InputError("--report shows the predictions that --skip predictions leaves out; drop one of them")
    return asked, {exp: runs.existing_run(asked.model_path, exp) for exp in asked.exp}


def _load(argv: Sequence[str], asked: Namespace, exp: str, folder: Path) -> tuple[dict[str, Any], Namespace]:
    from runtime import runs

    state = runs.load_checkpoint(runs.checkpoint_path(folder, asked.weights))
    return state, parse_options(argv, exp, state["options"])


def print_scores(tested: Sequence["TestedRun"], printed: Sequence[str], asked: Namespace) -> None:
    """One table: the cases of a run, or several runs side by side; --verbose adds the tables of each run."""
    from evaluation.comparison import comparison_table
    from evaluation.tables import FILTER_NAMES, case_table, summary_table

    for run in dict.fromkeys(tested) if asked.verbose or len(tested) == 1 else ():
        head, post = run.kind
        print(f"\n{run.name}: output {head}, {FILTER_NAMES[post]}, iteration {run.content['iteration']}\n")
        print(case_table(run.scores, head, post, {name: one.scores for name, one in run.by_class.items()}))
        if asked.verbose:
            print(f"\n{summary_table(run.scores)}")
    if len(tested) > 1:
        print(f"\n{comparison_table(tested)}")
    for block in dict.fromkeys(filter(None, printed)):
        print(f"\n{block}")
    if asked.verify_metrics:
        print(f"\n--verify_metrics: {_verified(tested)}")


def _verified(tested: Sequence["TestedRun"]) -> str:
    scores = [s for run in dict.fromkeys(tested) for one in run.by_class.values() or [run] for s in one.scores]
    compared = sum(score["volume_ml"] > 0 and score["label_ml"] > 0 for score in scores)
    empty = len(scores) - compared
    rest = f"; {counted(empty, 'other')} with an empty mask, for which medpy has no distance" if empty else ""
    return f"the scores of {counted(compared, 'prediction')} equal medpy's{rest}"


def print_files(tested: Sequence["TestedRun"], printed: Sequence[str], argv: Sequence[str], asked: Namespace) -> None:
    """Where the files are, and the command to go on with, as both can be typed here."""
    from runtime import runs

    print()
    for run in tested:
        files_of = {"scores in": runs.METRICS_CSV}
        if "predictions" not in asked.skip:
            files_of["masks in"] = runs.PREDICTIONS
        if "figures" not in asked.skip:
            files_of["pictures such as"] = f"{runs.FIGURES}/{next(iter(run.reported))}.png"
        print(f"{run.name}:", ", ".join(f"{what} {files.shown(run.folder / name)}" for what, name in files_of.items()))
    if asked.report:
        print(f"report: {files.shown(write_test_report(tested, printed))}")
        where = [] if asked.model_path == "model" else ["--model_path", str(files.repository_path(asked.model_path))]
        command = ["predict.py", "--exp", asked.exp[0], *where, "--input", "SCAN", "--output", "DIR"]
        print(f"next, the mask of another scan: {_typed(command)}")
    elif "predictions" not in asked.skip:
        print(f"next, a page with slices, surfaces and curves: {_typed(['test_LA.py', *argv, '--report'])}")


def _typed(command: Sequence[str]) -> str:
    script = files.shown(Path(__file__).with_name(command[0]))
    return f"python {script} {shlex.join(command[1:])}"


def write_test_report(tested: Sequence["TestedRun"], printed: Sequence[str]) -> Path:
    """One page on tested runs in the folder of the first; returns its path."""
    from evaluation.report import write_report  # plotly takes a second to import
    from runtime import runs

    path = tested[0].folder / runs.REPORT
    write_report(path, " and ".join(run.name for run in tested), tested, printed)
    return path


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
