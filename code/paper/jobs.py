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

from runtime import runs
from runtime.journal import read_curves
from utils.errors import InputError

Scores = dict[str, Any]  # content of a metrics.json
Cases = dict[str, list[str]]  # labeled, unlabeled, validation, test -> case ids
# Flags that say where and how a result is computed, not which; another precision is another result.
NEUTRAL = (runs.FREE_ON_RESUME - {"amp"}) | set(runs.OF_THE_COMMAND)
SCORE_KEYS = {"cases", "summary", "reported", "options", "iteration", "training_seconds"}
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


def run_name(plain: str, options: Namespace, cases: Cases, defaults: Namespace, kept: Path) -> tuple[str, list[str]]:
    """`plain`, or with a digest of options and cases if a run of others has that name already.

    Args: options, settled; defaults, for flags that an older file does not know; kept, folder of the kept results.
    Returns: the name, and what the run of the plain name has otherwise.
    """
    folders = (kept / plain, runs.run_folder(options.model_path, plain))
    others = dict.fromkeys(other for folder in folders for other in differences(options, cases, defaults, folder))
    digest = hashlib.sha256(json.dumps([decisive(options), cases], sort_keys=True).encode())
    return (f"{plain}_{digest.hexdigest()[:HASH_LENGTH]}" if others else plain), list(others)


def decisive(options: Namespace) -> dict[str, Any]:
    """The options that decide a result, as JSON has them."""
    return json.loads(json.dumps({key: value for key, value in vars(options).items() if key not in NEUTRAL}))


def differences(options: Namespace, cases: Cases, defaults: Namespace, folder: Path) -> list[str]:
    """What the run in a folder has otherwise, in words; nothing if there is no run."""
    if not (folder / runs.OPTIONS).exists():
        return []
    found = decisive(defaults) | read_json(folder / runs.OPTIONS)
    others = [f"--{key} {found.get(key)}" for key, value in decisive(options).items() if found.get(key) != value]
    if (folder / runs.METRICS_JSON).exists():
        scores = read_scores(folder / runs.METRICS_JSON)
        used = {
            **(scores.get("trained_on") or {}),
            "test": list(dict.fromkeys(case["case"] for case in scores["cases"])),
        }
        others += [f"other {kind} cases" for kind, ids in used.items() if set(ids) != set(cases[kind])]
    return others


def kept_scores(job: Job) -> Scores | None:
    """The scores of a job that is done, with the summaries of all its checkpoints where those were tested."""
    path, checkpoints = job.kept / runs.METRICS_JSON, job.kept / runs.BEST_ON_TEST
    if not path.exists():
        return None
    return read_scores(path) | ({"checkpoints": read_json(checkpoints)} if checkpoints.exists() else {})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of this project."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); restore it, or delete its folder") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is no file of this project; restore it, or delete its folder")
    return content


def read_scores(path: Path) -> Scores:
    """A metrics.json as test_LA.py writes it."""
    scores = read_json(path)
    if lacking := SCORE_KEYS - scores.keys():
        raise InputError(f"{path} has no {', '.join(sorted(lacking))}; restore it, or delete its folder")
    return scores


def what_is_left(jobs: Sequence[Job], names: bool = False) -> str:
    """How many runs are left, and how long they take at the step times measured so far."""
    states = [(job, *progress(job)) for job in jobs]
    left = [(job, iterations) for job, iterations, _ in states if kept_scores(job) is None]
    if not left:
        return f"all {len(jobs)} runs are done"
    paces = {job.row: pace for job, _, pace in states if pace is not None}
    named = f" ({', '.join(job.name for job, _ in left)})" if names else ""
    head = f"{len(left)} of {len(jobs)} runs left{named}"
    if not paces:
        return f"{head}; no step time is measured yet"
    mean = statistics.mean(paces.values())
    seconds = sum(
        max(job.options.max_iterations - iterations, 0) * paces.get(job.row, mean) for job, iterations in left
    )
    guessed = len({job.row for job, _ in left} - set(paces))
    guess = f" (rows without a measured step, {guessed}, at the mean of the others)" if guessed else ""
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
