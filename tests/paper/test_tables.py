import csv

import numpy as np
import pytest
from scipy import stats

from evaluation.tables import METRIC_COLUMNS
from paper.systems import TABLES
from paper.tables import (
    HEADER,
    MIN_CASES,
    case_means,
    cells,
    latex,
    markdown,
    paired_lines,
    paired_report,
    setting_note,
    table_frame,
    write_table,
)

DICE = {"a": 0.80, "b": 0.90, "c": 0.70, "d": 0.60, "e": 0.75, "f": 0.75}
BETTER = {"a": 0.85, "b": 0.91, "c": 0.80, "d": 0.62, "e": 0.74, "f": 0.78}


def lines_of(rows, **flags):
    return [cells(line) for line in table_frame(rows, **flags).to_dict("records")]


@pytest.fixture
def rows(make_scores):
    """Table 2 with two rows run, one of them with a second seed."""
    v_net = [make_scores(DICE, 1), make_scores({case: dice + 0.02 for case, dice in DICE.items()}, 2)]
    return {"v_net": v_net, "m_d": [], "dtml_labeled": [make_scores(BETTER, 1)]}


def test_printed_line_then_measured_ones_with_and_without_filter(rows):
    printed, measured, filtered, *_ = lines_of(rows)
    assert printed == ["V-Net", "16", "0", "printed", "86.03", "76.06", "3.51", "14.26", "", "", ""]
    assert measured[:5] == ["V-Net", "4", "0", "measured", "76.00 ± 1.41"]  # 75 and 77: sd sqrt 2
    assert measured[-3:] == ["2", "0.50", "1.5"]
    assert filtered[3:5] == ["measured, filtered", "77.00 ± 1.41"]
    assert len(measured) == len(filtered) == len(HEADER)


def test_a_row_that_is_not_run_shows_its_printed_line(rows):
    printed, missing = lines_of({"m_d": []})
    assert printed[4:8] == ["88.69", "79.91", "3.12", "11.62"]
    assert missing == ["M_d only", "", "", "not run yet", *[""] * 7]
    assert lines_of({"m_d": []}, official=False) == [missing]


@pytest.mark.parametrize(("key", "scans"), [("v_net_all", ["80", "0"]), ("dtml", ["16", "64"]), ("m_d", ["16", "0"])])
def test_counts_of_the_printed_line_are_the_papers(key, scans):
    assert lines_of({key: []})[0][1:3] == scans


def test_missed_cases_are_counted_over_all_seeds(make_scores):
    seeds = [make_scores({"a": 0.8, "b": None}, 1), make_scores({"a": None, "b": None}, 2)]
    asd = HEADER.index("ASD [vox]")
    assert lines_of({"v_net": seeds})[1][asd] == "-"  # one seed has no distance at all
    assert lines_of({"v_net": seeds[:1]})[1][asd] == "0.40 (1 missed)"  # and a single seed has no spread
    assert table_frame({"v_net": seeds})["asd_vox_missed"].tolist()[1:] == [3, 3]


def test_old_scores_without_memory(make_scores):
    scores = make_scores(DICE)
    del scores["peak_memory_gib"], scores["training_machine"]
    assert lines_of({"v_net": [scores]})[1][-1] == ""
    assert "unknown" in setting_note([scores], "")
    scores["test_machine"] = {"processor": "Abacus 81", "threads": 1, "gpu": None}
    assert "Abacus 81 with 1 thread in the test" in setting_note([scores], "")


def test_the_note_says_what_was_measured_and_where(make_scores):
    note = setting_note([make_scores(DICE, flags=("--max_iterations", n)) for n in ("200", "7")], "--base_lr 0.1")
    for part in ("--preset demo --split official, 200 iterations", "7 iterations", "--base_lr 0.1", "6 test scans"):
        assert part in note
    assert "last iterate" in note and "Abacus 80 with 2 threads" in note
    assert setting_note([], "").endswith("Nothing is measured yet.")


def test_cases_are_paired_by_id_and_averaged_over_common_seeds(make_scores):
    seeds = [make_scores({"b": 0.9, "a": 0.8}, 1), make_scores({"a": 0.6, "b": 0.7}, 2), make_scores(DICE, 3)]
    assert case_means(seeds, {1, 2})["dice"].to_dict() == pytest.approx({"a": 0.7, "b": 0.8})
    assert case_means(seeds, {1})["dice"].to_dict() == pytest.approx({"a": 0.8, "b": 0.9})


