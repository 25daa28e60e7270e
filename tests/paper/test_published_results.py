"""The pages of docs/results say what the stored runs say."""

import re
from pathlib import Path

import pandas as pd
import pytest

from evaluation.statistics import crossed_difference, paired_difference
from paper.benchmark_tables import paired, write_benchmark
from utils.files import REPOSITORY

RESULTS = REPOSITORY / "docs" / "results"
INTERVAL = re.compile(r"[\[(]([+-]?\d+\.\d\d)(?:,| to) ([+-]?\d+\.\d\d)[\])]")
PAGES = {  # page: where its results begin
    "README.md": "## Results",
    "docs/results/hippocampus/README.md": "# Hippocampus",
    "docs/results/left_atrium/README.md": "# Left atrium",
}


def intervals(text: str) -> set[tuple[float, ...]]:
    return {tuple(float(end) for end in found) for found in INTERVAL.findall(text.replace("−", "-"))}


def official_intervals() -> set[tuple[float, ...]]:
    """Of DTML − V-Net on the official scans: the t interval and that of the bootstrap."""
    runs = [pd.read_csv(RESULTS / "official" / name / "metrics.csv") for name in ("vnet_off", "dtml_off")]
    first, second = (100 * run.query("head == 'seg' and post == 'none'").set_index("case")["dice"] for run in runs)
    assert (first.index == second.index).all()
    first, second = first.to_numpy(), second.to_numpy()
    found = crossed_difference(first[None], second[None]), paired_difference(first, second)
    return {(round(difference.low, 2), round(difference.high, 2)) for difference in found}


def stored_intervals(folder: Path) -> set[tuple[float, ...]]:
    """Of the tables that paper.benchmark_tables writes."""
    tables = [path for kind in ("table", "pairs", "folds") for path in folder.glob(f"{kind}*.md")]
    found = intervals("".join(path.read_text() for path in tables))
    for path in folder.glob("*.csv"):
        table = pd.read_csv(path)
        if "difference_low" in table:
            found |= set(table[["difference_low", "difference_high"]].itertuples(index=False, name=None))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_each_interval_of_a_page_is_of_a_stored_run(page):
    text = (REPOSITORY / page).read_text()
    said = intervals(text[text.index(PAGES[page]) :])
    stored = official_intervals()
    for benchmark in ("hippocampus", "left_atrium"):
        stored |= stored_intervals(RESULTS / benchmark)
    stored |= {(-high, -low) for low, high in stored}  # of first minus second
    assert said and said <= stored


def test_the_rows_of_the_dev_split_are_those_of_its_fold():
    folds = pd.read_csv(RESULTS / "left_atrium" / "folds.csv").query("fold == 0")
    text = (RESULTS / "left_atrium" / "README.md").read_text()
    lines = [line for line in text[text.index("## Fold 0") :].splitlines() if re.search(r"\d ± \d", line)]
    columns = ["dice", "dice_sd", "dice_median", "dice_worst", "jaccard", "asd_vox", "hd95_vox"]
    settings = ["labeled", "unlabeled", "iterations"]
    assert lines
    for line in lines:
        cells = line.split("|")[2:]
        numbers = [float(number) for number in re.findall(r"\d+\.?\d*", " ".join(cells[:8]))]
        rows = folds[(folds[settings] == numbers[:3]).all(axis=1)]
        off = (rows[columns] - numbers[3:]).abs()  # the median and the worst scan are said to a tenth
        assert (off <= [0.001, 0.001, 0.056, 0.056, 0.001, 0.001, 0.001]).all(axis=1).any(), line


@pytest.mark.parametrize("benchmark", ["hippocampus", "left_atrium"])
def test_the_published_tables_are_those_of_the_stored_runs(tmp_path, benchmark):
    (tmp_path / "runs").symlink_to(RESULTS / benchmark / "runs")
    write_benchmark(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir() if path.suffix in (".md", ".csv")}
    assert {"table.md", "table.csv", "pairs.md", "label_efficiency.csv"} <= made.keys()
    assert made == {name: (RESULTS / benchmark / name).read_text() for name in made}


def test_the_published_table_of_several_classes_is_that_of_its_scores():
    scores = pd.read_csv(RESULTS / "several_classes" / "scores.csv")
    names = {"v_net": "V-Net", "dtml": "DTML", "dtml_k_start_1": "DTML, --sdm_k_start 1"}
    outputs = {"seg": "M_s", "mean": "mean of both outputs"}
    scores["dice"] *= 100
    published = pd.read_csv(RESULTS / "several_classes" / "table.csv").set_index(["class", "method"])
    rows = scores.groupby(["class", "method", "output"])
    assert len(rows) == len(published)
    for (kind, method, output), row in rows:
        title = names[method] + (f", {outputs[output]}" if method != "v_net" else "")
        line = published.loc[(kind, title)]
        assert row["dice"].mean() == pytest.approx(line["dice"], abs=0.006)
        assert row.groupby("seed")["dice"].mean().std() == pytest.approx(line["dice_sd_over_seeds"], abs=0.006)
        if method != "v_net":
            difference = crossed_difference(*paired(rows.get_group((kind, "v_net", "seg")), row, "dice"))[:3]
            numbers = [float(number) for number in re.findall(r"[+-][\d.]+", line["dice_minus_v_net"])]
            assert numbers == pytest.approx(difference, abs=0.011)  # the scores have four decimals
