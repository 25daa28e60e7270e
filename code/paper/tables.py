"""The paper's tables: printed and measured metrics in one table, as Markdown, CSV and LaTeX, with paired statistics."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation.statistics import CONFIDENCE, MIN_CASES, PairedTest, holm, paired_test
from evaluation.tables import DISTANCES, METRIC_COLUMNS, metric_text, text_table
from paper.jobs import Scores
from paper.systems import PAIRED_METRICS, PAIRS, SYSTEMS, TITLES
from utils.files import atomic
from utils.words import counted

POSTS = {"none": "measured", "lcc": "measured, filtered"}
HEADER = ["method", "labeled", "unlabeled", "source", *(heading for heading, _, _ in METRIC_COLUMNS.values())]
HEADER += ["seeds", "s / step", "GiB"]
STATISTICS = [f"{metric}_{of}" for metric in METRIC_COLUMNS for of in ("mean", "sd", "missed")]
RECORD_FIELDS = [*HEADER[:4], *STATISTICS, "seconds_per_step", "memory_gib", "seeds"]
COUNTS = ["labeled", "unlabeled", "seeds", *(name for name in STATISTICS if name.endswith("missed"))]
PAIRED_HEADER = ["second - first", "metric", f"difference [{CONFIDENCE:.0%}]", "cases", "t-test p", "Holm"]
PAIRED_HEADER += ["Wilcoxon p", "effect d_z"]
Rows = Mapping[str, Sequence[Scores]]  # key in SYSTEMS -> its scores, one of each seed, in the table's order


def write_table(name: str, rows: Rows, out: Path, flags: str = "", official: bool = True) -> str:
    """Write `<out>/<name>.{md,csv,tex}` and return the table for the terminal.

    Args: flags, those that were given for every row; official, whether the lists are the paper's: else its metrics are
        left out.
    """
    frame = table_frame(rows, official)
    lines = [cells(line) for line in frame.to_dict("records")]
    note = setting_note(
        [s for key, seeds in rows.items() if not SYSTEMS[key].equal_time for s in seeds], flags, official
    )
    note += equal_time_note(rows)
    tests = paired_lines(PAIRS[name], rows, PAIRED_METRICS[name])
    title = f"Table {name[-1]}: {TITLES[name]}"
    parts = [f"# {title}", note, markdown(HEADER, lines), *([sources(rows)] if official else [])]
    parts += [f"## Paired differences\n\n{paired_note(tests)}", markdown(PAIRED_HEADER, tests)] if tests else []
    out.mkdir(parents=True, exist_ok=True)
    texts = {"md": "\n\n".join(parts) + "\n", "tex": latex(HEADER, lines)}
    for end, text in (texts | {"csv": frame.round(4).to_csv(index=False)}).items():
        with atomic(out / f"{name}.{end}", "--out") as temporary:
            temporary.write_text(text, encoding="utf-8")
    shown = [f"\n{title}", note, text_table(HEADER, lines), *([paired_text(tests)] if tests else [])]
    return "\n\n".join([*shown, f"written: {out / name}.md, .csv, .tex"])


# --- the lines of a table


def table_frame(rows: Rows, official: bool = True) -> pd.DataFrame:
    """A line for each printed and each measured result, in the units of HEADER; mean and sd over seeds."""
    records = []
    for key, seeds in rows.items():
        if official and (row := SYSTEMS[key].printed) is not None:
            means = {f"{metric}_mean": value for metric, value in zip(METRIC_COLUMNS, row.metrics(), strict=True)}
            scans = {"labeled": row.labeled, "unlabeled": row.unlabeled}
            records.append({"method": SYSTEMS[key].name, "source": "printed", **scans, **means})
        measured = [measured_record(seeds, post) | {"source": name} for post, name in POSTS.items() if seeds]
        records += [{"method": SYSTEMS[key].name, **record} for record in measured or [{"source": "not run yet"}]]
    frame = pd.DataFrame(records, columns=RECORD_FIELDS)
    numbers = {name: float for name in frame.columns if name not in ("method", "source")}
    return frame.astype(numbers | dict.fromkeys(COUNTS, "Int64"))


def measured_record(seeds: Sequence[Scores], post: str) -> dict[str, Any]:
    """The reported output of a row under a filter, over its seeds."""
    options, record = seeds[0]["options"], {"seeds": len(seeds)}
    summaries = [scores["summary"][f"{scores['reported']['head']}/{post}"] for scores in seeds]
    for metric, (_, factor, _) in METRIC_COLUMNS.items():
        means = factor * pd.Series([summary[metric]["mean"] for summary in summaries], dtype=float)
        record[f"{metric}_mean"], record[f"{metric}_sd"] = means.mean(skipna=False), means.std(skipna=False)
        record[f"{metric}_missed"] = sum(summary[metric]["missed"] for summary in summaries)
    record |= {"labeled": options["labelnum"], "unlabeled": options["unlabelnum"]}
    record["seconds_per_step"] = sum(s["training_seconds"] / s["iteration"] for s in seeds) / len(seeds)
    record["memory_gib"] = max((s["peak_memory_gib"] for s in seeds if s.get("peak_memory_gib")), default=math.nan)
    return record


def cells(line: Mapping[str, Any]) -> list[str]:
    """A line as people read it, under HEADER."""

    def text(name: str, style: str = "") -> str:
        return "" if pd.isna(line[name]) else format(line[name], style)

    def mean(metric: str) -> str:
        if pd.isna(line[f"{metric}_mean"]):
            return "" if pd.isna(line["seeds"]) else "-"
        spread = "" if pd.isna(line[f"{metric}_sd"]) else f" ± {line[f'{metric}_sd']:.2f}"
        missed = line[f"{metric}_missed"]
        return f"{line[f'{metric}_mean']:.2f}{spread}" + (
            "" if pd.isna(missed) or not missed else f" ({missed} missed)"
        )

    scans, cost = [text("labeled"), text("unlabeled")], [text("seconds_per_step", ".2f"), text("memory_gib", ".1f")]
    return [line["method"], *scans, line["source"], *map(mean, METRIC_COLUMNS), text("seeds"), *cost]


# --- notes


def setting_note(scores: Sequence[Scores], flags: str, official: bool = True) -> str:
    """How the metrics came about, so that nobody takes a small setting for the paper's."""
    source = "Printed: the papers' metrics on the official 20 test scans."
    if not official:
        source = "Not on the official lists, so without the papers' metrics."
    if not scores:
        return f"{source} Nothing is measured yet."
    settings = {(s["options"]["preset"], s["options"]["split"], s["options"]["max_iterations"]) for s in scores}
    how = "; ".join(f"--preset {preset} --split {split}, {n} iterations" for preset, split, n in sorted(settings))
    tests = _either(len({case["case"] for case in s["cases"]}) for s in scores)
    machines = "; ".join(sorted({_machine(s) for s in scores}))
    return (
        f"{source} Measured: {how}{f' (flags: {flags})' if flags else ''}; {tests} test scans; last iterate, nothing "
        "is chosen on the test list; mean ± sd over seeds. Filtered: only the largest component is kept. "
        f"s / step and GiB (the most at a time: allocated on a GPU, resident on a CPU): {machines}."
    )


