"""Score trained runs on the test list: a row per case, mean and spread, every output, with and without filter.

Several runs are set side by side, with the paired difference of each to the first. Settings that are not given here
are those of the training; the defaults below are for one that set nothing. Scores go to metrics.csv and metrics.json in
the folder of the run, predictions and figures to folders beside them. On several devices, torchrun --nproc_per_node N
code/test_LA.py ... deals the cases out to N processes.
"""

import csv
import math
import platform
import re
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dataloaders import case_files
from dataloaders.split import cases_of_training, cases_to_test, refuse_copies
from evaluation.figures import case_figure
from evaluation.metrics import evaluate, largest_component, summarise, verify_against_medpy
from evaluation.tables import Score, case_table, comparison_table, number, pick, summary_table
from inference.trained import reported_output, trained_method
from inference.windows import THRESHOLD, predict_volume
from methods.base import Method
from options import flags
from options.parser import Parser
from options.parsing import of_training
from options.presets import COMPAT
from options.types import PathHere, at_least
from paper.block import paper_block
from paper.jobs import read_scores
from runtime import runs
from runtime.device import enough_memory, machine, pick_device, place
from runtime.distributed import ALONE, Ranks, joined
from runtime.workers import in_order
from utils import files
from utils.errors import InputError, run_script
from utils.machine import available_cores
from utils.nifti import axes_are_lps, write_nifti

POSTS = {"none": lambda mask: mask, "lcc": largest_component}
WEIGHTS = re.compile(r"last|best_val|iteration_\d+")
FEW_CASES, MAX_WORKERS = 8, 4  # starting processes takes seconds, and one network keeps no more than a few busy
PACKAGES = ("torch", "numpy", "scipy", "edt")  # whose versions are written beside the scores


def make_parser() -> Parser:
    """Flags of a test; what a run was trained with is taken from the run."""
    parser = Parser(
        usage="%(prog)s --exp NAME [NAME ...] [flags]",
        description=__doc__,
        example="python code/test_LA.py --exp my_run --gpu 0",
    )
    parser.add_argument("--exp", nargs="+", required=True, metavar="NAME", help="run to score; several are compared")
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
        f"(default: none for fewer than {FEW_CASES} cases, else one for each two other cores, {MAX_WORKERS} at most)",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="write report.html to the folder of the run: tables, plots, slices, surfaces, curves; opens offline. Of "
        "several runs one report, in the folder of the first",
    )
    parser.add_argument("--verify_metrics", action="store_true", help="compare every score with medpy (slow)")
    flags.add_compat_option(parser)
    flags.add_path_options(parser)
    flags.add_device_options(parser)
    flags.add_inference_options(parser, protocol="paper")
    return parser


def _weights(text: str) -> str:
    if not WEIGHTS.fullmatch(text):
        raise ArgumentTypeError(f"{text!r} is neither last, best_val nor iteration_<N>")
    return text


def parse_options(argv: Sequence[str] | None, exp: str, trained: dict[str, Any]) -> Namespace:
    """Options of one run: by hand > --protocol > --compat by hand > those of its training.

    A --compat given by hand takes the place of the training's: what came from that one has its default again.
    """
    parser = make_parser()
    kept = of_training(trained)
    given = parser.given(argv)
    if "compat" in given:
        compat = given["compat"]
        gone = COMPAT.get(trained["compat"], {}).items()
        kept = {key: value for key, value in kept.items() if (key, value) not in gone} | COMPAT.get(compat, {})
    protocol = given.get("protocol", parser.get_default("protocol"))
    parser.layer(kept, flags.protocol_defaults(protocol, trained["patch_size"]))
    return Namespace(**{**trained, **parser.defaults(), **given, "exp": exp})


def main(argv: Sequence[str] | None = None) -> int:
    """Score every run that was asked for; returns the exit status."""
    with joined() as ranks:
        score_runs(argv, ranks)
    return 0


