"""The rows that reproduce.py has to work on: what identifies one, which are done, how long the others take."""

import hashlib
import json
import statistics
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from dataloaders.split import cases_to_test
from utils import runs
from utils.errors import InputError
from utils.journal import read_curves

Scores = dict[str, Any]  # content of a metrics.json
# Flags that change where, when or how fast something is computed, but not what. Data are told apart by their cases.
NEUTRAL = frozenset(
    "exp model_path root_path resume overwrite save_every log_every image_every val_every num_workers cache device gpu "
    "compile window_batch".split()
)
HASH_LENGTH = 8
PACE_WINDOW = 10  # lines of the curves whose median is the pace of an unfinished run


@dataclass(frozen=True, eq=False)
class Job:
    """One row of a table at one seed."""

    row: str  # key in SYSTEMS
    name: str  # of its run, and of its folder among the kept results
    flags: tuple[str, ...]  # of train.py
    options: Namespace  # what train.py makes of them
    kept: Path  # folder of the kept results

    @property
    def folder(self) -> Path:
        return runs.run_folder(self.options.model_path, self.name)


def run_name(plain: str, options: Namespace, defaults: Namespace, kept: Path) -> tuple[str, list[str]]:
    """`plain`, or with a digest of the options if a run of other options has that name already.

    Args: options, settled; defaults, those that a flag has which an older file does not know; kept, folder of the
        kept results.
    Returns: the name, and what the run of the plain name has otherwise.
    """
    folders = (kept / plain, runs.run_folder(options.model_path, plain))
    others = dict.fromkeys(flag for folder in folders for flag in differences(options, defaults, folder))
    digest = hashlib.sha256(json.dumps([decisive(options), cases_to_test(options)], sort_keys=True).encode())
    return (f"{plain}_{digest.hexdigest()[:HASH_LENGTH]}" if others else plain), list(others)


def decisive(options: Namespace) -> dict[str, Any]:
    """The options that decide a result, as JSON has them."""
    return json.loads(json.dumps({key: value for key, value in vars(options).items() if key not in NEUTRAL}))


def differences(options: Namespace, defaults: Namespace, folder: Path) -> list[str]:
    """What the run in a folder has otherwise, as sentences; none if there is no run."""
    if not (folder / runs.OPTIONS).exists():
        return []
    found = decisive(defaults) | read_json(folder / runs.OPTIONS)
    others = [f"--{key} {found.get(key)}" for key, value in decisive(options).items() if found.get(key) != value]
    scores = read_json(folder / runs.METRICS_JSON) if (folder / runs.METRICS_JSON).exists() else None
    if scores and {case["case"] for case in scores["cases"]} != set(cases_to_test(options)):
        others.append("other test cases")
    return others


def kept_scores(job: Job) -> Scores | None:
    """The scores of a job that is done."""
    path = job.kept / runs.METRICS_JSON
    return read_json(path) if path.exists() else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of this project."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); restore it, or delete its folder") from None


def what_is_left(jobs: Sequence[Job]) -> str:
    """How many rows are left, and how long they take at the step times measured so far."""
    states = [(job, *progress(job)) for job in jobs]
    left = [(job, iterations) for job, iterations, _ in states if kept_scores(job) is None]
    if not left:
        return f"all {len(jobs)} rows are done"
    paces = {job.row: pace for job, _, pace in states if pace is not None}
    head = f"{len(jobs) - len(left)} of {len(jobs)} rows done; left: {', '.join(job.name for job, _ in left)}"
    if not paces:
        return f"{head}; no step time is measured yet"
    mean = statistics.mean(paces.values())
    seconds = sum(
        max(job.options.max_iterations - iterations, 0) * paces.get(job.row, mean) for job, iterations in left
    )
    guessed = len({job.row for job, _ in left} - set(paces))
    guess = f" (a step of {guessed} of them not measured yet: taken as the mean)" if guessed else ""
    return f"{head}; about {timedelta(seconds=round(seconds))} of training{guess}"


def progress(job: Job) -> tuple[int, float | None]:
    """Finished iterations of a job and its seconds per iteration, None where they were not measured."""
    scores = kept_scores(job)
    if scores is not None:
        return scores["iteration"], scores["training_seconds"] / scores["iteration"]
    rows = [row for row in read_curves(job.folder) if "step_seconds" in row]
    if not rows:
        return 0, None
    return int(rows[-1]["iteration"]), statistics.median(row["step_seconds"] for row in rows[-PACE_WINDOW:])