def equal_time_note(rows: Rows) -> str:
    """How long the rows are that train for the seconds of another one; empty where there are none."""
    notes = []
    for system, seeds in ((SYSTEMS[key], seeds) for key, seeds in rows.items()):
        if system.equal_time and seeds:
            longer, own = (SYSTEMS[other].name for other in system.equal_time)
            steps = _either(scores["iteration"] for scores in seeds)
            notes.append(
                f" {system.name}: {steps} iterations, at the step time of {own} the training time of {longer}."
            )
    return "".join(notes)


def _either(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(set(numbers))))


def _machine(scores: Scores) -> str:
    trained = scores.get("training_machine")  # older runs lack it
    machine, where = trained or scores.get("test_machine"), "" if trained else " in the test"
    if not machine:
        return "unknown"
    threads = counted(machine["threads"], "thread")
    return (machine["gpu"] or f"{machine['processor']} with {threads}") + where


def sources(rows: Rows) -> str:
    """Where each printed line comes from."""
    found = [row for key in rows if (row := SYSTEMS[key].printed)]
    lines = [f"- {row.name}, {row.labeled} + {row.unlabeled}: {row.note}." for row in found]
    return "\n".join(["Sources of the printed lines:", "", *lines])


# --- paired statistics


def paired_report(pair: tuple[str, str], rows: Rows) -> str:
    """Per-case statistics of two rows on all four metrics, for the terminal; empty without a common seed."""
    return paired_text(paired_lines([pair], rows, tuple(METRIC_COLUMNS)))


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