def score_runs(argv: Sequence[str] | None, ranks: Ranks) -> None:
    """Score runs one after the other and, on rank 0, print what came out."""
    asked, folders = ranks.from_leader(lambda: _asked(argv))
    reported, systems = {}, []
    for exp, folder in folders.items():
        state, options = ranks.from_leader(partial(_load, argv, asked, exp, folder))
        scores, head = score_run(folder, state, options, ranks)
        if ranks.leads:
            printed = paper_block(scores, options, state)
            print_run(scores, head, options, state, printed)
            systems.append((exp, runs.scores_folder(folder, asked.weights), printed))
        reported[f"{exp} ({head}, {options.post})"] = pick(scores, head, options.post)
    if ranks.leads and len(reported) > 1:
        print(f"\n{comparison_table(reported)}")
    if ranks.leads and asked.report:
        print(f"\nreport: {write_test_report(systems, files.repository_path(options.root_path))}")


def write_test_report(systems: Sequence[tuple[str, Path, str]], root: Path) -> Path:
    """One page on tested runs, (name, folder of the scores, the paper's figures) each; returns its path."""
    from evaluation.report import System, write_report  # plotly takes a second to import

    path = systems[0][1] / runs.REPORT
    parts = [
        System(exp, read_scores(folder / runs.METRICS_JSON), folder, printed, folder / runs.PREDICTIONS)
        for exp, folder, printed in systems
    ]
    write_report(path, " and ".join(exp for exp, _, _ in systems), parts, root)
    return path


def _asked(argv: Sequence[str] | None) -> tuple[Namespace, dict[str, Path]]:
    asked = make_parser().parse_args(argv)
    if asked.report and "predictions" in asked.skip:
        raise InputError("--report shows the predictions that --skip predictions leaves out; drop one of them")
    return asked, {exp: runs.existing_run(asked.model_path, exp) for exp in asked.exp}


def _load(argv: Sequence[str] | None, asked: Namespace, exp: str, folder: Path) -> tuple[dict[str, Any], Namespace]:
    state = runs.load_checkpoint(runs.checkpoint_path(folder, asked.weights))
    return state, parse_options(argv, exp, state["options"])


def score_run(folder: Path, state: dict[str, Any], options: Namespace, ranks: Ranks = ALONE) -> tuple[list[Score], str]:
    """Score one run and write metrics.csv, metrics.json, predictions and figures into its folder.

    Nothing is written unless every case is sound. Each rank writes the files of the cases that it predicts, rank 0
    the scores of all, in the order of the test list. Returns: the scores (none above rank 0), the reported output.
    """
    cases = ranks.from_leader(lambda: sound_cases(options, state))
    with ranks.leader_first():
        device = pick_device(options, ranks=ranks)
        method = trained_method(options, state, runs.checkpoint_path(folder, options.weights))
        place(method, device, options)
        head = reported_output(method, options)
        folder = runs.scores_folder(folder, options.weights)
        with files.writing(folder):
            folder.mkdir(exist_ok=True)
    start = time.perf_counter()
    mine = cases[ranks.rank :: ranks.size]
    masks = (predict_masks(method, case, options, device) for case in mine)
    score = partial(score_case, head=head, options=options, folder=folder)
    scored = in_order(score, masks, score_workers(options, len(mine), ranks), "--score_workers")
    hidden = None if ranks.leads else True  # None: unless there is a terminal
    by_case = dict(
        zip(mine, tqdm(scored, total=len(mine), unit="case", disable=hidden, dynamic_ncols=True), strict=True)
    )
    parts = ranks.to_leader(by_case)
    if parts is None:
        return [], head
    scores = [score for index, case in enumerate(cases) for score in parts[index % ranks.size][case]]
    tested = {"test_seconds": time.perf_counter() - start, "test_machine": machine(device)}
    write_scores(folder, scores, head, options, state, tested)
    return scores, head


