"""Scores as text: a row per case, mean and spread, the paper's row kept apart, runs side by side."""

import math
from collections.abc import Sequence
from typing import Any

from evaluation.metrics import summarise
from evaluation.statistics import paired_difference
from paper.systems import PrintedRow

COLUMNS = {  # metric -> (heading, factor, decimals), in the order of the papers' tables
    "dice": ("Dice [%]", 100, 2),
    "jaccard": ("Jaccard [%]", 100, 2),
    "asd_vox": ("ASD [vox]", 1, 2),
    "hd95_vox": ("95HD [vox]", 1, 2),
}
DISTANCES = ("asd_vox", "hd95_vox")  # undefined for a case with one empty mask
Score = dict[str, Any]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest])

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])


def number(metric: str, value: float) -> str:
    """A value in the metric's unit; a dash where it is undefined."""
    _, factor, decimals = COLUMNS[metric]
    return "-" if not math.isfinite(value) else f"{factor * value:.{decimals}f}"


def mean_sd(metric: str, summary: dict[str, float]) -> str:
    """mean ± sd over the cases where the metric is defined; a distance always says how many were missed."""
    missed = f" ({summary['missed']} missed)" if metric in DISTANCES else ""
    return f"{number(metric, summary['mean'])} ± {number(metric, summary['sd'])}{missed}"


def pick(scores: Sequence[Score], head: str, post: str) -> list[Score]:
    """The scores of one output and post-processing, in the order of the cases."""
    return [score for score in scores if (score["head"], score["post"]) == (head, post)]


def case_table(scores: Sequence[Score], head: str, post: str) -> str:
    """A row per case of the reported output, then mean ± sd over cases."""
    chosen = pick(scores, head, post)
    rows = [[score["case"], *(number(metric, score[metric]) for metric in COLUMNS)] for score in chosen]
    summary = summarise(chosen)
    rows.append(["mean ± sd", *(mean_sd(metric, summary[metric]) for metric in COLUMNS)])
    return text_table(["case", *(heading for heading, _, _ in COLUMNS.values())], rows)


def summary_table(scores: Sequence[Score]) -> str:
    """mean ± sd of every output, with and without the largest-component filter."""
    kinds = dict.fromkeys((score["head"], score["post"]) for score in scores)
    rows = []
    for head, post in kinds:
        summary = summarise(pick(scores, head, post))
        rows.append([f"{head}, {post}", *(mean_sd(metric, summary[metric]) for metric in COLUMNS)])
    return text_table(["output, post", *(heading for heading, _, _ in COLUMNS.values())], rows)


def printed_table(row: PrintedRow) -> str:
    """The paper's figures, headed so that nobody takes them for ours."""
    figures = (row.dice_percent, row.jaccard_percent, row.asd_vox, row.hd95_vox)
    label = f"{row.name}, {row.labeled} labeled + {row.unlabeled} unlabeled"
    return text_table(
        ["as printed", *(heading for heading, _, _ in COLUMNS.values())], [[label, *(f"{x:.2f}" for x in figures)]]
    )


def comparison_table(runs: dict[str, list[Score]]) -> str:
    """Runs side by side; from the second on, the paired difference in Dice to the first with its 95 % interval."""
    (_, first), *_ = runs.items()
    rows = []
    for name, scores in runs.items():
        summary = summarise(scores)
        cells = [name, *(mean_sd(metric, summary[metric]) for metric in COLUMNS)]
        rows.append([*cells, "" if scores is first else _difference(first, scores)])
    return text_table(
        ["run", *(heading for heading, _, _ in COLUMNS.values()), "Dice minus first [95 % interval]"], rows
    )


def _difference(first: list[Score], second: list[Score]) -> str:
    theirs = {score["case"]: score["dice"] for score in second}
    common = [score for score in first if score["case"] in theirs]
    difference = paired_difference([s["dice"] for s in common], [theirs[s["case"]] for s in common])
    if not difference.pairs:
        return "no case in common"
    mean, low, high = (100 * value for value in difference[:3])
    interval = f" [{low:+.2f}, {high:+.2f}]" if difference.pairs > 1 else ""
    cases = max(len(first), len(second))
    left_out = f" ({difference.pairs} of {cases} cases)" if difference.pairs < cases else ""
    return f"{mean:+.2f}{interval}{left_out}"