def paired_lines(pairs: Sequence[tuple[str, str]], rows: Rows, metrics: Sequence[str]) -> list[list[str]]:
    """A line per pair and metric, under PAIRED_HEADER; pairs without a common seed are left out."""
    tests: dict[tuple[str, str], PairedTest] = {}
    for pair in pairs:
        seeds = set.intersection(*({scores["options"]["seed"] for scores in rows[key]} for key in pair))
        if seeds:
            name = " - ".join(_label(key, rows) for key in pair[::-1])
            ours = [case_means(rows[key], seeds) for key in pair]
            first, second = ours[0].align(ours[1], join="inner", axis=0)  # the cases that both have
            for metric in metrics:
                tests[name, metric] = paired_test(first[metric].to_numpy(), second[metric].to_numpy())
    corrected = holm([test.t_p for test in tests.values()])
    lines = []
    for ((name, metric), test), adjusted in zip(tests.items(), corrected, strict=True):
        d = test.difference
        interval = f"{metric_text(metric, d.mean)} [{metric_text(metric, d.low)}, {metric_text(metric, d.high)}]"
        few = d.pairs < MIN_CASES
        p_values = ["-" if few or math.isnan(p) else f"{p:.2g}" for p in (test.t_p, adjusted, test.wilcoxon_p)]
        effect = "-" if math.isnan(test.effect) else f"{test.effect:.2f}"
        lines.append([name, METRIC_COLUMNS[metric][0], interval, str(d.pairs), *p_values, effect])
    return lines


def case_means(scores: Sequence[Scores], seeds: set[int]) -> pd.DataFrame:
    """The reported output without filter, a row per case, a column per metric: the mean over seeds."""
    cases = [
        case
        for s in scores
        if s["options"]["seed"] in seeds
        for case in s["cases"]
        if (case["head"], case["post"]) == (s["reported"]["head"], "none")
    ]
    frame = pd.DataFrame(cases).astype(dict.fromkeys(METRIC_COLUMNS, float))
    for metric in DISTANCES:  # a missed case is charged as in evaluation/metrics.py
        frame[metric] = frame[metric].fillna(frame["diagonal_vox"])
    return frame.groupby("case")[list(METRIC_COLUMNS)].mean()


def _label(key: str, rows: Rows) -> str:
    options = rows[key][0]["options"]
    return f"{SYSTEMS[key].name} {options['labelnum']}/{options['unlabelnum']}"


# --- formats


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    head, *rows = (f"| {' | '.join(row)} |" for row in [header, *lines])
    return "\n".join([head, "|" + "---|" * len(header), *rows])


def latex(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A LaTeX tabular; needs the package booktabs."""
    escapes = str.maketrans({"%": r"\%", "_": r"\_", "±": r"$\pm$"})
    rows = [" & ".join(row).translate(escapes) + r" \\" for row in [header, *lines]]
    head = [f"\\begin{{tabular}}{{lrrl{'r' * (len(header) - 4)}}}", r"\toprule", rows[0], r"\midrule"]
    return "\n".join([*head, *rows[1:], r"\bottomrule", r"\end{tabular}", ""])
