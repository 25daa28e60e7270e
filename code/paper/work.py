"""The work of reproduce.py: train and test rows, store the results; tables, curves and figure 2 from these."""

import fcntl
import shlex
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from evaluation.tables import of_class, pick
from paper.block import has_official_lists
from paper.figure2 import load_case, write_figure
from paper.jobs import Job, Scores, plan, read_json, scores_of, systems_of, what_is_left
from paper.report import write_tables_report
from paper.systems import FIGURE, SYSTEMS, TABLES
from paper.tables import paired_report, write_table
from runtime import runs
from runtime.journal import read_curves
from runtime.workers import STOP_SIGNALS
from utils import files
from utils.errors import InputError
from utils.files import repository_path
from utils.labels import MEAN, classes_of_record

CODE = Path(__file__).resolve().parents[1]
CRITIC_LOSSES = "loss/critic"  # how those of the adversarial methods begin: another player's objective
RESULT_FILES = (runs.OPTIONS, runs.CURVES, runs.METRICS_CSV, runs.METRICS_JSON)  # of a run; the last one says: done
HEEDED_SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)
STOPPED = {128 + number for number in HEEDED_SIGNALS} | {-number for number in HEEDED_SIGNALS}  # as a child's status


def reproduce(options: Namespace, handed_on: Sequence[str]) -> None:
    """Train what is missing and write what was asked for; an interruption is a KeyboardInterrupt."""
    systems = systems_of(options)
    jobs, waiting = plan(systems, options, handed_on)
    then = f"; then {', '.join(system.key for system in waiting)}" if waiting else ""
    print(f"{options.target}: {what_is_left(jobs, names=True)}{then}", flush=True)
    out = repository_path(options.out)
    if options.target != "paired":
        with files.writing(out, "--out"):
            out.mkdir(parents=True, exist_ok=True)
    trains = not options.tables_only and options.target != "paired"
    failed = [job.name for job in jobs if not carry_out(job, jobs)] if trains else []
    if waiting and trains:
        late, waiting = plan(waiting, options, handed_on)
        late = [job for job in late if job.name not in {job.name for job in jobs}]  # another seed was measured before
        jobs += late
        failed += [job.name for job in late if not carry_out(job, jobs)]
        failed += [
            f"{system.key} (waits for the step times of {' and '.join(system.equal_time)})" for system in waiting
        ]
    name = options.class_name or MEAN
    done = {
        key: [of_class(scores, name) for job in jobs if job.row == key and (scores := scores_of(job))]
        for key in SYSTEMS
    }
    given = [*handed_on, *(["--class", name] if name != MEAN else [])]
    if options.target == "paired":
        print(compare(options.only, done, out))
    official, tables = all(has_official_lists(job.options) for job in jobs), []
    for table in (table for table in TABLES if options.target in (table, "all")):
        rows = {key: done[key] for key in TABLES[table]}
        tables.append(write_table(table, rows, out, shlex.join(given), official))
        print(tables[-1])
    if options.report and tables:
        print(f"report: {write_tables_report(jobs, tables, out, name)}")
    if options.target in ("curves", "all"):
        draw_curves(jobs, out)
    if failed:
        raise InputError(f"not finished: {', '.join(failed)}; the reasons are above, the same command tries again")
    if options.target in ("figure2", "all"):
        draw_figure(options, jobs, out)


def compare(pair: Sequence[str], done: dict[str, list[Scores]], out: Path) -> str:
    """Per-case statistics of two rows from stored results; nothing is trained for it."""
    if lacking := [key for key in pair if not done[key]]:
        table = next(table for table, rows in TABLES.items() if lacking[0] in rows)
        raise InputError(
            f"no scores of {lacking[0]} with these flags in {out / 'runs'}; name the folder with --out, or train it "
            f"first: reproduce.py {table} --only {lacking[0]}"
        )
    report = paired_report((pair[0], pair[1]), done)
    if not report:
        raise InputError(f"{' and '.join(pair)} have no seed in common in {out / 'runs'}; see --seeds")
    return report


# --- one row


def carry_out(job: Job, jobs: Sequence[Job]) -> bool:
    """Train, test and keep a row, unless it is done or another process is at it. False if it failed."""
    if scores_of(job) is not None:
        return True
    device = [f"--{key}={value}" for key in ("device", "gpu") if (value := getattr(job.options, key)) is not None]
    where = ["--exp", job.name, "--model_path", job.options.model_path]
    with claim(job.folder) as lock:
        if lock is None:
            print(f"\n{job.name}: another process is working on it; left to that one", flush=True)
            return True
        if scores_of(job) is not None:  # by another process, since the command began
            return True
        print(f"\n{job.name}: {what_is_left(jobs)}", flush=True)
        try:
            run_script_of(["train.py", *job.flags, *where, "--resume"], lock)
            run_script_of(["test_LA.py", *where, *device, "--skip", "figures"], lock)
            keep(job)
        except InputError as error:
            print(f"{job.name}: {error}", file=sys.stderr, flush=True)
            return False
    return True


