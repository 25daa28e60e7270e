"""The paper's tables: printed and measured figures in one row, as Markdown, CSV and LaTeX."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reporting.printed import printed_row
from reporting.systems import SYSTEMS, System
from reporting.tables import COLUMNS, number, text_table
from utils.runs import atomic
from utils.statistics import holm, paired_test

Scores = dict[str, Any]  # content of a metrics.json
POSTS = {"none": "no filter", "lcc": "largest component"}
PAPER_SCANS = (16, 64)  # labeled and unlabeled ones of the paper's rows
UPPER_BOUND = (80, 0)
HEADER = (
    "method",
    "labeled",
    "unlabeled",
    "source",
    *(heading for heading, _, _ in COLUMNS.values()),
    "seeds",
    "s / iteration",
    "memory [GiB]",
)


def write_table(name: str, rows: dict[str, list[Scores]], out: Path) -> str:
    """Write `<out>/<name>.{md,csv,tex}`; rows are in the paper's order, each with its scores over seeds.

    Returns: the table for the terminal.
    """
    lines = [line for key, seeds in rows.items() for line in system_lines(SYSTEMS[key], seeds)]
    out.mkdir(parents=True, exist_ok=True)
    note = setting_note([scores for seeds in rows.values() for scores in seeds])
    write_text(out / f"{name}.md", f"# {name.capitalize()}\n\n{note}\n\n{markdown(lines)}\n")
    write_text(out / f"{name}.tex", latex(lines))
    with atomic(out / f"{name}.csv") as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([HEADER, *lines])
    return f"\n{name}: {note}\n\n{text_table(HEADER, lines)}"


def system_lines(system: System, seeds: Sequence[Scores]) -> list[list[str]]:
    """The printed line of a row, then what was measured: without and with the component filter."""
    lines = []
    labeled, unlabeled = UPPER_BOUND if system.all_labeled else PAPER_SCANS
    printed = printed_row(system.method, labeled, unlabeled if system.unlabeled else 0, system.variant)
    if printed is not None:
        figures = (printed.dice_percent, printed.jaccard_percent, printed.asd_vox, printed.hd95_vox)
        scans = [str(printed.labeled), str(printed.unlabeled)]
        lines.append([system.name, *scans, "printed", *(f"{x:.2f}" for x in figures), "", "", ""])
    if not seeds:
        return [*lines, [system.name, "", "", "not run yet", *[""] * (len(HEADER) - 4)]]
    for post, filtered in POSTS.items():
        cells = [over_seeds(metric, seeds, post) for metric in COLUMNS]
        scans = [str(seeds[0]["options"][key]) for key in ("labelnum", "unlabelnum")]
        pace = np.mean([s["training_seconds"] / s["iteration"] for s in seeds])
        memory = [s["peak_memory_gib"] for s in seeds if s.get("peak_memory_gib")]
        cost = [str(len(seeds)), f"{pace:.2f}", f"{max(memory):.1f}" if memory else ""]
        lines.append([system.name, *scans, f"measured, {filtered}", *cells, *cost])
    return lines


def over_seeds(metric: str, seeds: Sequence[Scores], post: str) -> str:
    """Mean over seeds of the mean over cases, ± sd over seeds where there are several."""
    summaries = [s["summary"][f"{s['reported']['head']}/{post}"][metric] for s in seeds]
    means = [math.nan if summary["mean"] is None else summary["mean"] for summary in summaries]
    missed = sum(summary["missed"] for summary in summaries)
    spread = f" ± {number(metric, float(np.std(means, ddof=1)))}" if len(means) > 1 else ""
    return f"{number(metric, float(np.mean(means)))}{spread}" + (f" ({missed} missed)" if missed else "")


def setting_note(scores: Sequence[Scores]) -> str:
    """One sentence on what the measured lines are, so that nobody takes them for the paper's setting."""
    settings = {(s["options"]["preset"], s["options"]["split"], s["options"]["max_iterations"]) for s in scores}
    runs = "; ".join(f"--preset {p} --split {split}, {n} iterations" for p, split, n in sorted(settings))
    measured = f"measured: {runs}, last iterate" if settings else "nothing measured yet"
    return f"Printed: the papers, official 20 test scans. {measured[0].upper()}{measured[1:]}; mean ± sd over seeds."


def paired_report(first: Sequence[Scores], second: Sequence[Scores]) -> str:
    """Per-case statistics of the second row minus the first: scores averaged over seeds, no component filter."""
    tests = {
        metric: paired_test(*(case_means(seeds, metric) for seeds in aligned(first, second))) for metric in COLUMNS
    }
    corrected = holm([test.t_p for test in tests.values()])
    lines = []
    for (metric, test), adjusted in zip(tests.items(), corrected, strict=True):
        d = test.difference
        interval = f"{number(metric, d.mean)} [{number(metric, d.low)}, {number(metric, d.high)}]"
        p_values = (f"{p:.3g}" for p in (test.t_p, adjusted, test.wilcoxon_p))
        lines.append([COLUMNS[metric][0], interval, str(d.pairs), *p_values, f"{test.effect:.2f}"])
    header = ["metric", "difference [95 % interval]", "cases", "t-test p", "Holm", "Wilcoxon p", "effect d_z"]
    return text_table(header, lines)


def aligned(first: Sequence[Scores], second: Sequence[Scores]) -> tuple[list[Scores], list[Scores]]:
    """Both rows with the seeds that they share."""
    common = {s["options"]["seed"] for s in first} & {s["options"]["seed"] for s in second}
    return tuple([s for s in seeds if s["options"]["seed"] in common] for seeds in (first, second))


def case_means(seeds: Sequence[Scores], metric: str) -> list[float]:
    """A value per case, in the order of the case ids: the mean over seeds of the reported output, unfiltered."""
    per_seed = [
        {
            case["case"]: math.nan if case[metric] is None else case[metric]
            for case in scores["cases"]
            if (case["head"], case["post"]) == (scores["reported"]["head"], "none")
        }
        for scores in seeds
    ]
    return [float(np.mean([values[case] for values in per_seed])) for case in sorted(per_seed[0])] if per_seed else []


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [HEADER, ["---"] * len(HEADER), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def latex(lines: Sequence[Sequence[str]]) -> str:
    """A LaTeX tabular (booktabs)."""

    def escaped(row: Sequence[str]) -> str:
        cells = (cell.replace("%", r"\%").replace("_", r"\_").replace("±", r"$\pm$") for cell in row)
        return " & ".join(cells) + r" \\"

    head = [rf"\begin{{tabular}}{{l{'r' * (len(HEADER) - 1)}}}", r"\toprule", escaped(HEADER), r"\midrule"]
    return "\n".join([*head, *map(escaped, lines), r"\bottomrule", r"\end{tabular}", ""])


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
