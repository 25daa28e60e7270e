"""Score a trained run on its test list: every output of every case, with and without the component filter.

Scores go to metrics.csv and metrics.json in the folder of the run, the masks and pictures of the reported output to
folders beside them.
"""

import csv
import math
import platform
import time
from argparse import Namespace
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dataloaders import case_files
from dataloaders.split import are_official, cases_of_training, cases_to_test, refuse_copies
from evaluation.comparison import TestedRun
from evaluation.figures import case_figure
from evaluation.metrics import class_mean, evaluate, largest_components, summarise, verify_against_medpy
from evaluation.tables import Score, metric_text, pick
from inference.engines import on_engine
from inference.trained import reported_output, trained_method
from inference.views import InViews
from inference.windows import predict_volume
from methods.base import Method
from options import flags
from runtime import runs
from runtime.device import enough_memory, machine, pick_device
from runtime.distributed import ALONE, Ranks
from runtime.workers import in_order
from utils import files
from utils.errors import InputError
from utils.labels import (
    MEAN,
    ONE_CLASS,
    LabelClass,
    classes_as_record,
    classes_of_record,
    label_map,
    numbered_classes,
)
from utils.machine import available_cores
from utils.nifti import axes_are_lps, write_nifti

FILTERS = {"none": lambda label: label, "lcc": largest_components}  # of a label map
FEW_CASES, MAX_WORKERS = 8, 4  # starting processes takes seconds, and one network keeps no more than a few busy
PACKAGES = ("torch", "numpy", "scipy", "edt")  # whose versions are written beside the scores


def score_run(folder: Path, state: dict[str, Any], options: Namespace, ranks: Ranks = ALONE) -> TestedRun | None:
    """Score one run and write metrics.csv, metrics.json, predictions and figures into its folder.

    Nothing is written unless every case is valid. Each rank writes the files of the cases that it predicts, rank 0
    the scores of all, in the order of the test list. Returns: the tested run on rank 0, else None.
    """
    cases = ranks.from_leader(lambda: valid_cases(options, state))
    with ranks.leader_first():
        device = pick_device(options, ranks=ranks)
        method = trained_method(options, state, runs.checkpoint_path(folder, options.weights))
        method = InViews(on_engine(method, device, options), options.tta)
        head = reported_output(method, options)
        folder = runs.scores_folder(folder, options.weights)
        with files.writing(folder):
            folder.mkdir(exist_ok=True)
    start = time.perf_counter()
    mine = cases[ranks.rank :: ranks.size]
    maps = (predict_labels(method, case, options, device) for case in mine)
    score = partial(score_case, head=head, options=options, folder=folder, classes=classes_of(state))
    scored = in_order(score, maps, score_workers(options, len(mine), ranks), "--score_workers")
    hidden = None if ranks.leads else True  # None: unless there is a terminal
    by_case = dict(
        zip(mine, tqdm(scored, total=len(mine), unit="case", disable=hidden, dynamic_ncols=True), strict=True)
    )
    parts = ranks.to_leader(by_case)
    if parts is None:
        return None
    scores = [score for index, case in enumerate(cases) for score in parts[index % ranks.size][case]]
    tested = {"test_seconds": time.perf_counter() - start, "test_machine": machine(device)}
    content = _content(scores, head, options, state, tested)
    write_scores(folder, scores, content)
    masks = None if "predictions" in options.skip else folder / runs.PREDICTIONS
    root = files.repository_path(options.root_path)
    return TestedRun(options.exp, content, folder, masks, root, options.class_name or MEAN)


