"""Score trained runs on the test list: a row per case, mean and spread, every output, with and without filter.

Several runs are set side by side, with the paired difference of each to the first.
"""

import csv
import math
import platform
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dataloaders import la_heart
from dataloaders.split import cases_to_test
from engine import load_networks, reported_output
from inference import THRESHOLD, predict_volume
from methods import METHODS
from methods.base import Method
from reporting.figures import case_figure
from reporting.nifti import write_nifti
from reporting.printed import PrintedRow, printed_row
from reporting.tables import Score, case_table, comparison_table, pick, printed_table, summary_table
from utils import options as flags
from utils import runs
from utils.device import machine, pick_device, place
from utils.errors import InputError, run_script
from utils.metrics import evaluate, largest_component, summarise, verify_against_medpy

POSTS = {"none": lambda mask: mask, "lcc": largest_component}
SAME_SETTING = "the paper's row, for the same lists, preset and number of labels"
NOT_COMPARABLE = "the paper's full-scale figures on the official 20 cases: another setting, not comparable"
OFFICIAL = flags.REPOSITORY / "data" / "LA"  # its lists are the official ones, whatever --root_path holds
OF_THE_MACHINE = ("device", "gpu", "compile", "model_path")  # a test does not take these from the training
PACKAGES = ("torch", "numpy", "scipy", "edt")  # whose versions are written beside the scores


