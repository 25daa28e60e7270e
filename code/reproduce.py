"""Reproduce a table or figure of the paper: every row trained, tested and set beside the printed numbers.

What is missing is trained, what was interrupted is resumed, what is done is left alone; a row counts as done when
its scores, from the same options, are among the results in --out.
"""

import fcntl
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from dataloaders.la_heart import read_list
from reporting.paper_tables import paired_report, write_table
from reporting.systems import FIGURE, SYSTEMS, TABLES, System
from train import parse_options as training_options
from train import settle
from utils import runs
from utils.errors import InputError, run_script
from utils.options import PRESETS, HelpFormatter, list_paths, repository_path

CODE = Path(__file__).resolve().parent
RESULTS = (runs.OPTIONS, runs.CURVES, runs.METRICS_CSV, runs.METRICS_JSON)  # what is kept of a run
# Flags that change where, when or how fast something is computed, but not what.
NEUTRAL = frozenset(
    "exp model_path root_path resume overwrite save_every log_every image_every num_workers cache device gpu "
    "compile window_batch weights skip verify_metrics val_every".split()
)
TARGETS = (*TABLES, "figure2", "all", "paired")


@dataclass(frozen=True)
class Job:
    """One row of a table at one seed."""

    system: System
    seed: int

    @property
    def name(self) -> str:
        return f"{self.system.key}_seed{self.seed}"


def parse_options(argv: Sequence[str] | None = None) -> tuple[Namespace, list[str]]:
    """The flags, and those that are handed on to every training."""
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("target", choices=TARGETS, help="what to reproduce; paired: statistics between two rows")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="of paired: the two rows, e.g. dtml_labeled m_d")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="paper", help="settings of every training")
    parser.add_argument("--split", choices=("official", "dev"), default="official", help="pair of lists")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337], help="seeds of every row")
    parser.add_argument("--only", nargs="+", choices=tuple(SYSTEMS), metavar="NAME", help=f"rows: {', '.join(SYSTEMS)}")
    parser.add_argument("--model_path", default="model/reproduce", help="folder of the runs")
    parser.add_argument("--out", default="docs/results", help="folder of tables, figures and kept scores")
    parser.add_argument("--cases", nargs="+", metavar="ID", help="cases of figure2 (default: best, median, worst)")
    parser.add_argument("--tables_only", action="store_true", help="write the tables of what is done, train nothing")
    options, handed_on = parser.parse_known_args(argv)
    if (options.target == "paired") != (len(options.rows) == 2):
        raise InputError("paired takes two rows, and nothing else takes any: reproduce.py paired dtml_labeled m_d")
    if strangers := [row for row in options.rows if row not in SYSTEMS]:
        raise InputError(f"there is no row {strangers[0]!r}; there are: {', '.join(SYSTEMS)}")
    return options, handed_on


def main(argv: Sequence[str] | None = None) -> int:
    """Train, test and write; returns the exit status."""
    options, handed_on = parse_options(argv)
    chosen = systems_of(options)
    jobs = [Job(system, seed) for seed in options.seeds for system in chosen]
    if not options.tables_only:
        for job in jobs:
            carry_out(job, jobs, options, handed_on)
    out = repository_path(options.out)
    done = {job: scores for job in jobs if (scores := kept_scores(job, out)) is not None}
    if options.target == "paired":
        print(paired_report(*(by_seed(done, row) for row in options.rows)))
        return 0
    for table in TABLES if options.target == "all" else [options.target] if options.target in TABLES else []:
        print(write_table(table, {key: by_seed(done, key) for key in TABLES[table]}, out))
    if options.target in ("figure2", "all"):
        draw_figure(options, done, out)
    return 0


def systems_of(options: Namespace) -> list[System]:
    """The rows that the target needs, in the order in which they are worth having."""
    keys = {"all": tuple(SYSTEMS), "figure2": FIGURE, "paired": tuple(options.rows), **TABLES}[options.target]
    if options.only and not set(options.only) & set(keys):
        raise InputError(f"--only {' '.join(options.only)} has no row of {options.target}: {', '.join(keys)}")
    return [system for key, system in SYSTEMS.items() if key in keys and key in (options.only or keys)]


# --- one job


