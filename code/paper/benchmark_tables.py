"""Tables and a figure of a benchmark from the stored runs of several seeds and numbers of labels.

`python -m paper.benchmark_tables FOLDER`, in code/: reads FOLDER/runs/<row>[_<N>_labels]_seed<k>/ and writes
table.csv, table.md, pairs.md, label_efficiency.csv and label_efficiency.png to FOLDER.
"""

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluation.statistics import crossed_difference, paired_test
from paper.jobs import read_json
from paper.tables import markdown
from runtime import runs
from utils.errors import InputError
from utils.files import atomic

BASELINE = "v_net"
EFFICIENCY_CURVES = {
    "v_net": ("V-Net", "#0072B2"),
    "dtml": ("DTML", "#D55E00"),
}  # rows that are drawn over the number of labels
EFFICIENCY = (*EFFICIENCY_CURVES, "dtml_sdm", "dtml_mean")  # rows of the table over the number of labels
TABLE_LABELS = 8  # labeled scans of the table that compares methods
FACTORS = pd.Series({"dice": 100, "jaccard": 100, "asd_vox": 1, "hd95_vox": 1})  # of the metrics' units
BENCHMARK_COLUMNS = ["row", "labeled", "unlabeled", "seeds", "iterations", *FACTORS.index]
BENCHMARK_COLUMNS += ["difference", "difference_low", "difference_high", "seconds"]
BENCHMARK_PAIRS = (  # of the paper's Tables 1 and 2: (first, second)
    *(("v_net", "dtml_labeled"), ("m_d", "dtml_labeled"), ("dtml_labeled", "dtml")),
    *(("dtml_dis", "dtml"), ("dtml_both", "dtml"), ("dtml_dis_sdm", "dtml_sdm"), ("dtml_both_sdm", "dtml_sdm")),
)
NAME = re.compile(r"(?P<row>.+?)(_\d+_labels)?_seed(?P<seed>\d+)")
SUMMARY = "summary.json"  # of a stored run: metrics.json without the scores of the cases
SETTING = ["unlabeled", "iterations"]  # the same in all runs of a row


def stored_scores(folder: Path) -> pd.DataFrame:
    """A line per stored run, output and case, without component filter, metrics in their units.

    An output that is not the reported one is a row of its own, <row>_<output>.
    """
    frames = []
    for path in sorted(folder.iterdir()):
        name = NAME.fullmatch(path.name)
        if name is None:
            raise InputError(f"{path} is not named <row>_seed<k>; rename or remove it")
        options, summary = read_json(path / runs.OPTIONS), read_json(path / SUMMARY)
        frame = pd.read_csv(path / runs.METRICS_CSV).query("post == 'none'")
        others = frame["head"] != summary["reported"]["head"]
        frame["row"] = name["row"] + ("_" + frame["head"]).where(others, "")
        frame[FACTORS.index] *= FACTORS
        setting = {"labeled": options["labelnum"], "unlabeled": options["unlabelnum"]}
        setting |= {"seed": int(name["seed"]), "iterations": summary["iteration"]}
        frames.append(frame.assign(**setting, seconds=summary["training_seconds"], run=path.name))
    scores = pd.concat(frames, ignore_index=True)
    for _, row in scores.groupby(["row", "labeled"]):
        if len(row[SETTING].drop_duplicates()) > 1:
            named = ", ".join(row["run"].unique())
            raise InputError(f"{folder} has runs of one row with other unlabeled scans or iterations: {named}")
    return scores


