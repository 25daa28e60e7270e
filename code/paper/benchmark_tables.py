"""Tables and a figure of a benchmark from the stored runs of several seeds, folds and numbers of labels.

`python -m paper.benchmark_tables FOLDER`, in code/: reads FOLDER/runs/<row>[_<N>_labels][_fold<f>]_seed<k>/ and writes
table.csv, table.md and pairs.md of the number of labels with most runs to FOLDER, folds.md, folds.csv and
folds_differences.csv of several folds, and label_efficiency.csv and .png of several numbers of labels at which rows can
be compared, in the folds that all of them have. Another number with more than the rows of that figure has tables of
its own, such as table_4_labels.md.
"""

import re
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluation.statistics import CrossedDifference, crossed_difference, holm, paired_test
from paper.jobs import read_json
from paper.tables import markdown
from runtime import runs
from utils.errors import InputError
from utils.files import atomic

BASELINE = "v_net"
EFFICIENCY_CURVES = {
    "v_net": ("V-Net", "#0072B2"),
    "dtml": ("DTML", "#D55E00"),
    "dtml_plus": ("DTML+", "#009E73"),
}  # rows that are drawn over the number of labels
EFFICIENCY = (*EFFICIENCY_CURVES, "dtml_sdm", "dtml_mean", "dtml_plus_sdm", "dtml_plus_mean")  # of the table over it
FACTORS = pd.Series({"dice": 100, "jaccard": 100, "asd_vox": 1, "hd95_vox": 1})  # of the metrics' units
BENCHMARK_COLUMNS = ["row", "labeled", "unlabeled", "seeds", "iterations", *FACTORS.index]
BENCHMARK_COLUMNS += ["difference", "difference_low", "difference_high", "seconds"]
LONG_DTML = ("dtml_1600", "dtml_9900")  # as many seconds as DTML+, on the hippocampus and on the left atrium
PLUS_PARTS = ("plain", "no_pseudo", "no_view", "no_con")  # DTML+ without its parts: dtml_plus.md
BENCHMARK_PAIRS = (  # (first, second): of the baseline and DTML, of DTML+ and its parts, of the paper's Tables 1 and 2
    *((BASELINE, row) for row in EFFICIENCY[1:]),
    *((f"{row}{head}", f"dtml_plus{head}") for row in ("dtml", *LONG_DTML) for head in ("", "_mean")),
    *((f"dtml_plus_{part}{head}", f"dtml_plus{head}") for part in PLUS_PARTS for head in ("", "_mean")),
    *(("v_net", "dtml_labeled"), ("m_d", "dtml_labeled"), ("dtml_labeled", "dtml")),
    *(("dtml_dis", "dtml"), ("dtml_both", "dtml"), ("dtml_dis_sdm", "dtml_sdm"), ("dtml_both_sdm", "dtml_sdm")),
)
NAME = re.compile(r"(?P<row>.+?)(_\d+_labels)?(_fold(?P<fold>\d+))?_seed(?P<seed>\d+)")
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
            raise InputError(f"{path} is not named <row>[_fold<f>]_seed<k>; rename or remove it")
        options, summary = read_json(path / runs.OPTIONS), read_json(path / SUMMARY)
        frame = pd.read_csv(path / runs.METRICS_CSV).query("post == 'none'")
        others = frame["head"] != summary["reported"]["head"]
        frame["row"] = name["row"] + ("_" + frame["head"]).where(others, "")
        frame[FACTORS.index] *= FACTORS
        setting = {"labeled": options["labelnum"], "unlabeled": options["unlabelnum"]}
        setting |= {"seed": int(name["seed"]), "fold": int(name["fold"] or 0), "iterations": summary["iteration"]}
        frames.append(frame.assign(**setting, seconds=summary["training_seconds"], run=path.name))
    scores = pd.concat(frames, ignore_index=True)
    for _, row in scores.groupby(["row", "labeled"]):
        if len(row[SETTING].drop_duplicates()) > 1:
            named = ", ".join(row["run"].unique())
            raise InputError(f"{folder} has runs of one row with other unlabeled scans or iterations: {named}")
    return scores


