"""Tables over seeds: which runs make a row, and what it is compared with."""

import csv
import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from evaluation.statistics import crossed_difference
from paper.benchmark_tables import BENCHMARK_COLUMNS, paired, stored_scores, table, write_benchmark
from utils.errors import InputError

CASES = ("a", "b", "c")


@pytest.fixture
def results(tmp_path):
    """A folder of stored runs, and a function that adds one: Dice of each case by output."""

    def add(name, dice, labelnum=8, unlabelnum=0, iterations=100, seconds=60.0, cases=CASES):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "options.json").write_text(json.dumps({"labelnum": labelnum, "unlabelnum": unlabelnum}))
        head = next(iter(dice))
        summary = {"reported": {"head": head, "post": "none"}, "iteration": iterations, "training_seconds": seconds}
        (folder / "summary.json").write_text(json.dumps(summary))
        with open(folder / "metrics.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "head", "post", "dice", "jaccard", "asd_vox", "hd95_vox"])
            for output, values in dice.items():
                for case, value in zip(cases, values, strict=True):
                    writer.writerow([case, output, "none", value, value / 2, 1.0, "nan" if case == "a" else 2.0])
                    writer.writerow([case, output, "lcc", 0.0, 0.0, 9.0, 9.0])

    return tmp_path, add


def lines(folder):
    with open(folder, newline="") as file:
        return {(line["row"], line["labeled"]): line for line in csv.DictReader(file)}


def test_table_of_seeds_labels_and_outputs(results):
    folder, add = results
    first, second = np.array([[0.8, 0.7, 0.6], [0.82, 0.7, 0.63]]), np.array([[0.9, 0.7, 0.7], [0.9, 0.75, 0.64]])
    for seed in (0, 1):
        add(f"v_net_seed{seed}", {"seg": first[seed]}, seconds=60 + 10 * seed)
        add(f"dtml_seed{seed}", {"seg": second[seed], "mean": second[seed] + 0.01}, unlabelnum=5)
    add("v_net_4_labels_seed0", {"seg": [0.5, 0.5, 0.5]}, labelnum=4)
    add("dtml_4_labels_seed0", {"seg": [0.5, 0.6, 0.7], "mean": [0.5, 0.6, 0.7]}, labelnum=4, unlabelnum=9)
    write_benchmark(folder)

    made = lines(folder / "table.csv")
    assert set(made) == {("v_net", "8"), ("dtml", "8"), ("dtml_mean", "8")}
    v_net, dtml = made["v_net", "8"], made["dtml", "8"]
    assert list(v_net) == BENCHMARK_COLUMNS
    assert (v_net["seeds"], v_net["unlabeled"], v_net["iterations"], v_net["seconds"]) == ("2", "0", "100", "65")
    assert (v_net["dice"], v_net["hd95_vox"], v_net["difference"]) == (f"{100 * first.mean():.2f}", "2.00", "")
    expected = 100 * np.array(crossed_difference(first, second)[:3])
    shown = [float(dtml[f"difference{end}"]) for end in ("", "_low", "_high")]
    assert shown == pytest.approx(expected, abs=0.005)
    assert float(made["dtml_mean", "8"]["difference"]) == pytest.approx(expected[0] + 1, abs=0.006)

    efficiency = lines(folder / "label_efficiency.csv")
    assert float(efficiency["dtml", "4"]["difference"]) == pytest.approx(10)
    assert (folder / "label_efficiency.png").stat().st_size > 1000
    assert (folder / "table.md").read_text().count("\n") == 2 + len(made)


def test_numbers_of_labels_with_further_rows_have_tables_of_their_own(results):
    folder, add = results
    for name in ("v_net_seed0", "dtml_seed0", "dtc_seed0", "dtc_seed1"):
        add(name, {"seg": [0.8, 0.7, 0.6]})
    for name in ("v_net_2_labels_seed0", "dtml_2_labels_seed0"):
        add(name, {"seg": [0.4, 0.4, 0.4]}, labelnum=2)
    for row, dice in {"v_net": 0.5, "dtml_plus": 0.7, "dtc": 0.6}.items():
        add(f"{row}_4_labels_seed0", {"seg": [dice, dice, dice + 0.1]}, labelnum=4)
    write_benchmark(folder)
    assert not list(folder.glob("*_2_labels.*")) and len(lines(folder / "table.csv")) == 3
    assert (folder / "label_efficiency.png").exists()
    assert lines(folder / "table_4_labels.csv")["dtml_plus", "4"]["difference"] == "+20.00"
    assert "`dtml_plus` − `v_net`" in (folder / "pairs_4_labels.md").read_text()
    assert len((folder / "table_4_labels.md").read_text().splitlines()) == 5


def test_a_ceiling_alone_is_no_curve(results):
    folder, add = results
    for name, labelnum in {"v_net_seed0": 8, "dtml_seed0": 8, "v_net_64_labels_seed0": 64}.items():
        add(name, {"seg": [0.8, 0.7, 0.6]}, labelnum=labelnum)
    write_benchmark(folder)
    assert set(lines(folder / "table.csv")) == {("v_net", "8"), ("dtml", "8")}
    assert not list(folder.glob("label_efficiency.*"))


def test_numbers_of_labels_are_compared_in_their_common_folds(results):
    folder, add = results
    for row in ("v_net", "dtml"):
        add(f"{row}_fold0_seed0", {"seg": [0.8, 0.8, 0.8]})
        add(f"{row}_fold1_seed0", {"seg": [0.2, 0.2, 0.2]}, cases=("d", "e", "f"))
        add(f"{row}_2_labels_fold0_seed0", {"seg": [0.5, 0.5, 0.5]}, labelnum=2)
    write_benchmark(folder)
    assert lines(folder / "label_efficiency.csv")["v_net", "8"]["dice"] == "80.00"
    assert lines(folder / "table.csv")["v_net", "8"]["dice"] == "50.00"


def test_only_seeds_and_cases_of_both_are_compared(results):
    folder, add = results
    for seed in (0, 1):
        add(f"v_net_seed{seed}", {"seg": [0.5, 0.5, 0.5]})
    add("dtml_seed1", {"seg": [0.5, 0.6, 0.7]}, unlabelnum=5)
    rows = dict(list(stored_scores(folder / "runs").groupby("row")))
    theirs, ours = paired(rows["v_net"], rows["dtml"], "dice")
    assert theirs.tolist() == [[50, 50, 50]] and ours.tolist() == [[50, 60, 70]]


def test_folds_test_each_case_once(results):
    folder, add = results
    first, second = np.array([[0.5, 0.6], [0.7, 0.8], [0.6, 0.6]]), np.array([[0.6, 0.6], [0.7, 0.9], [0.6, 0.9]])
    for fold, cases in enumerate((("a", "b"), ("c", "d"), ("e", "f"))):
        add(f"v_net_fold{fold}_seed0", {"seg": first[fold]}, cases=cases)
        add(f"dtml_fold{fold}_seed0", {"seg": second[fold]}, unlabelnum=5, cases=cases)
    for row in ("ua_mt", "dtml_plus"):  # of one fold alone
        add(f"{row}_fold1_seed0", {"seg": [0.8, 0.9]}, unlabelnum=5, cases=("c", "d"))
    write_benchmark(folder)

    made, differences = lines(folder / "table.csv"), 100 * (second - first)
    assert (made["v_net", "8"]["dice"], made["v_net", "8"]["seconds"]) == ("63.33", "60")
    low, high = stats.t.interval(0.95, 5, differences.mean(), stats.sem(differences.ravel()))
    line = made["dtml", "8"]
    assert (line["difference_low"], line["difference_high"]) == (f"{low:+.2f}", f"{high:+.2f}")
    assert made["ua_mt", "8"]["difference"] == "+10.00"  # on the cases of its fold alone

    over_folds = differences.mean(axis=1)
    low, high = stats.t.interval(0.95, 2, over_folds.mean(), stats.sem(over_folds))
    table = [row.strip("| ").split(" | ") for row in (folder / "folds.md").read_text().splitlines()[2:]]
    assert table[1] == ["1", "75.00", "80.00", "+5.00"]
    assert table[-1] == ["all", "63.33", "71.67", f"+8.33 [{low:+.2f}, {high:+.2f}]"]
    assert not list(folder.glob("label_efficiency.*"))


def test_rows_of_a_fold_and_their_differences(results):
    folder, add = results
    add("v_net_fold0_seed0", {"seg": [0.5, 0.6, 0.8]})
    add("dtml_fold0_seed0", {"seg": [0.6, 0.6, 0.9]}, unlabelnum=5)
    add("v_net_4_labels_fold0_seed0", {"seg": [0.1, 0.3, 0.2]}, labelnum=4)
    add("v_net_fold1_seed0", {"seg": [0.9, 0.9, 0.9]}, cases=("d", "e", "f"))
    write_benchmark(folder)

    rows = pd.read_csv(folder / "folds.csv").set_index(["fold", "row", "labeled"])
    spread = rows.loc[(0, "v_net", 8), ["dice", "dice_sd", "dice_median", "dice_worst"]]
    assert spread.tolist() == [63.33, 15.28, 60, 50] and len(rows) == 4
    assert rows.loc[(1, "v_net", 8), "dice"] == 90
    low, high = stats.t.interval(0.95, 2, -20 / 3, stats.sem([10, 0, 10]))
    lines = pd.read_csv(folder / "folds_differences.csv").set_index(["first", "first_labeled", "second"])
    line = lines.loc[("dtml", 8, "v_net"), ["difference", "difference_low", "difference_high"]]
    assert line.tolist() == pytest.approx([-20 / 3, low, high], abs=0.005)
    assert len(lines) == 3 and set(lines["fold"]) == {0}  # fold 1 has one row alone


def test_a_metric_is_compared_where_both_have_it(results):
    folder, add = results
    for seed in (0, 1):
        add(f"v_net_seed{seed}", {"seg": [0.5, 0.6, 0.7]})
        add(f"dtml_seed{seed}", {"seg": [0.5, 0.6, 0.7]}, unlabelnum=5)
    rows = dict(list(stored_scores(folder / "runs").groupby("row")))
    theirs, ours = paired(rows["v_net"], rows["dtml"], "hd95_vox")  # case a has no 95HD
    assert theirs.tolist() == ours.tolist() == [[2, 2], [2, 2]]


def test_rows_of_other_folds_are_no_pair(results):
    folder, add = results
    add("v_net_fold0_seed0", {"seg": [0.5, 0.6]}, cases=("b", "c"))
    add("dtml_fold1_seed0", {"seg": [0.5, 0.6]}, unlabelnum=5, cases=("d", "e"))
    write_benchmark(folder)
    for name in ("pairs.md", "folds.md"):
        assert len((folder / name).read_text().splitlines()) == 2  # a header alone
    assert lines(folder / "table.csv")["dtml", "8"]["difference"] == ""


def test_a_row_without_baseline_of_its_labels_has_no_difference(results):
    folder, add = results
    add("dtml_seed0", {"seg": [0.5, 0.6, 0.7]}, unlabelnum=5)
    scores = stored_scores(folder / "runs")
    assert table(scores, scores)["difference"].tolist() == [""]


def test_runs_of_other_settings_are_no_row(results):
    folder, add = results
    add("v_net_seed0", {"seg": [0.5, 0.5, 0.5]})
    add("v_net_seed1", {"seg": [0.5, 0.5, 0.5]}, iterations=200)
    with pytest.raises(InputError, match="v_net_seed1"):
        stored_scores(folder / "runs")


def test_a_folder_of_another_name(results):
    folder, add = results
    add("v_net", {"seg": [0.5, 0.5, 0.5]})
    with pytest.raises(InputError, match="v_net"):
        stored_scores(folder / "runs")
