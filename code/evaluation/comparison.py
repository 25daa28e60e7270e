"""Tested runs side by side: which of them are one method with several seeds, and how far apart methods are."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.metrics import summarise
from evaluation.statistics import MIN_CASES, CrossedDifference, crossed_difference, holm
from evaluation.tables import FILTER_NAMES, Score, class_names, columns_of, mean_sd, of_class, pick, text_table
from runtime import runs
from utils.labels import MEAN

# Options that do not tell methods apart.
OF_NO_MATTER = runs.FREE_ON_RESUME.union(runs.OF_THE_COMMAND, ("seed",)) - {"root_path"}
SEED_IN_NAME = re.compile(r"([_-]*seed|(^|[_-]+)s)?[_-]*\d*$")


@dataclass(frozen=True, eq=False)
class TestedRun:
    """A run with its scores."""

    __test__ = False  # no test of pytest's

    name: str
    content: Mapping[str, Any]  # of its metrics.json
    folder: Path  # of its curves.csv
    masks: Path | None = None  # folder of its predictions, where there is one
    root: Path | None = None  # folder of its scans, where they are at hand
    of: str = MEAN  # the class that is meant, where there are several

    @cached_property
    def scores(self) -> list[Score]:
        """Of every case, output and filter; a distance that is undefined is NaN."""
        cases = of_class(self.content, self.of)["cases"]
        return [{k: np.nan if v is None else v for k, v in score.items()} for score in cases]

    @cached_property
    def by_class(self) -> dict[str, "TestedRun"]:
        """The run of each class by name; {} where there is one class."""
        return {name: dataclasses.replace(self, of=name) for name in class_names(self.content)}

    @property
    def kind(self) -> tuple[str, str]:
        """Reported output and filter."""
        return self.content["reported"]["head"], self.content["reported"]["post"]

    @cached_property
    def reported(self) -> dict[str, Score]:
        """Case -> scores of the reported output."""
        return {score["case"]: score for score in pick(self.scores, *self.kind)}

    @property
    def options(self) -> Mapping[str, Any]:
        return self.content["options"]

    def same_method(self, other: "TestedRun") -> bool:
        """Whether the other run differs in nothing but its seed."""
        ours, theirs = ({k: v for k, v in run.options.items() if k not in OF_NO_MATTER} for run in (self, other))
        return (ours, self.kind) == (theirs, other.kind) and self.options.get("seed") != other.options.get("seed")


def group_seeds(tested: Sequence[TestedRun]) -> list[list[TestedRun]]:
    """Runs that differ in nothing but their seed together, in the order given."""
    groups: list[list[TestedRun]] = []
    for run in tested:
        group = next((g for g in groups if all(run.same_method(other) for other in g)), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return groups


def group_name(group: Sequence[TestedRun]) -> str:
    """The name of a run; of several, what their names begin with, without the seed."""
    first = group[0].name
    if len(group) == 1:
        return first
    return SEED_IN_NAME.sub("", os.path.commonprefix([run.name for run in group])) or first


def dice_difference(first: Sequence[TestedRun], second: Sequence[TestedRun]) -> CrossedDifference | None:
    """Dice of second - first over the seeds and cases that both have; None without any.

    Two single runs are compared whatever their seeds.
    """
    if len(first) == len(second) == 1:
        pairs = [(first[0], second[0])]
    else:
        of_first = {run.options.get("seed"): run for run in first}
        pairs = [(of_first[seed], run) for run in second if (seed := run.options.get("seed")) in of_first]
    tested = [run.reported for pair in pairs for run in pair]
    cases = [case for case in first[0].reported if all(case in scores for scores in tested)]
    if not pairs or not cases:
        return None
    dice = np.array([[[run.reported[case]["dice"] for case in cases] for run in pair] for pair in pairs])
    return crossed_difference(dice[:, 0], dice[:, 1])


def comparison_rows(tested: Sequence[TestedRun]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: methods with mean ± sd, and their difference in Dice to the first.

    A method with several seeds has a row for all of them, with the sd over seeds, and an indented one for each.
    """
    groups = group_seeds(tested)
    differences = [None, *(dice_difference(groups[0], group) for group in groups[1:])]
    corrected = holm([difference.p if difference else np.nan for difference in differences])
    columns = columns_of([score for run in tested for score in run.scores])
    several = len(groups) > 1
    rows = []
    for group, difference, p in zip(groups, differences, corrected, strict=True):
        summaries = [summarise([*run.reported.values()]) for run in group]
        cells = [_written(difference, group, groups[0]), f"{p:.2g}" if np.isfinite(p) else ""] if several else []
        if len(group) > 1:
            means = [_over_seeds(metric, summaries) for metric in columns]
            rows.append([f"{group_name(group)}, {len(group)} seeds", _output(group[0]), *means, *cells])
            cells = [""] * len(cells)
        for run, summary in zip(group, summaries, strict=True):
            name = run.name if len(group) == 1 else f"  {run.name}"
            rows.append([name, _output(run), *(mean_sd(metric, summary[metric]) for metric in columns), *cells])
    header = ["run", "output", *columns.values()]
    return [*header, *(["Dice minus first [95 %]", "p (Holm)" if len(groups) > 2 else "p"] if several else [])], rows


