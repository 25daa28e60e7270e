"""Tables and a figure of a benchmark from the kept runs of several seeds and numbers of labels.

`python -m paper.benchmark_tables FOLDER`, in code/: reads FOLDER/runs/<row>[_<N>_labels]_seed<k>/ and writes
table.csv, table.md, pairs.md, label_efficiency.csv and label_efficiency.png to FOLDER.
"""

import csv
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluation.statistics import CrossedDifference, crossed_difference, paired_test
from paper.jobs import read_json
from runtime import runs
from utils.errors import InputError
from utils.files import atomic

BASELINE = "v_net"
CURVES = {"v_net": ("V-Net", "#0072B2"), "dtml": ("DTML", "#D55E00")}  # rows that are drawn over the number of labels
EFFICIENCY = (*CURVES, "dtml_sdm", "dtml_mean")  # rows of the table over the number of labels
TABLE_LABELS = 8  # labeled scans of the table that compares methods
METRICS = {"dice": 100, "jaccard": 100, "asd_vox": 1, "hd95_vox": 1}  # and the factor of their unit
COLUMNS = (
    *("row", "labeled", "unlabeled", "seeds", "iterations", *METRICS),
    *("difference", "difference_low", "difference_high", "seconds"),
)
PAIRS = (  # of the paper's Tables 1 and 2: (first, second)
    *(("v_net", "dtml_labeled"), ("m_d", "dtml_labeled"), ("dtml_labeled", "dtml")),
    *(("dtml_dis", "dtml"), ("dtml_both", "dtml"), ("dtml_dis_sdm", "dtml_sdm"), ("dtml_both_sdm", "dtml_sdm")),
)
NAME = re.compile(r"(?P<row>.+?)(_\d+_labels)?_seed(?P<seed>\d+)")
SUMMARY = "summary.json"  # of a kept run: metrics.json without the scores of the cases
POST = "none"


