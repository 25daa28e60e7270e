"""Which rows reproduce.py works on, and with which flags each of them is trained."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict

from dataloaders.case_files import read_list
from dataloaders.split import cases_to_test, settle
from options.flags import list_paths
from paper.jobs import Job, kept_scores, run_name
from paper.systems import FIGURE, SYSTEMS, TABLES, System
from runtime import runs
from train import parse_options as training_options
from utils.errors import InputError
from utils.files import repository_path


def plan(systems: Sequence[System], options: Namespace, handed_on: Sequence[str]) -> tuple[list[Job], list[System]]:
    """Every row at every seed, its flags checked: a bad one ends the command before anything is trained.

    Returns: the jobs, and the rows that cannot be planned yet, for they are to train as long as another one did.
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

    Both figures are those of the kept results at the same seed, which do not change any more.
    """
    if system.equal_time is None:
        return []
    kept = [kept_scores(make_job(SYSTEMS[key], seed, options, handed_on)) for key in system.equal_time]
    if None in kept:
        return None
    longer, own = kept
    pace = own["training_seconds"] / own["iteration"]
    return ["--max_iterations", str(max(1, round(longer["training_seconds"] / pace)))]


def systems_of(options: Namespace) -> list[System]:
    """The rows to work on, in the order in which they are worth having."""
    everything = tuple(SYSTEMS)
    keys = {
        "all": everything,
        "curves": everything,
        "figure2": (*FIGURE, *options.only),
        "paired": options.only,
        **TABLES,
    }
    wanted = set(keys[options.target])
    if options.only and options.target != "figure2":
        wanted &= set(options.only)
    return [system for key, system in SYSTEMS.items() if key in wanted]


def make_job(system: System, seed: int, options: Namespace, handed_on: Sequence[str]) -> Job:
    """One row at one seed. A row's own flags come last: what makes it this row is not overruled."""
    flags = ["--method", system.method, "--preset", options.preset, "--seed", str(seed)]
    flags += ["--split", options.split] if options.split else []
    flags += ["--model_path", str(repository_path(options.model_path)), *handed_on, *system.flags]
    flags += ["--keep_checkpoints"] if options.optimistic_best_on_test else []
    if system.all_labeled:
        lists = list_paths(training_options([*flags, "--labelnum", "1"]))
        flags += ["--labelnum", str(len(read_list(lists[0], "--train_list")))]
    trained = training_options(flags)
    own = {"method": system.method, "seed": seed, "overwrite": False, "exp": runs.default_exp(trained)}
    for flag, value in own.items():
        if getattr(trained, flag) != value:
            raise InputError(f"--{flag} is not for reproduce.py, which sets it for every row; see --only and --seeds")
    cases = {**asdict(settle(trained)), "test": cases_to_test(trained)}
    defaults = training_options(["--method", system.method, "--preset", options.preset])
    plain, kept = f"{system.key}_seed{seed}", repository_path(options.out) / "runs"
    trained.exp, others = run_name(plain, trained, cases, defaults, kept)
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        print(f"{plain} is there with {', '.join(others[:3])}{more} and stays; this row is {trained.exp}")
    return Job(system.key, trained.exp, tuple(flags), trained, kept / trained.exp)
