"""Scores of a run as text: a row per case, mean and spread."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from evaluation.metrics import summarise
from utils.errors import InputError
from utils.labels import MEAN

METRIC_COLUMNS = {  # metric -> (heading, factor, decimals), in the order of the papers' tables
    "dice": ("Dice [%]", 100, 2),
    "jaccard": ("Jaccard [%]", 100, 2),
    "asd_vox": ("ASD [vox]", 1, 2),
    "hd95_vox": ("95HD [vox]", 1, 2),
}
DISTANCES = ("asd_vox", "hd95_vox")  # undefined for a case with one empty mask
ALL_METRIC_COLUMNS = METRIC_COLUMNS | {"asd_mm": ("ASD [mm]", 1, 2), "hd95_mm": ("95HD [mm]", 1, 2)}
FILTER_NAMES = {"none": "no filter", "lcc": "largest component"}  # of a prediction, as tables call them
NO_CLASSES: Mapping[str, Any] = MappingProxyType({})
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


def metric_text(metric: str, value: float) -> str:
    """A value in the metric's unit; a dash where it is undefined."""
    _, factor, decimals = ALL_METRIC_COLUMNS[metric]
    return "-" if not math.isfinite(value) else f"{factor * value:.{decimals}f}"


def mean_sd(metric: str, summary: dict[str, float]) -> str:
    """mean ± sd over the cases where the metric is defined, and how many were missed."""
    missed = f" ({summary['missed']} missed)" if summary["missed"] else ""
    return f"{metric_text(metric, summary['mean'])} ± {metric_text(metric, summary['sd'])}{missed}"


def pick(scores: Sequence[Score], head: str, post: str) -> list[Score]:
    """The scores of one output and post-processing, in the order of the cases."""
    return [score for score in scores if (score["head"], score["post"]) == (head, post)]


def columns_of(scores: Sequence[Score]) -> dict[str, str]:
    """The metrics that all scores have, with their headings; old ones lack those in mm."""
    return {
        metric: heading
        for metric, (heading, _, _) in ALL_METRIC_COLUMNS.items()
        if all(metric in score for score in scores)
    }


def of_class(content: Mapping[str, Any], name: str = MEAN) -> dict[str, Any]:
    """A metrics.json as if a class, or the mean over all, were all that it holds; old ones have one class."""
    names = class_names(content)
    if name != MEAN and name not in names:
        known = f"there are: {', '.join(names)}" if names else "it has one"
        raise InputError(f"--class {name} is no class of run {content.get('exp', '')} ({known})")
    cases = [score for score in content["cases"] if score.get("class", name) == name]
    summary = content.get("summary") if name == MEAN else content["class_summary"][name]
    return {**content, "cases": cases, "summary": summary}


def class_names(content: Mapping[str, Any]) -> list[str]:
    """The classes of a metrics.json; none where there is one."""
    return [one["name"] for one in content.get("classes", ())]


def case_table(
    scores: Sequence[Score], head: str, post: str, by_class: Mapping[str, Sequence[Score]] = NO_CLASSES
) -> str:
    """A row per case of the reported output, then mean ± sd over cases; below, of each class."""
    chosen, columns = pick(scores, head, post), columns_of(scores)
    rows = [[score["case"], *(metric_text(metric, score[metric]) for metric in columns)] for score in chosen]
    for name, of_name in {"mean ± sd": scores, **by_class}.items():
        summary = summarise(pick(of_name, head, post))
        rows.append([name, *(mean_sd(metric, summary[metric]) for metric in columns)])
    return text_table(["case", *columns.values()], rows)


def summary_table(scores: Sequence[Score]) -> str:
    """mean ± sd of every output, with and without the largest-component filter."""
    rows, columns = [], columns_of(scores)
    for head, post in dict.fromkeys((score["head"], score["post"]) for score in scores):
        summary = summarise(pick(scores, head, post))
        rows.append([head, FILTER_NAMES[post], *(mean_sd(metric, summary[metric]) for metric in columns)])
    return text_table(["output", "filter", *columns.values()], rows)