@contextmanager
def claim(folder: Path) -> Iterator[int | None]:
    """The right to work on a run, as an open lock file; None where another process has it.

    The lock is inherited by the scripts that do the work, so that it ends with the last of them, however they end.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield lock.fileno()


def run_script_of(command: Sequence[str], lock: int) -> None:
    """Run a script of this folder as a process of its own, so that its peak memory is its own.

    A signal that ends this process is passed on, once: the script saves what it has, then comes KeyboardInterrupt.
    """
    received, children = [], []

    def pass_on(number, frame):
        received.append(number)
        for child in children:
            child.terminate()

    heeded = [number for number in HEEDED_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # not under nohup
    handlers = {number: signal.signal(number, pass_on) for number in heeded}
    try:
        call = [sys.executable, str(CODE / command[0]), *command[1:]]
        children.append(subprocess.Popen(call, pass_fds=[lock], process_group=0))  # no Ctrl-C but that passed on
        if received:
            children[0].terminate()
        status = children[0].wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received or status in STOPPED:
        raise KeyboardInterrupt
    if status:
        raise InputError(f"`{shlex.join(['python', f'code/{command[0]}', *command[1:]])}` ended with status {status}")


def keep(job: Job) -> None:
    """Copy what a table and a reader need from the run folder; the scores last, for they say that all is there."""
    with files.writing(job.results, "--out"):
        job.results.mkdir(parents=True, exist_ok=True)
    for name in RESULT_FILES:
        with files.atomic(job.results / name, "--out") as temporary:
            shutil.copyfile(job.folder / name, temporary)


def draw_curves(jobs: Sequence[Job], out: Path) -> None:
    """Write <out>/curves.png: the training loss, all terms together, of each row's first seed that is done."""
    from evaluation.figures import curves_figure  # matplotlib takes a second to import

    series = {}
    for job in jobs:
        name = SYSTEMS[job.row].title(job.options)
        if scores_of(job) is not None and name not in series:
            series[name] = []
            for row in read_curves(job.results):
                losses = [v for k, v in row.items() if k.startswith("loss/") and not k.startswith(CRITIC_LOSSES)]
                if losses:
                    series[name].append((row["iteration"], sum(losses)))
    curves_figure(series, out / "curves.png", "Training loss, all terms but the critics'", "loss")
    print("written:", out / "curves.png")


# --- figure 2


def draw_figure(options: Namespace, jobs: Sequence[Job], out: Path) -> None:
    """Write <out>/figure2.png and .pdf from the predictions of the first seed."""
    first = {job.row: job for job in jobs if job.options.seed == options.seeds[0]}
    rows = [row for row in dict.fromkeys((*FIGURE, *options.only)) if row in first]
    if not rows:
        raise InputError(
            f"figure2 has no row to draw: {', '.join(options.only)} waits for the step times of other rows; name these "
            "with --only, too"
        )
    if lacking := [row for row in rows if not (first[row].folder / runs.METRICS_JSON).exists()]:
        raise InputError(
            f"figure2 needs the predictions of {', '.join(lacking)}, and there are none in {first[lacking[0]].folder}; "
            "they are not among the stored results: name the folder of the runs with --model_path, or run these rows "
            "(again, with another --out)"
        )
    contents = {row: read_json(first[row].folder / runs.METRICS_JSON) for row in rows}
    scores = {row: reported_scores(content) for row, content in contents.items()}
    titles = choose_cases(options.cases, scores[FIGURE[-1] if FIGURE[-1] in rows else rows[-1]])
    cases = []
    for case, title in titles.items():
        files, captions = {}, {}
        for row in rows:
            trained = first[row].options
            name = SYSTEMS[row].title(trained)
            files[name] = first[row].folder / runs.PREDICTIONS / f"{case}.nii.gz"
            dice, hd95 = (scores[row][case][metric] for metric in ("dice", "hd95_vox"))
            captions[name] = f"Dice {100 * dice:.1f} %, 95HD {'-' if hd95 is None else f'{hd95:.1f}'} vox"
        num_classes = len(classes_of_record(contents[row].get("classes")))
        cases.append(load_case(repository_path(trained.root_path), case, files, title, captions, num_classes))
    print("written:", ", ".join(map(str, write_figure(cases, out / "figure2"))))


def reported_scores(scores: Scores) -> dict[str, dict]:
    """Case id -> scores of the prediction that was written, of several classes their mean."""
    kind = scores["reported"]["head"], scores["reported"]["post"]
    return {case["case"]: case for case in pick(of_class(scores)["cases"], *kind)}


def choose_cases(asked: Sequence[str] | None, scores: dict[str, dict]) -> dict[str, str]:
    """Case id -> title: those asked for, or the best, median and worst in Dice."""
    if unknown := [case for case in asked or () if case not in scores]:
        raise InputError(f"--cases {unknown[0]} is no test case; there are: {', '.join(sorted(scores))}")
    if asked:
        return {case: case for case in asked}
    order = sorted(scores, key=lambda case: scores[case]["dice"], reverse=True)
    named = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    return {case: f"{name}  {case}" for name, case in named.items()}
