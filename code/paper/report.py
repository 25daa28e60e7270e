"""The HTML report on the rows of the paper's tables, from what reproduce.py stored."""

from collections.abc import Sequence
from pathlib import Path

from dataloaders.case_files import case_path
from evaluation.comparison import TestedRun
from evaluation.report import write_report
from paper.jobs import Job, read_json, scores_of
from paper.systems import SYSTEMS
from runtime import runs
from utils.errors import InputError
from utils.files import repository_path
from utils.labels import MEAN


def write_tables_report(jobs: Sequence[Job], tables: Sequence[str], out: Path, of: str = MEAN) -> Path:
    """One page on the stored results of each row's first seed; returns its path.

    It opens with the class `of`, and has slices and surfaces where scans and predictions are at hand, which are not
    among the stored results.
    """
    first = {job.row: job for job in reversed(jobs) if scores_of(job) is not None}
    rows = [first[key] for key in SYSTEMS if key in first]
    if not rows:
        raise InputError("--report has nothing to show: no row is done yet")
    names = report_names(rows)
    masks, root = [predictions_of(job) for job in rows], repository_path(rows[0].options.root_path)
    cases = {score["case"] for job in rows for score in scores_of(job)["cases"]}
    at_hand = root if any(masks) and all(case_path(root, case).exists() for case in cases) else None
    tested = [
        TestedRun(name, scores_of(job), job.results, folder, at_hand, of)
        for name, job, folder in zip(names, rows, masks, strict=True)
    ]
    title, blocks = "Tables of the DTML paper, reproduced", [table.partition("\n\nwritten: ")[0] for table in tables]
    write_report(out / runs.REPORT, title, tested, blocks, "--out")
    return out / runs.REPORT


def report_names(rows: Sequence[Job]) -> list[str]:
    """The rows as the tables call them, with the seed unless it is that of all."""
    seeds = {job.options.seed for job in rows}
    named = [(SYSTEMS[job.row].title(job.options), job) for job in rows]
    return [name if len(seeds) == 1 else f"{name}, seed {job.options.seed}" for name, job in named]


def predictions_of(job: Job) -> Path | None:
    """Folder of the predictions behind the stored scores; None if they are gone, or of another test."""
    path = job.folder / runs.METRICS_JSON
    same = path.exists() and read_json(path).get("cases") == scores_of(job)["cases"]
    return job.folder / runs.PREDICTIONS if same and (job.folder / runs.PREDICTIONS).is_dir() else None