def test_a_missed_case_counts_with_the_diagonal(make_scores):
    scores = [make_scores({"a": 0.8, "b": None})]
    assert case_means(scores, {1337})["asd_vox"].tolist() == pytest.approx([0.4, 100.0])


def test_few_cases_have_no_p_value(make_scores):
    few = dict(list(DICE.items())[: MIN_CASES - 1])
    rows = {"v_net": [make_scores(few)], "dtml": [make_scores(BETTER)]}  # the cases that both have
    (line,) = paired_lines([("v_net", "dtml")], rows, ("dice",))
    assert line[3:7] == [str(MIN_CASES - 1), "-", "-", "-"]


def test_paired_lines_are_second_minus_first(rows):
    lines = paired_lines([("v_net", "dtml_labeled")], rows, ("dice", "hd95_vox"))
    difference = np.subtract(list(BETTER.values()), list(DICE.values()))  # seed 1 is the common one
    p = stats.ttest_1samp(difference, 0).pvalue
    name, metric, interval, cases, t_p, corrected, wilcoxon_p, effect = lines[0]
    assert (name, metric, cases) == ("DTML 4/0 - V-Net 4/0", "Dice [%]", "6")
    assert interval.startswith(f"{100 * difference.mean():.2f} [")
    assert t_p == f"{p:.2g}" and corrected == f"{2 * p:.2g}"  # Dice and 95HD are proportional: the same p twice
    assert wilcoxon_p == f"{stats.wilcoxon(difference).pvalue:.2g}"
    assert effect == f"{difference.mean() / difference.std(ddof=1):.2f}"
    assert lines[1][2].startswith("-")  # a better Dice comes with a smaller distance


def test_pairs_without_a_common_seed_are_left_out(rows, make_scores):
    rows["dtml_labeled"] = [make_scores(BETTER, 9)]
    assert paired_lines([("v_net", "dtml_labeled"), ("m_d", "dtml_labeled")], rows, ("dice",)) == []
    assert paired_report(("v_net", "dtml_labeled"), rows) == ""


def test_equal_rows_have_nothing_to_test(rows):
    (line,) = paired_lines([("v_net", "v_net")], rows, ("dice",))
    assert line[2:] == ["0.00 [0.00, 0.00]", "6", "-", "-", "-", "-"]


def test_report_has_all_four_metrics(rows):
    report = paired_report(("v_net", "dtml_labeled"), rows)
    assert all(heading in report for heading, _, _ in METRIC_COLUMNS.values())
    assert "tests listed (4)" in report


def test_write_table(rows, tmp_path):
    text = write_table("table2", rows, tmp_path / "new", "--base_lr 0.1")
    markdown_text = (tmp_path / "new" / "table2.md").read_text(encoding="utf-8")
    for shown in (text, markdown_text):
        assert "76.00 ± 1.41" in shown and "not run yet" in shown and "--base_lr 0.1" in shown
        assert shown.count("DTML 4/0 - V-Net 4/0") == 4
    assert "DTML Table 2; no unlabeled scans" in markdown_text  # sources of the printed lines
    assert "M\\_d only" in (tmp_path / "new" / "table2.tex").read_text(encoding="utf-8")
    with open(tmp_path / "new" / "table2.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["source"] for line in lines[:3]] == ["printed", "measured", "measured, filtered"]
    assert float(lines[1]["dice_mean"]) == pytest.approx(76.0) and float(lines[1]["dice_sd"]) == pytest.approx(1.4142)
    assert lines[0]["dice_sd"] == "" and lines[1]["seconds_per_step"] == "0.5"
    assert [line["dice_mean"] for line in lines if line["source"] == "not run yet"] == [""]


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_which_nothing_is_run(table, tmp_path):
    text = write_table(table, {key: [] for key in TABLES[table]}, tmp_path)
    assert text.count("not run yet") == len(TABLES[table]) and "Nothing is measured yet" in text
    assert text.count("M_d only") == 2


def test_markdown_and_latex_have_a_cell_per_column():
    lines = [["M_d", "16", "0", "measured", "90 ± 1 %"]]
    assert markdown(["a", "b", "c", "d", "e"], lines).splitlines()[-1] == "| M_d | 16 | 0 | measured | 90 ± 1 % |"
    body = latex(["a", "b", "c", "d", "e [%]"], lines).splitlines()
    assert body[0] == r"\begin{tabular}{lrrlr}" and body[2] == r"a & b & c & d & e [\%] \\"
    assert body[4] == r"M\_d & 16 & 0 & measured & 90 $\pm$ 1 \% \\"
