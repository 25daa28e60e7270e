"""The paper's tables: printed and measured figures in one table, as Markdown, CSV and LaTeX, with paired statistics."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluation.statistics import CONFIDENCE, PairedTest, holm, paired_test
from evaluation.tables import COLUMNS, number, text_table
from paper.jobs import Scores
from paper.printed import PrintedRow, printed_row
from paper.systems import PAIRED_METRICS, PAIRS, SYSTEMS, TITLES, System
from utils.files import atomic

POSTS = {"none": "measured", "lcc": "measured, filtered"}
PAPER_SCANS = (16, 64)  # labeled and unlabeled ones of the paper's rows
UPPER_BOUND = (80, 0)
HEADINGS = [heading for heading, _, _ in COLUMNS.values()]
HEADER = ["method", "labeled", "unlabeled", "figures", *HEADINGS, "seeds", "s / step", "GiB"]
OPTIMISTIC = "OPTIMISTIC, NOT A RESULT: Dice [%] of the checkpoint that is best on the test list"
OPTIMISTIC_NOTE = " The last column, and it alone, is chosen on the test list: best of all checkpoints of a run."
PAIRED_HEADER = ["second - first", "metric", f"difference [{CONFIDENCE:.0%}]", "cases", "t-test p", "Holm"]
PAIRED_HEADER += ["Wilcoxon p", "effect d_z"]


class Mean(NamedTuple):
    """Mean over seeds of the mean over cases, in the unit of metrics.json; NaN where it is undefined."""

    mean: float
    sd: float = math.nan  # over seeds; NaN for a single one
    missed: int = 0  # cases without a distance, all seeds together

    def text(self, metric: str) -> str:
        spread = f" ± {number(metric, self.sd)}" if math.isfinite(self.sd) else ""
        return number(metric, self.mean) + spread + (f" ({self.missed} missed)" if self.missed else "")


@dataclass(frozen=True)
class Line:
    """One line of a table; what is not known is None."""

    name: str
    source: str
    labeled: int | None = None
    unlabeled: int | None = None
    means: Mapping[str, Mean] | None = None
    seeds: int | None = None
    pace: float | None = None  # seconds per iteration, mean over seeds
    memory: float | None = None  # GiB, the largest of all seeds
    best_on_test: Mean | None = None  # Dice

    def cells(self, optimistic: bool = False) -> list[str]:
        """The line as people read it, under HEADER, and OPTIMISTIC if asked for."""
        scans = [_text(self.labeled), _text(self.unlabeled)]
        means = [self.means[metric].text(metric) if self.means else "" for metric in COLUMNS]
        cost = [_text(self.seeds), _text(self.pace, ".2f"), _text(self.memory, ".1f")]
        flattered = [self.best_on_test.text("dice") if self.best_on_test else ""] if optimistic else []
        return [self.name, *scans, self.source, *means, *cost, *flattered]

    def record(self, optimistic: bool = False) -> dict[str, str | int | float | None]:
        """The line as programs read it: a number per column, in the units of HEADER."""
        record = {"method": self.name, "labeled": self.labeled, "unlabeled": self.unlabeled, "figures": self.source}
        for metric, (_, factor, _) in COLUMNS.items():
            mean = self.means[metric] if self.means else Mean(math.nan)
            record[f"{metric}_mean"], record[f"{metric}_sd"] = _rounded(factor * mean.mean), _rounded(factor * mean.sd)
            record[f"{metric}_missed"] = mean.missed if self.means else None
        record |= {"seconds_per_step": _rounded(self.pace), "memory_gib": _rounded(self.memory)}
        flattered = {
            "optimistic_dice_not_a_result": _rounded(100 * self.best_on_test.mean) if self.best_on_test else None
        }
        return record | {"seeds": self.seeds} | (flattered if optimistic else {})


def write_table(
    name: str, rows: Mapping[str, Sequence[Scores]], out: Path, flags: str = "", optimistic: bool = False
) -> str:
    """Write `<out>/<name>.{md,csv,tex}`.

    Args: rows, key in SYSTEMS -> its scores, one of each seed, in the table's order; flags, those that were given by
        hand for every row; optimistic, for a last column with the checkpoint that is best on the test list.
    Returns: the table for the terminal.
    """
    lines = [line for key, seeds in rows.items() for line in system_lines(SYSTEMS[key], seeds)]
    cells = [line.cells(optimistic) for line in lines]
    header = [*HEADER, OPTIMISTIC] if optimistic else HEADER
    note = setting_note([s for key, seeds in rows.items() if not SYSTEMS[key].equal_time for s in seeds], flags)
    note += equal_time_note(rows) + (OPTIMISTIC_NOTE if optimistic else "")
    tests = paired_lines(PAIRS[name], rows, PAIRED_METRICS[name])
    out.mkdir(parents=True, exist_ok=True)
    parts = [f"# Table {name[-1]}: {TITLES[name]}", note, markdown(header, cells), printed_notes(rows)]
    parts += [f"## Paired differences\n\n{paired_note(tests)}", markdown(PAIRED_HEADER, tests)] if tests else []
    _write(out / f"{name}.md", "\n\n".join(parts) + "\n")
    _write(out / f"{name}.tex", latex(header, cells))
    with atomic(out / f"{name}.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, lines[0].record(optimistic))
        writer.writeheader()
        writer.writerows(line.record(optimistic) for line in lines)
    shown = [f"\nTable {name[-1]}: {TITLES[name]}", note, text_table(header, cells)]
    shown += [paired_text(tests)] if tests else []
    return "\n\n".join([*shown, f"written: {out / name}.md, .csv, .tex"])


# --- lines of a table


def system_lines(system: System, seeds: Sequence[Scores]) -> list[Line]:
    """The printed line of a row, then what was measured, without and with the largest-component filter."""
    lines = []
    if (row := _printed(system)) is not None:
        figures = (row.dice_percent, row.jaccard_percent, row.asd_vox, row.hd95_vox)
        means = {metric: Mean(x / factor) for (metric, (_, factor, _)), x in zip(COLUMNS.items(), figures, strict=True)}
        lines.append(Line(system.name, "printed", row.labeled, row.unlabeled, means))
    if not seeds:
        return [*lines, Line(system.name, "not run yet")]
    pace = float(np.mean([scores["training_seconds"] / scores["iteration"] for scores in seeds]))
    memory = max((scores["peak_memory_gib"] for scores in seeds if scores.get("peak_memory_gib")), default=None)
    scans = [seeds[0]["options"][key] for key in ("labelnum", "unlabelnum")]
    for post, source in POSTS.items():
        means = {metric: over_seeds(metric, seeds, post) for metric in COLUMNS}
        lines.append(Line(system.name, source, *scans, means, len(seeds), pace, memory, best_on_test(seeds, post)))
    return lines


def best_on_test(seeds: Sequence[Scores], post: str) -> Mean | None:
    """Dice of each seed's best checkpoint on the test list; None unless those of all seeds were tested.

    A biased figure: the more checkpoints, the higher. It shows what choosing on the test list is worth.
    """
    if not all(scores.get("checkpoints") for scores in seeds):
        return None
    best = []
    for scores in seeds:
        kind = f"{scores['reported']['head']}/{post}"
        best.append(max(_value(summary[kind]["dice"]["mean"]) for summary in scores["checkpoints"].values()))
    return _over(best)


def over_seeds(metric: str, seeds: Sequence[Scores], post: str) -> Mean:
    """Mean and spread over seeds of the reported output."""
    summaries = [scores["summary"][f"{scores['reported']['head']}/{post}"][metric] for scores in seeds]
    return _over([_value(summary["mean"]) for summary in summaries], sum(summary["missed"] for summary in summaries))


def _over(means: Sequence[float], missed: int = 0) -> Mean:
    sd = float(np.std(means, ddof=1)) if len(means) > 1 else math.nan
    return Mean(float(np.mean(means)), sd, missed)


def _printed(system: System) -> PrintedRow | None:
    labeled, unlabeled = UPPER_BOUND if system.all_labeled else PAPER_SCANS
    return printed_row(system.method, labeled, unlabeled if system.unlabeled else 0, system.variant)


def setting_note(scores: Sequence[Scores], flags: str) -> str:
    """What the figures are, so that nobody takes a small setting for the paper's."""
    printed = "Printed: the papers' figures on the official 20 test scans."
    if not scores:
        return f"{printed} Nothing is measured yet."
    settings = sorted({(s["options"]["preset"], s["options"]["split"], s["options"]["max_iterations"]) for s in scores})
    how = "; ".join(f"--preset {preset} --split {split}, {steps} iterations" for preset, split, steps in settings)
    tests = " or ".join(str(n) for n in sorted({len({case["case"] for case in s["cases"]}) for s in scores}))
    machines = "; ".join(sorted({_machine(s) for s in scores}))
    return (
        f"{printed} Measured: {how}{f' (flags: {flags})' if flags else ''}; {tests} test scans; last iterate, nothing "
        "is chosen on the test list; mean ± sd over seeds. Filtered: only the largest component is kept. "
        f"s / step and GiB (the most at a time: allocated on a GPU, resident on a CPU): {machines}."
    )


