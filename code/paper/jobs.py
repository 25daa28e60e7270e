"""The jobs of reproduce.py, a row at a seed: its flags, its name, whether it is done, how long the others take."""

import hashlib
import json
import statistics
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from dataloaders.case_files import read_list
from dataloaders.split import cases_to_test, settle
from options.flags import list_paths
from paper.systems import FIGURE, SYSTEMS, TABLES, UPPER_BOUND, System
from runtime import runs
from runtime.journal import read_curves
from train import parse_options as training_options
from utils.errors import InputError
from utils.files import repository_path
from utils.words import counted

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
    name: str  # of its run, and of its folder among the stored results
    flags: tuple[str, ...]  # of train.py
    options: Namespace  # what train.py makes of them
    results: Path  # folder of what is stored of it

    @property
    def folder(self) -> Path:
        return runs.run_folder(self.options.model_path, self.name)


# --- which jobs there are


def systems_of(options: Namespace) -> list[System]:
    """The rows to work on, in the order in which they are worth having."""
    target, only = options.target, set(options.only)
    if target == "figure2":
        rows = only.union(FIGURE)
    else:
        rows = set(TABLES.get(target, SYSTEMS))
        rows &= only or rows
    return [system for key, system in SYSTEMS.items() if key in rows]


def plan(systems: Sequence[System], options: Namespace, handed_on: Sequence[str]) -> tuple[list[Job], list[System]]:
    """Every row at every seed, its flags checked: a bad one ends the command before anything is trained.

    Returns: the jobs, and the rows that cannot be planned yet because they are to train as long as another one did.
    """
    jobs, waiting = [], {}
    for seed in options.seeds:
        for system in systems:
            flags = equal_time_flags(system, seed, options, handed_on)
            if flags is None:
                waiting[system.key] = system
            else:
                jobs.append(make_job(system, seed, options, [*handed_on, *flags]))
    return jobs, list(waiting.values())


def equal_time_flags(system: System, seed: int, options: Namespace, handed_on: Sequence[str]) -> list[str] | None:
    """The length of a row that trains for as many seconds as another; None while that is not measured.

    Both times are those of the stored results at the same seed, which do not change any more.
    """
    if system.equal_time is None:
        return []
    scores = [scores_of(make_job(SYSTEMS[key], seed, options, handed_on)) for key in system.equal_time]
    if None in scores:
        return None
    longer, own = scores
    pace = own["training_seconds"] / own["iteration"]
    return ["--max_iterations", str(max(1, round(longer["training_seconds"] / pace)))]


def make_job(system: System, seed: int, options: Namespace, handed_on: Sequence[str]) -> Job:
    """One row at one seed. A row's own flags come last: what makes it this row is not overruled."""
    flags = ["--method", system.method, "--preset", options.preset, "--seed", str(seed)]
    flags += ["--split", options.split] if options.split else []
    flags += ["--model_path", str(repository_path(options.model_path)), *handed_on, *system.flags]
    if system.scans == UPPER_BOUND:
        lists = list_paths(training_options([*flags, "--labelnum", "1"]))
        flags += ["--labelnum", str(len(read_list(lists[0], "--train_list")))]
    trained = training_options(flags)
    own = {"method": system.method, "seed": seed, "overwrite": False, "exp": runs.default_exp(trained)}
    for flag, value in own.items():
        if getattr(trained, flag) != value:
            raise InputError(f"--{flag} is not for reproduce.py, which sets it for every row; see --only and --seeds")
    cases = {**asdict(settle(trained)), "test": cases_to_test(trained)}
    defaults = training_options(["--method", system.method, "--preset", options.preset, "--num_classes", "1"])
    plain, results = f"{system.key}_seed{seed}", repository_path(options.out) / "runs"
    trained.exp, others = run_name(plain, trained, cases, defaults, results)
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        print(f"{plain} is there with {', '.join(others[:3])}{more} and stays; this row is {trained.exp}")
    return Job(system.key, trained.exp, tuple(flags), trained, results / trained.exp)


# --- what identifies one


def run_name(plain: str, options: Namespace, cases: Cases, defaults: Namespace, results: Path) -> tuple[str, list[str]]:
    """`plain`, or with a digest of options and cases if a run of others has that name already.

    Args: options, settled; defaults, for flags that an older file does not know; results, folder of the stored ones.
    Returns: the name, and what the run of the plain name has otherwise.
    """
    folders = (results / plain, runs.run_folder(options.model_path, plain))
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
    found, asked = decisive(defaults) | read_json(folder / runs.OPTIONS), decisive(options)
    if options.num_classes is None:  # as the scans record, which need not be at hand
        del asked["num_classes"]
    others = [f"--{key} {found.get(key)}" for key, value in asked.items() if found.get(key) != value]
    if (folder / runs.METRICS_JSON).exists():
        scores = read_scores(folder / runs.METRICS_JSON)
        used = {**(scores.get("trained_on") or {}), "test": [case["case"] for case in scores["cases"]]}
        others += [f"other {kind} cases" for kind, ids in used.items() if set(ids) != set(cases[kind])]
    return others


# --- what is there


def scores_of(job: Job) -> Scores | None:
    """The scores of a job; None if it is not done."""
    path = job.results / runs.METRICS_JSON
    return read_scores(path) if path.exists() else None


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
    left = [(job, iterations) for job, iterations, _ in states if scores_of(job) is None]
    if not left:
        return f"done: {counted(len(jobs), 'run')}"
    paces = {job.row: pace for job, _, pace in states if pace is not None}
    named = f" ({', '.join(job.name for job, _ in left)})" if names else ""
    head = f"{len(left)} of {len(jobs)} runs left{named}"
    if not paces:
        return f"{head}; no step time is measured yet"
    mean = statistics.mean(paces.values())
    seconds = sum(max(job.options.max_iterations - done, 0) * paces.get(job.row, mean) for job, done in left)
    guessed = len({job.row for job, _ in left} - set(paces))
    guess = f" (rows without a measured step, {guessed}, at the mean of the others)" if guessed else ""
    return f"{head}; about {timedelta(seconds=round(seconds))} of training{guess}"


def progress(job: Job) -> tuple[int, float | None]:
    """Finished iterations of a job and its seconds per iteration, None where they were not measured."""
    scores = scores_of(job)
    if scores is not None:
        return scores["iteration"], scores["training_seconds"] / scores["iteration"]
    rows = [row for row in read_curves(job.folder) if "step_seconds" in row]
    if not rows:
        return 0, None
    return int(rows[-1]["iteration"]), statistics.median(row["step_seconds"] for row in rows[-PACE_WINDOW:])