def score_workers(options: Namespace, cases: int, ranks: Ranks = ALONE) -> int:
    """How many processes score: what --score_workers says, by default what the cores of a rank allow."""
    if options.score_workers is not None:
        return min(options.score_workers, cases)
    others = available_cores() // ranks.local_size - 1
    return 0 if cases < FEW_CASES else max(0, min(others // 2, MAX_WORKERS))


def valid_cases(options: Namespace, state: dict[str, Any]) -> list[str]:
    """The test list, none of whose cases may be damaged or known from training."""
    cases, trained = cases_to_test(options), set(cases_of_training(state))
    classes, root = classes_of(state), files.repository_path(options.root_path)
    require_class(options.class_name, classes, options.exp)
    known = [case for case in cases if case in trained]
    if known:
        others = f" (and {len(known) - 1} more)" if len(known) > 1 else ""
        raise InputError(
            f"run {options.exp} was trained on {known[0]}{others} of the test list; name another one with --test_list "
            "or --split"
        )
    refuse_copies(root, cases_of_training(state), cases)
    for case in cases:
        require_classes(case, root, classes, options.exp)
        if faults := case_files.find_faults(root, case, num_classes=len(classes)):
            raise InputError(faults[0])
    return cases


def require_class(name: str | None, classes: Sequence[LabelClass], exp: str) -> None:
    """Refuse a --class that a run does not have."""
    names = [one.name for one in classes]
    if name not in (None, MEAN, *(names if len(names) > 1 else ())):
        raise InputError(f"--class {name} is no class of run {exp}; there are: {', '.join(names)}")


def require_classes(case: str, root: Path, classes: Sequence[LabelClass], exp: str) -> None:
    """Refuse a case whose classes are not those of the run; a single foreground may have any name.

    A case that records none passes where those of the training recorded none, either; its values are checked later.
    """
    recorded = case_files.read_classes(root, case)
    if recorded == ONE_CLASS and tuple(classes) == numbered_classes(len(classes)):
        return
    names, own = [[one.name for one in group] for group in (classes, recorded)]
    if len(own) != len(names) or (len(names) > 1 and own != names):
        raise InputError(
            f"case {case} of --root_path {root} has the classes {', '.join(own)}, run {exp} was trained on "
            f"{', '.join(names)}; prepare its folder with --classes of these"
        )


def predict_labels(
    method: Method, case: str, options: Namespace, device: torch.device
) -> tuple[str, dict[str, np.ndarray]]:
    """A case, and its predicted label map by output, (W, H, D) uint8, 0..C."""
    image = case_files.read_image(files.repository_path(options.root_path), case)
    with enough_memory(device, flags.LESS_WINDOW):
        probs = predict_volume(method, image, options, device)
    return case, {output: label_map(prob, method.exclusive) for output, prob in probs.items()}


def score_case(
    predicted: tuple[str, dict[str, np.ndarray]],
    head: str,
    options: Namespace,
    folder: Path,
    classes: Sequence[LabelClass] = ONE_CLASS,
) -> list[Score]:
    """All outputs of one case, with and without the component filter; the reported one is written.

    Of several classes each has a row; a last one is their mean.
    """
    case, maps = predicted
    root = files.repository_path(options.root_path)
    image, label = case_files.read_image(root, case), case_files.read_label(root, case, len(classes))
    geometry = case_files.read_geometry(root, case)
    scores = []
    for output, raw in maps.items():
        for post, clean in FILTERS.items():
            prediction = clean(raw)
            rows = [evaluate_class(prediction == n, label == n, geometry, options) for n in range(1, len(classes) + 1)]
            if len(classes) > 1:
                named = zip((*(one.name for one in classes), MEAN), (*rows, class_mean(rows)), strict=True)
                rows = [{"class": name, **row} for name, row in named]
            scores += [{"case": case, "head": output, "post": post, **row} for row in rows]
            if (output, post) == (head, options.post):
                write_prediction(folder, case, image, label, prediction, geometry, scores[-1], options.skip, classes)
    return scores


def evaluate_class(prediction: np.ndarray, label: np.ndarray, geometry, options: Namespace) -> dict[str, float]:
    """`evaluate` of one class, with volumes that are right on sheared axes, too."""
    values = evaluate(prediction, label, geometry[0], options.eval_empty)
    upright = abs(np.linalg.det(np.reshape(geometry[2], (3, 3))))  # volume of a voxel of sides 1; less where sheared
    values |= {name: values[name] * upright for name in ("volume_ml", "label_ml")}
    if options.verify_metrics:
        verify_against_medpy(values, prediction, label, geometry[0])
    return values


def write_prediction(
    folder, case, image, label, prediction, geometry, score: Score, skip: Sequence[str], classes=ONE_CLASS
) -> None:
    """The reported prediction, classes numbered as in the prepared label, as NIfTI and as a picture."""
    if "predictions" not in skip:
        (folder / runs.PREDICTIONS).mkdir(exist_ok=True)
        write_nifti(folder / runs.PREDICTIONS / f"{case}.nii.gz", prediction, *geometry)
    if "figures" not in skip:
        (folder / runs.FIGURES).mkdir(exist_ok=True)
        dice, hd95 = (metric_text(metric, score[metric]) for metric in ("dice", "hd95_vox"))
        title = f"{case}\nDice {dice} %, 95HD {hd95} voxels"
        path, lps = folder / runs.FIGURES / f"{case}.png", axes_are_lps(geometry[2])
        names = [one.name for one in classes]
        case_figure(image, label, {"prediction": prediction}, path, title, geometry[0], names, anatomical=lps)


def write_scores(folder: Path, scores: list[Score], content: dict[str, Any]) -> None:
    """metrics.csv, a row per case, output and filter, and metrics.json with the whole content."""
    with files.atomic(folder / runs.METRICS_CSV) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, scores[-1])  # a mean over classes, where there is one, has the most columns
        writer.writeheader()
        writer.writerows(scores)
    files.write_json(folder / runs.METRICS_JSON, content)


def _content(
    scores: list[Score], head: str, options: Namespace, state: dict[str, Any], tested: dict[str, Any]
) -> dict[str, Any]:
    """Of metrics.json: scores, summary, and all that they depend on."""
    classes = classes_of(state)
    of_classes = {}
    if len(classes) > 1:
        of_classes["classes"] = classes_as_record(classes)
        of_classes["class_summary"] = {one.name: _summary(scores, one.name) for one in classes}
    return _plain(
        {
            "exp": Path(options.exp).name,
            "reported": {"head": head, "post": options.post, "weights": options.weights},
            "iteration": state["iteration"],
            "training_seconds": state["seconds"],
            "training_machine": state.get("machine"),
            "peak_memory_gib": state.get("peak_memory_gib"),  # of the training
            **tested,
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "commit": {"training": state.get("commit"), "test": runs.commit()},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "data": _data(scores, options, state),
            "options": vars(options),
            "trained_on": state.get("cases"),
            **of_classes,
            "summary": _summary(scores, MEAN),
            "cases": scores,
        }
    )


def _summary(scores: list[Score], name: str) -> dict[str, dict[str, Any]]:
    """Of every output and filter, of a class or the mean over classes."""
    chosen = [score for score in scores if score.get("class", name) == name]
    kinds = dict.fromkeys((score["head"], score["post"]) for score in chosen)
    return {f"{kind[0]}/{kind[1]}": summarise(pick(chosen, *kind)) for kind in kinds}


def classes_of(state: dict[str, Any]) -> tuple[LabelClass, ...]:
    """The classes of a checkpoint."""
    return classes_of_record(state.get("classes"))


def _data(scores: list[Score], options: Namespace, state: dict[str, Any]) -> dict[str, Any]:
    """Folder and lists of the cases; `official`, whether they are the challenge's."""
    train, test = flags.list_paths(options)
    official = are_official(cases_of_training(state), [score["case"] for score in scores])
    folder = files.repository_path(options.root_path)
    return {"folder": str(folder), "train_list": str(train), "test_list": str(test), "official": official}


def _plain(value: Any) -> Any:
    """The value as strict JSON: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