def comparison_table(tested: Sequence[TestedRun]) -> str:
    """The rows as text, and below what the numbers are."""
    return f"{text_table(*comparison_rows(tested))}\n\n{comparison_note(tested)}"


def comparison_note(tested: Sequence[TestedRun]) -> str:
    """What the numbers of a comparison are."""
    groups = group_seeds(tested)
    seeds = any(len(group) > 1 for group in groups)
    sentences = ["Mean ± sd over cases" + ("; of several seeds, over the means of the seeds." if seeds else ".")]
    if len(groups) > 1:
        pairs, what = ("case and seed", "other seeds and cases") if seeds else ("case", "other cases, not other seeds")
        sentences.append(f"Differences are paired by {pairs}; the interval is for {what}.")
        differences = [dice_difference(groups[0], group) for group in groups[1:]]
        if any(difference and difference.cases < MIN_CASES for difference in differences):
            sentences.append(f"No p-value from fewer than {MIN_CASES} cases.")
    sentences += _said_of_classes(tested)
    if len({run.root for run in tested}) > 1:
        sentences.append("The runs were tested on cases of different folders; equal ids are taken for equal cases.")
    return " ".join(sentences)


def _said_of_classes(tested: Sequence[TestedRun]) -> list[str]:
    """What the scores are of, where there are several classes."""
    classes = {", ".join(run.by_class) for run in tested}
    if classes == {""}:
        return []
    if len(classes) > 1:
        return ["The runs have different classes."]
    return [f"Scores are means over the classes {classes.pop()}." if tested[0].of == MEAN else f"Class {tested[0].of}."]


def _output(run: TestedRun) -> str:
    head, post = run.kind
    return head if post == "none" else f"{head}, {FILTER_NAMES[post]}"


def _over_seeds(metric: str, summaries: Sequence[dict[str, dict[str, float]]]) -> str:
    means = [summary[metric]["mean"] for summary in summaries]
    missed = sum(summary[metric]["missed"] for summary in summaries)
    return mean_sd(metric, {"mean": np.mean(means), "sd": np.std(means, ddof=1), "missed": missed})


def _written(difference: CrossedDifference | None, group: Sequence[TestedRun], first: Sequence[TestedRun]) -> str:
    if group is first:
        return ""
    if difference is None:
        return "no seed and case in common"
    mean, low, high = (100 * value for value in difference[:3])
    interval = f" [{low:+.2f}, {high:+.2f}]" if np.isfinite(low) else ""
    left_out = [
        f"{used} of {most} {of}"
        for used, most, of in (
            (difference.cases, max(len(run.reported) for run in (*first, *group)), "cases"),
            (difference.seeds, max(len(first), len(group)), "seeds"),
        )
        if used < most
    ]
    return f"{mean:+.2f}{interval}" + (f" ({', '.join(left_out)})" if left_out else "")