def score_workers(options: Namespace, cases: int, ranks: Ranks = ALONE) -> int:
    """How many processes score: what --score_workers says, by default what the cores of a rank allow."""
    if options.score_workers is not None:
        return min(options.score_workers, cases)
    others = available_cores() // ranks.local_size - 1
    return 0 if cases < FEW_CASES else min(others // 2, MAX_WORKERS)


def sound_cases(options: Namespace, state: dict[str, Any]) -> list[str]:
    """The test list, none of whose cases may be damaged or known from training."""
    cases = cases_to_test(options)
    known = [case for case in cases if case in set(cases_of_training(state))]
    if known:
        raise InputError(
            f"{len(known)} cases of the test list, {known[0]} the first, were in the training of {options.exp}; "
            "name another list with --test_list or --split"
        )
    refuse_copies(files.repository_path(options.root_path), cases_of_training(state), cases)
    for case in cases:
        if faults := case_files.find_faults(files.repository_path(options.root_path), case):
            raise InputError(faults[0])
    return cases


def predict_masks(
    method: Method, case: str, options: Namespace, device: torch.device
) -> tuple[str, dict[str, np.ndarray]]:
    """A case, and its predicted mask by output, (W, H, D) boolean."""
    image = case_files.read_image(files.repository_path(options.root_path), case)
    with enough_memory(device, flags.LESS_WINDOW):
        probs = predict_volume(method, image, options, device)
    return case, {output: prob > THRESHOLD for output, prob in probs.items()}


def score_case(
    predicted: tuple[str, dict[str, np.ndarray]], head: str, options: Namespace, folder: Path
) -> list[Score]:
    """All outputs of one case, with and without the component filter; the reported one is written."""
    case, masks = predicted
    root = files.repository_path(options.root_path)
    image, label = case_files.read_image(root, case), case_files.read_label(root, case)
    geometry = case_files.read_geometry(root, case)
    scores = []
    for output, raw in masks.items():
        for post, clean in POSTS.items():
            mask = clean(raw)
            values = evaluate(mask, label, geometry[0], options.eval_empty)
            if options.verify_metrics:
                verify_against_medpy(values, mask, label, geometry[0])
            scores.append({"case": case, "head": output, "post": post, **values})
            if (output, post) == (head, options.post):
                write_case(folder, case, image, label, mask, geometry, scores[-1], options.skip)
    return scores


def write_case(folder, case, image, label, mask, geometry, score: Score, skip: Sequence[str]) -> None:
    """The reported prediction as NIfTI and as a picture."""
    if "predictions" not in skip:
        (folder / runs.PREDICTIONS).mkdir(exist_ok=True)
        write_nifti(folder / runs.PREDICTIONS / f"{case}.nii.gz", mask, *geometry)
    if "figures" not in skip:
        (folder / runs.FIGURES).mkdir(exist_ok=True)
        title = f"{case}\nDice {number('dice', score['dice'])} %, 95HD {number('hd95_vox', score['hd95_vox'])} voxels"
        path, lps = folder / runs.FIGURES / f"{case}.png", axes_are_lps(geometry[2])
        case_figure(image, label, {"prediction": mask}, path, title, geometry[0], anatomical=lps)


def write_scores(
    folder: Path, scores: list[Score], head: str, options: Namespace, state: dict[str, Any], tested: dict[str, Any]
) -> None:
    """metrics.csv (a row per case, output and post) and metrics.json (with summary, options, versions, costs)."""
    with files.atomic(folder / runs.METRICS_CSV) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, scores[0])
        writer.writeheader()
        writer.writerows(scores)
    kinds = dict.fromkeys((score["head"], score["post"]) for score in scores)
    content = {
        "exp": Path(options.exp).name,
        "reported": {"head": head, "post": options.post, "weights": options.weights},
        "iteration": state["iteration"],
        "training_seconds": state["seconds"],
        "training_machine": state.get("machine"),
        "peak_memory_gib": state.get("peak_memory_gib"),  # of the training
        **tested,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "options": vars(options),
        "trained_on": state.get("cases"),
        "summary": {f"{kind[0]}/{kind[1]}": summarise(pick(scores, *kind)) for kind in kinds},
        "cases": scores,
    }
    files.write_json(folder / runs.METRICS_JSON, _plain(content))


def _plain(value: Any) -> Any:
    """The value as strict JSON: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def print_run(scores: list[Score], head: str, options: Namespace, state: dict[str, Any], printed: str) -> None:
    """Tables for the terminal: the reported output per case, all outputs, the paper's figures."""
    print(f"\n{options.exp}: output {head}, post-processing {options.post}, iteration {state['iteration']}\n")
    print(case_table(scores, head, options.post))
    print(f"\nall outputs, with (lcc) and without (none) the largest-component filter\n\n{summary_table(scores)}")
    if printed:
        print(f"\n{printed}")


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