def make_parser() -> ArgumentParser:
    """Flags of a test; what a run was trained with is taken from the run."""
    parser = ArgumentParser(
        usage="%(prog)s --exp NAME [NAME ...] [flags]",
        description=__doc__,
        formatter_class=flags.HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--exp", nargs="+", required=True, metavar="NAME", help="run to score; several are compared")
    parser.add_argument("--model_path", default="model", help="folder of all runs")
    parser.add_argument("--weights", choices=tuple(runs.CHECKPOINTS), default="last", help="checkpoint to score")
    parser.add_argument(
        "--skip", nargs="*", choices=("predictions", "figures"), default=[], help="what not to write: NIfTI, pictures"
    )
    parser.add_argument("--verify_metrics", action="store_true", help="compare every score with medpy (slow)")
    flags.add_compat_option(parser)
    flags.add_path_options(parser)
    flags.add_device_options(parser)
    flags.add_inference_options(parser)
    return parser


def parse_options(argv: Sequence[str] | None, exp: str, trained: dict[str, Any]) -> Namespace:
    """Options of one run: by hand > --compat by hand > those of its training."""
    parser = make_parser()
    compat = parser.parse_args(argv).compat
    kept = {key: value for key, value in trained.items() if key not in OF_THE_MACHINE}
    flags.layer_defaults(parser, kept, flags.COMPAT.get(compat, {}))
    options = Namespace(**{**trained, **vars(parser.parse_args(argv)), "exp": exp})
    flags.require_values(options)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Score every run that was asked for; returns the exit status."""
    asked = make_parser().parse_args(argv)
    folders = {exp: runs.existing_run(asked.model_path, exp) for exp in asked.exp}
    reported = {}
    for exp, folder in folders.items():
        state = runs.load_checkpoint(folder / runs.CHECKPOINTS[asked.weights])
        options = parse_options(argv, exp, state["options"])
        scores, head = score_run(folder, state, options)
        print_run(scores, head, options, state)
        reported[f"{exp} ({head}, {options.post})"] = pick(scores, head, options.post)
    if len(reported) > 1:
        print(f"\n{comparison_table(reported)}")
    return 0


def score_run(folder: Path, state: dict[str, Any], options: Namespace) -> tuple[list[Score], str]:
    """Score one run and write metrics.csv, metrics.json, predictions and figures into its folder.

    Nothing is written unless every case is sound.
    """
    cases = sound_cases(options, state)
    device = pick_device(options)
    method = METHODS[options.method](Namespace(**state["options"]))
    load_networks(method, state, folder / runs.CHECKPOINTS[options.weights])
    place(method, device, options)
    head = reported_output(method, options)
    start, scores = time.perf_counter(), []
    for case in tqdm(cases, unit="case", disable=None, dynamic_ncols=True):
        scores += score_case(method, case, head, options, device, folder)
    tested = {"test_seconds": time.perf_counter() - start, "test_machine": machine(device)}
    write_scores(folder, scores, head, options, state, tested)
    return scores, head


def sound_cases(options: Namespace, state: dict[str, Any]) -> list[str]:
    """The test list, none of whose cases may be damaged or known from training."""
    cases = cases_to_test(options)
    known = [case for case in cases if case in set(cases_of_training(state))]
    if known:
        raise InputError(
            f"{len(known)} cases of the test list, {known[0]} the first, were in the training of {options.exp}; "
            "name another list with --test_list or --split"
        )
    for case in cases:
        if faults := la_heart.find_faults(flags.repository_path(options.root_path), case):
            raise InputError(faults[0])
    return cases


def cases_of_training(state: dict[str, Any]) -> list[str]:
    """All cases that a run has seen, labeled ones first."""
    return [case for group in ("labeled", "validation", "unlabeled") for case in state.get("cases", {}).get(group, [])]


def score_case(
    method: Method, case: str, head: str, options: Namespace, device: torch.device, folder: Path
) -> list[Score]:
    """All outputs of one case, with and without the component filter."""
    root = flags.repository_path(options.root_path)
    image, label = la_heart.read_image(root, case), la_heart.read_label(root, case)
    geometry = la_heart.read_geometry(root, case)
    probs = predict_volume(method, image, options, device)
    scores = []
    for output, prob in probs.items():
        for post, clean in POSTS.items():
            mask = clean(prob > THRESHOLD)
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
        title = f"{case}\nDice {100 * score['dice']:.1f} %, 95HD {score['hd95_vox']:.1f} voxels"
        case_figure(image, label, {"prediction": mask}, folder / runs.FIGURES / f"{case}.png", title, geometry[0])


def write_scores(
    folder: Path, scores: list[Score], head: str, options: Namespace, state: dict[str, Any], tested: dict[str, Any]
) -> None:
    """metrics.csv (a row per case, output and post) and metrics.json (with summary, options, versions, costs)."""
    with runs.atomic(folder / runs.METRICS_CSV) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, scores[0])
        writer.writeheader()
        writer.writerows(scores)
    kinds = dict.fromkeys((score["head"], score["post"]) for score in scores)
    content = {
        "exp": folder.name,
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
    runs.write_json(folder / runs.METRICS_JSON, _plain(content))


def _plain(value: Any) -> Any:
    """The value as strict JSON: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def print_run(scores: list[Score], head: str, options: Namespace, state: dict[str, Any]) -> None:
    """Tables for the terminal: the reported output per case, all outputs, the paper's figures."""
    print(f"\n{options.exp}: output {head}, post-processing {options.post}, iteration {state['iteration']}\n")
    print(case_table(scores, head, options.post))
    print(f"\nall outputs, with (lcc) and without (none) the largest-component filter\n\n{summary_table(scores)}")
    row = paper_row(options)
    if row is not None:
        heading = SAME_SETTING if is_paper_setting(scores, options, state) else NOT_COMPARABLE
        print(f"\n{heading}\n\n{printed_table(row)}")


def is_paper_setting(scores: list[Score], options: Namespace, state: dict[str, Any]) -> bool:
    """Whether the paper's figures may stand beside these: its preset, its cases, its number of labels."""
    train, test = (la_heart.scan_list(OFFICIAL / name, "")[0] for name in ("train.list", "test.list"))
    trained = cases_of_training(state)
    same_cases = trained == train[: len(trained)] and {score["case"] for score in scores} == set(test)
    return options.preset == "paper" and bool(trained) and same_cases and printed_row(*_row_key(options)) is not None


def paper_row(options: Namespace) -> PrintedRow | None:
    """The printed row of these numbers of scans, else that of the paper's 16 labeled and 64 or no unlabeled ones."""
    method, _, unlabeled, variant = _row_key(options)
    return printed_row(*_row_key(options)) or printed_row(method, 16, 64 if unlabeled else 0, variant)


def _row_key(options: Namespace) -> tuple[str, int, int, str | None]:
    variant = None
    if options.method == "dtml":
        supervision = {"mask": None, "sdm": "dis", "both": "dis+mask"}[options.sdm_supervision]
        variant = supervision if options.branch == "both" else f"{options.branch}_only"
    return options.method, options.labelnum, options.unlabelnum, variant


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