def equal_time_note(rows: Mapping[str, Sequence[Scores]]) -> str:
    """How long the rows are that train for the seconds of another one; empty where there are none."""
    notes = []
    for key, seeds in rows.items():
        if SYSTEMS[key].equal_time and seeds:
            lengths = " or ".join(str(n) for n in sorted({scores["iteration"] for scores in seeds}))
            longer, own = (SYSTEMS[other].name for other in SYSTEMS[key].equal_time)
            notes.append(
                f" {SYSTEMS[key].name}: {lengths} iterations, at the step time of {own} the training time of {longer}."
            )
    return "".join(notes)


def _machine(scores: Scores) -> str:
    machine, where = scores.get("training_machine"), ""
    if not machine:  # trained before it was recorded
        machine, where = scores.get("test_machine"), " in the test"
    if not machine:
        return "unknown"
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    return (machine["gpu"] or f"{machine['processor']} with {threads}") + where


def printed_notes(rows: Mapping[str, Sequence[Scores]]) -> str:
    """Where each printed line comes from."""
    found = [row for key in rows if (row := _printed(SYSTEMS[key]))]
    lines = [f"- {row.name}, {row.labeled} + {row.unlabeled}: {row.note}." for row in found]
    return "\n".join(["Sources of the printed lines:", "", *lines])