def paired(first: pd.DataFrame, second: pd.DataFrame, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores (seeds, cases) of two rows, over the cases in which both have all their common seeds; None without any.

    Of several folds, which test each case once, the cases of all lie side by side.
    """
    tables = [row.pivot(index="seed", columns="case", values=metric) for row in (first, second)]
    theirs, ours = tables[0].align(tables[1], join="inner")
    whole = (theirs.notna() & ours.notna()).all()
    theirs, ours = theirs.loc[:, whole], ours.loc[:, whole]
    return (theirs.to_numpy(), ours.to_numpy()) if theirs.size else None


def table(scores: pd.DataFrame, every: pd.DataFrame) -> pd.DataFrame:
    """A line per row, as text: means over seeds and cases, those left out where a metric is undefined.

    p is that of the difference, after Holm's correction for all lines.
    Args: every, scores with the baselines, of which each row meets that of as many labels.
    """
    lines = []
    for (labeled, _, name), row in scores.groupby(["labeled", scores["unlabeled"] > 0, "row"]):
        line = {"row": name, "labeled": labeled, **row.iloc[0][SETTING], "seeds": row["seed"].nunique()}
        line["scans"] = row["case"].nunique()
        line |= {metric: f"{row[metric].mean():.2f}" for metric in FACTORS.index}
        line["seconds"] = round(row.groupby("run")["seconds"].first().mean())
        baseline = every[(every["row"] == BASELINE) & (every["labeled"] == labeled)]
        if name != BASELINE and len(baseline) and (pair := paired(baseline, row, "dice")):
            difference = crossed_difference(*pair)
            ends = zip(BENCHMARK_COLUMNS[-4:-1], difference[:3], strict=True)
            line |= {end: f"{value:+.2f}" for end, value in ends} | {"p": difference.p}
        lines.append(line)
    frame = pd.DataFrame(lines, columns=[*BENCHMARK_COLUMNS, "scans", "p"])
    frame["p"] = [f"{p:.2g}" if np.isfinite(p) else "" for p in holm(frame["p"])]
    return frame.astype(object).fillna("").astype(str)


def table_markdown(lines: pd.DataFrame) -> str:
    """The same cells for people."""
    header = ["row", "labeled / unlabeled", "test scans", "seeds", "iterations", "Dice [%]", "Jaccard [%]"]
    header += ["ASD [voxel]", "95HD [voxel]", "Dice minus V-Net [95 % interval]", "p, Holm", "seconds"]
    cells = []
    for _, line in lines.iterrows():
        interval = f" [{line['difference_low']}, {line['difference_high']}]" if line["difference"] else "–"
        scans = [f"`{line['row']}`", f"{line['labeled']} / {line['unlabeled']}"]
        scans += line[["scans", "seeds", "iterations"]].tolist()
        cells.append([*scans, *line[FACTORS.index], line["difference"] + interval, line["p"], line["seconds"]])
    return markdown(header, cells)


def pairs_markdown(scores: pd.DataFrame) -> str:
    """Second minus first of BENCHMARK_PAIRS in every metric: mean, interval, and the paper's t-test over cases."""
    rows = dict(list(scores.groupby("row")))
    cells, p_values = [], []
    for first, second in BENCHMARK_PAIRS:
        for metric in FACTORS.index if {first, second} <= rows.keys() else ():
            if pair := paired(rows[first], rows[second], metric):
                p_values.append(paired_test(*(row.mean(axis=0) for row in pair)).t_p)
                cells.append([f"`{second}` − `{first}`", metric, str(pair[0].shape[1]), interval_text(*pair)])
    tests = [[f"{p:.2g}", f"{corrected:.2g}"] for p, corrected in zip(p_values, holm(p_values), strict=True)]
    header = ["second − first", "metric", "test scans", "difference [95 % interval]", "paired t-test, p", "p, Holm"]
    return markdown(header, [[*cell, *test] for cell, test in zip(cells, tests, strict=True)])


def interval_text(first: np.ndarray, second: np.ndarray) -> str:
    """The mean of second - first with its interval."""
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*crossed_difference(first, second)[:3])


def folds_markdown(scores: pd.DataFrame) -> str:
    """Dice of the baseline and of the rows that have most folds, in each fold of all of them, and the differences.

    The interval of the last line takes the means of the folds for independent: it is for other scans and for another
    training. That of the table is for other scans alone.
    """
    dice = scores[scores["row"].isin(EFFICIENCY)].pivot_table(index="fold", columns="row", values="dice")
    folds = dice.count()  # of each row; one that was run in fewer would leave only those
    dice = dice.loc[:, ~(folds < folds.drop(BASELINE).max())].dropna()
    others = [row for row in EFFICIENCY[1:] if row in dice]
    cells = [
        [str(fold), *(f"{means[row]:.2f}" for row in (BASELINE, *others))]
        + [f"{means[row] - means[BASELINE]:+.2f}" for row in others]
        for fold, means in dice.iterrows()
    ]
    if len(dice) > 1:
        whole = ["all", *(f"{dice[row].mean():.2f}" for row in (BASELINE, *others))]
        theirs = dice[[BASELINE]].to_numpy().T
        cells.append([*whole, *(interval_text(theirs, dice[[row]].to_numpy().T) for row in others)])
    return markdown(["fold", *(f"`{r}`" for r in (BASELINE, *others)), *(f"`{r}` − V-Net" for r in others)], cells)