@dataclass
class Row:
    """The runs of one row with one number of labels: an output of a method under fixed settings."""

    name: str
    labeled: int
    unlabeled: int
    iterations: int
    scores: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)  # seed -> case -> metric -> value
    seconds: dict[int, float] = field(default_factory=dict)  # seed -> of the training

    def mean(self, metric: str) -> float:
        """Over seeds and cases, those left out where the metric is undefined."""
        return float(np.nanmean([case[metric] for cases in self.scores.values() for case in cases.values()]))

    def minus(self, other: "Row", metric: str = "dice") -> CrossedDifference | None:
        """Difference in a metric, paired by case, over the seeds that both have."""
        pairs = self.paired(other, metric)
        return crossed_difference(*pairs) if pairs else None

    def paired(self, other: "Row", metric: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Scores (seeds, cases) of the other and of this row, over what both have; None without a common seed."""
        seeds = sorted(self.scores.keys() & other.scores.keys())
        if not seeds:
            return None
        cases = sorted(set.intersection(*({*row.scores[seed]} for row in (self, other) for seed in seeds)))
        theirs, ours = (
            np.array([[row.scores[seed][case][metric] for case in cases] for seed in seeds]) for row in (other, self)
        )
        return theirs, ours


def read_rows(folder: Path) -> list[Row]:
    """Every row among the kept runs; an output that is not the reported one is a row of its own, <row>_<output>."""
    rows: dict[tuple[str, int], Row] = {}
    for path in sorted(folder.iterdir()):
        name = NAME.fullmatch(path.name)
        if name is None:
            raise InputError(f"{path} is not named <row>_seed<k>; rename or remove it")
        options, summary = read_json(path / runs.OPTIONS), read_json(path / SUMMARY)
        for output, scores in _scores(path / runs.METRICS_CSV).items():
            row = name["row"] if output == summary["reported"]["head"] else f"{name['row']}_{output}"
            made = Row(row, options["labelnum"], options["unlabelnum"], summary["iteration"])
            kept = rows.setdefault((row, made.labeled), made)
            if (kept.unlabeled, kept.iterations) != (made.unlabeled, made.iterations):
                raise InputError(f"{path} has other unlabeled scans or iterations than the row's other runs")
            kept.scores[int(name["seed"])] = scores
            kept.seconds[int(name["seed"])] = summary["training_seconds"]
    return sorted(rows.values(), key=lambda row: (row.labeled, row.unlabeled > 0, row.name))


def _scores(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Output -> case -> metric -> value, without component filter."""
    scores: dict[str, dict] = defaultdict(dict)
    with open(path, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["post"] == POST:
                scores[line["head"]][line["case"]] = {metric: float(line[metric]) for metric in METRICS}
    return scores


def table(rows: Iterable[Row], every: Sequence[Row]) -> list[dict[str, str]]:
    """The cells of `rows` by column; `every` holds the baselines, of which each row meets that of as many labels."""
    baselines = {row.labeled: row for row in every if row.name == BASELINE}
    return [_cells(row, baselines.get(row.labeled)) for row in rows]


def _cells(row: Row, baseline: Row | None) -> dict[str, str]:
    cells = {"row": row.name, "labeled": row.labeled, "unlabeled": row.unlabeled, "seeds": len(row.scores)}
    cells |= {"iterations": row.iterations, "seconds": round(np.mean([*row.seconds.values()]))}
    cells |= {metric: f"{factor * row.mean(metric):.2f}" for metric, factor in METRICS.items()}
    difference = row.minus(baseline) if baseline not in (None, row) else None
    if difference is not None:
        values = 100 * np.array(difference[:3])
        cells |= {f"difference{end}": f"{x:+.2f}" for end, x in zip(("", "_low", "_high"), values, strict=True)}
    return {column: str(cells.get(column, "")) for column in COLUMNS}


def write_csv(path: Path, lines: Sequence[dict[str, str]]) -> None:
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def markdown(lines: Sequence[dict[str, str]]) -> str:
    """The same cells for people."""
    heads = ("row", "labeled / unlabeled", "seeds", "iterations", "Dice [%]", "Jaccard [%]", "ASD [voxel]")
    heads += ("95HD [voxel]", "Dice minus V-Net [95 % interval]", "seconds")
    text = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for line in lines:
        interval = f" [{line['difference_low']}, {line['difference_high']}]" if line["difference"] else "–"
        cells = [f"`{line['row']}`", f"{line['labeled']} / {line['unlabeled']}", line["seeds"], line["iterations"]]
        cells += [line[metric] for metric in METRICS]
        text.append(f"| {' | '.join([*cells, line['difference'] + interval, line['seconds']])} |")
    return "\n".join(text)


def pairs_markdown(rows: Iterable[Row]) -> str:
    """Second minus first of PAIRS in every metric: mean, interval, and the paired t-test over cases of the paper."""
    found = {row.name: row for row in rows}
    text = ["| second − first | metric | difference [95 % interval] | paired t-test, p |", "|---|---|---|---|"]
    for first, second in PAIRS:
        for metric, factor in METRICS.items() if {first, second} <= found.keys() else ():
            theirs, ours = found[second].paired(found[first], metric)
            mean, low, high = factor * np.array(crossed_difference(theirs, ours)[:3])
            p = paired_test(theirs.mean(axis=0), ours.mean(axis=0)).t_p
            text.append(f"| `{second}` − `{first}` | {metric} | {mean:+.2f} [{low:+.2f}, {high:+.2f}] | {p:.2g} |")
    return "\n".join(text)


def label_efficiency_figure(rows: Sequence[Row], path: Path) -> None:
    """Dice over the number of labels (a dot for each seed, a line through their means), and the paired difference."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    curves = {name: {row.labeled: row for row in rows if row.name == name} for name in CURVES}
    for name, (title, color) in CURVES.items():
        labels = sorted(curves[name])
        left.plot(labels, [100 * curves[name][n].mean("dice") for n in labels], "-", color=color, label=title)
        for n in labels:
            seeds = curves[name][n].scores.values()
            dice = [100 * np.mean([case["dice"] for case in cases.values()]) for cases in seeds]
            left.plot([n] * len(dice), dice, ".", color=color, alpha=0.7)
    left.set(ylabel="Dice [%]")
    left.legend(frameon=False, loc="lower right")
    right.axhline(0, color="0.6", linewidth=0.8)
    base, other = curves.values()
    for n in sorted(base.keys() & other.keys()):
        difference = other[n].minus(base[n])
        if difference is not None:
            mean, low, high = 100 * np.array(difference[:3])
            right.errorbar([n], [mean], [[mean - low], [high - mean]], fmt="o", color=CURVES["dtml"][1], capsize=3)
    right.set(ylabel="DTML minus V-Net, Dice points")
    every = sorted({row.labeled for row in rows if row.name in CURVES})
    for axes in (left, right):
        axes.set(xlabel="labeled scans", xscale="log")
        axes.set_xticks(every, [str(n) for n in every])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def write_benchmark(folder: Path) -> None:
    """All tables and the figure of a folder."""
    rows = read_rows(folder / "runs")
    of_tables = [row for row in rows if row.labeled == TABLE_LABELS]
    methods = table(of_tables, rows)
    efficiency = table([row for row in rows if row.name in EFFICIENCY], rows)
    write_csv(folder / "table.csv", methods)
    write_csv(folder / "label_efficiency.csv", efficiency)
    for name, text in {"table.md": markdown(methods), "pairs.md": pairs_markdown(of_tables)}.items():
        with atomic(folder / name) as temporary:
            temporary.write_text(f"{text}\n", encoding="utf-8")
    label_efficiency_figure(rows, folder / "label_efficiency.png")


if __name__ == "__main__":
    write_benchmark(Path(sys.argv[1]))