# --- paired statistics


def paired_report(pairs: Sequence[tuple[str, str]], rows: Mapping[str, Sequence[Scores]]) -> str:
    """Per-case statistics of pairs of rows on all four metrics, for the terminal."""
    return paired_text(paired_lines(pairs, rows, tuple(COLUMNS))) or "nothing to compare: a row is not run yet"


def paired_text(lines: Sequence[Sequence[str]]) -> str:
    """The statistics as text; empty where there are none."""
    return f"{paired_note(lines)}\n\n{text_table(PAIRED_HEADER, lines)}" if lines else ""


def paired_note(lines: Sequence[Sequence[str]]) -> str:
    """What the columns are."""
    return (
        "Per case, mean over the seeds that both rows have, no filter; a missed case counts with the diagonal of its "
        "volume. Bootstrap interval over cases; two-sided p of the paired t-test (as in the paper), after Holm's "
        f"correction for all tests listed ({len(lines)}), and of the signed-rank test; d_z: mean / sd of differences."
    )


def paired_lines(
    pairs: Sequence[tuple[str, str]], rows: Mapping[str, Sequence[Scores]], metrics: Sequence[str]
) -> list[list[str]]:
    """A line per pair and metric, under PAIRED_HEADER; pairs without a common seed are left out."""
    tests: dict[tuple[str, str], PairedTest] = {}
    for first, second in pairs:
        common = {_seed(scores) for scores in rows[first]} & {_seed(scores) for scores in rows[second]}
        if common:
            name = f"{_label(second, rows)} - {_label(first, rows)}"
            for metric in metrics:
                tests[name, metric] = paired_test(*(case_means(rows[key], common, metric) for key in (first, second)))
    corrected = holm([test.t_p for test in tests.values()])
    lines = []
    for ((name, metric), test), adjusted in zip(tests.items(), corrected, strict=True):
        d = test.difference
        interval = f"{number(metric, d.mean)} [{number(metric, d.low)}, {number(metric, d.high)}]"
        p_values = ["-" if math.isnan(p) else f"{p:.2g}" for p in (test.t_p, adjusted, test.wilcoxon_p)]
        effect = "-" if math.isnan(test.effect) else f"{test.effect:.2f}"
        lines.append([name, COLUMNS[metric][0], interval, str(d.pairs), *p_values, effect])
    return lines


def case_means(seeds: Sequence[Scores], common: set[int], metric: str) -> list[float]:
    """A value per case, in the order of the ids: the mean over seeds of the reported output, unfiltered."""
    values: dict[str, list[float]] = {}
    for scores in (scores for scores in seeds if _seed(scores) in common):
        for case in scores["cases"]:
            if (case["head"], case["post"]) == (scores["reported"]["head"], "none"):
                missed = case[metric] is None  # only a distance can be missing: charged as in evaluation/metrics.py
                values.setdefault(case["case"], []).append(case["diagonal_vox"] if missed else case[metric])
    return [float(np.mean(values[case])) for case in sorted(values)]


def _seed(scores: Scores) -> int:
    return scores["options"]["seed"]


def _label(key: str, rows: Mapping[str, Sequence[Scores]]) -> str:
    options = rows[key][0]["options"]
    return f"{SYSTEMS[key].name} {options['labelnum']}/{options['unlabelnum']}"


# --- formats


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *lines])


def latex(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A LaTeX tabular; needs the package booktabs."""
    escapes = str.maketrans({"%": r"\%", "_": r"\_", "±": r"$\pm$"})
    rows = [" & ".join(row).translate(escapes) + r" \\" for row in [header, *lines]]
    head = [f"\\begin{{tabular}}{{lrrl{'r' * (len(header) - 4)}}}", r"\toprule", rows[0], r"\midrule"]
    return "\n".join([*head, *rows[1:], r"\bottomrule", r"\end{tabular}", ""])


def _value(value: float | None) -> float:
    return math.nan if value is None else value


def _text(value: float | None, style: str = "") -> str:
    return "" if value is None else format(value, style)


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