def carry_out(job: Job, jobs: Sequence[Job], options: Namespace, handed_on: Sequence[str]) -> None:
    """Train, test and keep one row, unless it is done or another process is at it."""
    out = repository_path(options.out)
    flags = training_flags(job, options, handed_on)
    trained = training_options(flags)
    settle(trained)
    if is_done(job, trained, out):
        return
    with claim(runs.run_folder(options.model_path, job.name)) as free:
        if not free:
            print(f"{job.name}: another process is working on it; left alone")
            return
        print(f"{job.name}: {forecast(job, jobs, options, trained.max_iterations)}", flush=True)
        run_command("train.py", [*flags, "--resume"])
        run_command("test_LA.py", ["--exp", job.name, "--model_path", options.model_path, "--skip", "figures"])
        keep(job, options, out)


def training_flags(job: Job, options: Namespace, handed_on: Sequence[str]) -> list[str]:
    """Flags of train.py for a job; those handed on come last, so that they win."""
    system = job.system
    flags = ["--method", system.method, "--preset", options.preset, "--split", options.split, *system.flags]
    flags += ["--seed", str(job.seed), "--exp", job.name, "--model_path", options.model_path, *handed_on]
    if system.all_labeled:
        everything = training_options([*flags, "--labelnum", "1"])
        flags += ["--labelnum", str(len(read_list(list_paths(everything)[0], "--train_list")))]
    return flags


def run_command(script: str, flags: Sequence[str]) -> None:
    """A script as its own process, so that each row's peak memory is its own; its failure ends everything."""
    status = subprocess.run([sys.executable, str(CODE / script), *flags], check=False).returncode
    if status:
        raise InputError(f"`{shlex.join(['python', f'code/{script}', *flags])}` ended with status {status}; see above")


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Whether this process alone may work on a run; the claim ends with the process, however it ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def keep(job: Job, options: Namespace, out: Path) -> None:
    """Copy what a table and a reader need from the run folder; the scores last, for they mean that all is there."""
    source, target = runs.run_folder(options.model_path, job.name), kept_folder(job, out)
    target.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:
        with runs.atomic(target / name) as temporary:
            shutil.copyfile(source / name, temporary)


# --- what is done and what is left


def kept_folder(job: Job, out: Path) -> Path:
    """Where the results of a job are kept."""
    return out / "runs" / job.name


def kept_scores(job: Job, out: Path) -> dict[str, Any] | None:
    """metrics.json of a job that is done."""
    path = kept_folder(job, out) / runs.METRICS_JSON
    return json.loads(path.read_text()) if path.exists() else None


def options_hash(options: dict[str, Any]) -> str:
    """Digest of the options that decide a result; JSON, so that tuples and lists are the same."""
    decisive = {key: value for key, value in options.items() if key not in NEUTRAL}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def is_done(job: Job, trained: Namespace, out: Path) -> bool:
    """Whether scores from the same options are kept already; other options under the same name are an error."""
    scores = kept_scores(job, out)
    if scores is None:
        return False
    wanted, found = vars(trained), {key: scores["options"].get(key) for key in vars(trained)}
    if options_hash(wanted) == options_hash(found):
        return True
    changed = [
        key
        for key in wanted
        if key not in NEUTRAL and options_hash({key: wanted[key]}) != options_hash({key: found[key]})
    ]
    raise InputError(
        f"{kept_folder(job, out)} holds {job.name} with other options ({', '.join(changed)}); "
        "give another --out, or delete that folder"
    )


def forecast(job: Job, jobs: Sequence[Job], options: Namespace, iterations: int) -> str:
    """How many rows are left, and how long they take at the step times measured so far."""
    out = repository_path(options.out)
    paces: dict[str, float] = {}
    for other in (Job(system, job.seed) for system in SYSTEMS.values()):
        if (scores := kept_scores(other, out)) is not None:
            paces[other.system.method] = scores["training_seconds"] / scores["iteration"]
    left = [other for other in jobs if kept_scores(other, out) is None]
    known = [paces[other.system.method] for other in left if other.system.method in paces]
    head = f"{len(left)} of {len(jobs)} rows left"
    if not known:
        return f"{head}; no step time measured yet"
    seconds = sum(known) / len(known) * len(left) * iterations
    return f"{head}, about {timedelta(seconds=round(seconds))} of training"


def by_seed(done: dict[Job, dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Scores of a row, a seed each."""
    return [scores for job, scores in done.items() if job.system.key == key]