def paired(first: pd.DataFrame, second: pd.DataFrame, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores (seeds, cases) of two rows, over what both have; None without a common seed."""
    tables = [row.pivot(index="seed", columns="case", values=metric) for row in (first, second)]
    theirs, ours = tables[0].align(tables[1], join="inner")
    return (theirs.to_numpy(), ours.to_numpy()) if len(theirs) else None


def table(scores: pd.DataFrame, every: pd.DataFrame) -> pd.DataFrame:
    """A line per row, as text: means over seeds and cases, those left out where a metric is undefined.

    Args: every, scores with the baselines, of which each row meets that of as many labels.
    """
    lines = []
    for (labeled, _, name), row in scores.groupby(["labeled", scores["unlabeled"] > 0, "row"]):
        line = {"row": name, "labeled": labeled, **row.iloc[0][SETTING], "seeds": row["seed"].nunique()}
        line |= {metric: f"{row[metric].mean():.2f}" for metric in FACTORS.index}
        line["seconds"] = round(row.groupby("seed")["seconds"].first().mean())
        baseline = every[(every["row"] == BASELINE) & (every["labeled"] == labeled)]
        if name != BASELINE and len(baseline) and (pair := paired(baseline, row, "dice")):
            ends = zip(BENCHMARK_COLUMNS[-4:-1], crossed_difference(*pair)[:3], strict=True)
            line |= {end: f"{value:+.2f}" for end, value in ends}
        lines.append(line)
    return pd.DataFrame(lines, columns=BENCHMARK_COLUMNS).astype(object).fillna("").astype(str)


def table_markdown(lines: pd.DataFrame) -> str:
    """The same cells for people."""
    header = ["row", "labeled / unlabeled", "seeds", "iterations", "Dice [%]", "Jaccard [%]", "ASD [voxel]"]
    header += ["95HD [voxel]", "Dice minus V-Net [95 % interval]", "seconds"]
    cells = []
    for _, line in lines.iterrows():
        interval = f" [{line['difference_low']}, {line['difference_high']}]" if line["difference"] else "–"
        scans = [f"`{line['row']}`", f"{line['labeled']} / {line['unlabeled']}", line["seeds"], line["iterations"]]
        cells.append([*scans, *line[FACTORS.index], line["difference"] + interval, line["seconds"]])
    return markdown(header, cells)


def pairs_markdown(scores: pd.DataFrame) -> str:
    """Second minus first of BENCHMARK_PAIRS in every metric: mean, interval, and the paper's t-test over cases."""
    rows = dict(list(scores.groupby("row")))
    cells = []
    for first, second in BENCHMARK_PAIRS:
        for metric in FACTORS.index if {first, second} <= rows.keys() else ():
            theirs, ours = paired(rows[first], rows[second], metric)
            mean, low, high = crossed_difference(theirs, ours)[:3]
            p = paired_test(theirs.mean(axis=0), ours.mean(axis=0)).t_p
            cells.append([f"`{second}` − `{first}`", metric, f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]", f"{p:.2g}"])
    return markdown(["second − first", "metric", "difference [95 % interval]", "paired t-test, p"], cells)


def label_efficiency_figure(scores: pd.DataFrame, path: Path) -> None:
    """Dice over the number of labels (a dot for each seed, a line through their means), and the paired difference."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rows = {name: scores[scores["row"] == name] for name in EFFICIENCY_CURVES}
    for name, (title, color) in EFFICIENCY_CURVES.items():
        seeds = rows[name].groupby(["labeled", "seed"])["dice"].mean()
        left.plot(seeds.groupby("labeled").mean(), "-", color=color, label=title)
        left.plot(seeds.index.get_level_values("labeled"), seeds, ".", color=color, alpha=0.7)
    left.set(ylabel="Dice [%]")
    left.legend(frameon=False, loc="lower right")
    right.axhline(0, color="0.6", linewidth=0.8)
    labels = sorted(scores[scores["row"].isin(EFFICIENCY_CURVES)]["labeled"].unique())
    for n in labels:
        pair = paired(*(row[row["labeled"] == n] for row in rows.values()), "dice")
        if pair:
            mean, low, high = crossed_difference(*pair)[:3]
            right.errorbar(
                [n], [mean], [[mean - low], [high - mean]], fmt="o", color=EFFICIENCY_CURVES["dtml"][1], capsize=3
            )
    right.set(ylabel="DTML minus V-Net, Dice points")
    for axes in (left, right):
        axes.set(xlabel="labeled scans", xscale="log")
        axes.set_xticks(labels, [str(n) for n in labels])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def write_benchmark(folder: Path) -> None:
    """All tables and the figure of a folder."""
    scores = stored_scores(folder / "runs")
    of_tables = scores[scores["labeled"] == TABLE_LABELS]
    methods, efficiency = table(of_tables, scores), table(scores[scores["row"].isin(EFFICIENCY)], scores)
    texts = {"table.md": f"{table_markdown(methods)}\n", "pairs.md": f"{pairs_markdown(of_tables)}\n"}
    texts |= {"table.csv": methods.to_csv(index=False), "label_efficiency.csv": efficiency.to_csv(index=False)}
    for name, text in texts.items():
        with atomic(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    label_efficiency_figure(scores, folder / "label_efficiency.png")


if __name__ == "__main__":
    write_benchmark(Path(sys.argv[1]))