def rows_of_folds(scores: pd.DataFrame) -> pd.DataFrame:
    """A line per fold, row and number of labels: means over seeds and cases, and how Dice spreads over them."""
    groups = scores.groupby(["fold", "labeled", *SETTING, "row"])
    spread = groups["dice"].agg(dice_sd="std", dice_median="median", dice_worst="min")
    return groups[list(FACTORS.index)].mean().join(spread).reset_index()


def differences_of_folds(scores: pd.DataFrame) -> pd.DataFrame:
    """Dice of second minus first with its interval, of any two rows of a fold; not corrected for their number."""
    lines = []
    for fold, own in scores.groupby("fold"):
        for ((n, first), ours), ((m, second), theirs) in combinations(own.groupby(["labeled", "row"]), 2):
            if pair := paired(ours, theirs, "dice"):
                lines.append([fold, first, n, second, m, pair[0].shape[1], *crossed_difference(*pair)[:3]])
    columns = ["fold", "first", "first_labeled", "second", "second_labeled", "scans", *BENCHMARK_COLUMNS[-4:-1]]
    return pd.DataFrame(lines, columns=columns)


def label_efficiency_figure(scores: pd.DataFrame, path: Path) -> None:
    """Dice over the number of labels (a dot for each seed, a line through their means), and the paired differences."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rows = {name: scores[scores["row"] == name] for name in EFFICIENCY_CURVES if name in set(scores["row"])}
    for name, row in rows.items():
        title, color = EFFICIENCY_CURVES[name]
        seeds = row.groupby(["labeled", "seed"])["dice"].mean()
        left.plot(seeds.groupby("labeled").mean(), "-", color=color, label=title)
        left.plot(seeds.index.get_level_values("labeled"), seeds, ".", color=color, alpha=0.7)
    left.set(ylabel="Dice [%]")
    left.legend(frameon=False, loc="lower right")
    right.axhline(0, color="0.6", linewidth=0.8)
    for index, name in enumerate(name for name in rows if name != BASELINE):
        for n, (mean, low, high, *_) in differences_by_labels(rows[BASELINE], rows[name]).items():
            x, ends = n * 1.08**index, [[mean - low], [high - mean]]  # beside the interval of another curve
            right.errorbar([x], [mean], ends, fmt="o", color=EFFICIENCY_CURVES[name][1], capsize=3)
    right.set(ylabel="Dice minus V-Net, points")
    numbers = sorted(pd.concat(rows.values())["labeled"].unique())
    for axes in (left, right):
        axes.set(xlabel="labeled scans", xscale="log")
        axes.set_xticks(numbers, [str(n) for n in numbers])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def differences_by_labels(baseline: pd.DataFrame, row: pd.DataFrame) -> dict[int, CrossedDifference]:
    """Of a row to the baseline in Dice, by the numbers of labels that both have."""
    pairs = {n: paired(baseline[baseline["labeled"] == n], own, "dice") for n, own in row.groupby("labeled")}
    return {n: crossed_difference(*pair) for n, pair in pairs.items() if pair}


def write_benchmark(folder: Path) -> None:
    """All tables and the figure of a folder."""
    scores = stored_scores(folder / "runs")
    compared = scores.groupby("labeled")["run"].nunique().idxmax()  # the number of labels with most runs
    texts = {}
    for labeled, rows in scores.groupby("labeled"):
        if labeled == compared or not set(rows["row"]) <= set(EFFICIENCY):
            suffix, methods = "" if labeled == compared else f"_{labeled}_labels", table(rows, scores)
            texts[f"table{suffix}.md"] = f"{table_markdown(methods)}\n"
            texts[f"pairs{suffix}.md"] = f"{pairs_markdown(rows)}\n"
            texts[f"table{suffix}.csv"] = methods.to_csv(index=False, columns=BENCHMARK_COLUMNS)
    if scores["fold"].nunique() > 1:
        texts["folds.md"] = f"{folds_markdown(scores[scores['labeled'] == compared])}\n"
        for name, lines in {"folds": rows_of_folds(scores), "folds_differences": differences_of_folds(scores)}.items():
            texts[f"{name}.csv"] = lines.to_csv(index=False, float_format="%.2f")
    common = scores[scores["fold"].isin(set.intersection(*scores.groupby("labeled")["fold"].agg(set)))]
    curves = common[common["row"].isin(EFFICIENCY_CURVES)].groupby("labeled")["row"].nunique()
    if (curves > 1).sum() > 1:  # one common number of labels would be no curve
        efficiency = table(common[common["row"].isin(EFFICIENCY)], common)
        texts["label_efficiency.csv"] = efficiency.to_csv(index=False, columns=BENCHMARK_COLUMNS)
        label_efficiency_figure(common, folder / "label_efficiency.png")
    for name, text in texts.items():
        with atomic(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_benchmark(Path(sys.argv[1]))
