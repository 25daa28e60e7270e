import math

import pytest

from evaluation.metrics import summarise
from evaluation.tables import case_table, comparison_table, number, pick, printed_table, summary_table, text_table
from paper.systems import printed_row


def score(case, dice, asd=2.0, head="seg", post="none"):
    distances = {"asd_vox": asd, "hd95_vox": 4 * asd, "diagonal_vox": 100.0}
    return {"case": case, "head": head, "post": post, "dice": dice, "jaccard": dice / (2 - dice), **distances}


MISSED = score("b", 0.0, math.nan)
SCORES = [score("a", 0.8), MISSED, score("a", 0.9, head="sdm"), score("a", 0.85, post="lcc"), score("cc", 1.0, 1.0)]


def cells(table):
    """Words of every line but the rule; columns are two or more blanks apart."""
    lines = [line for line in table.splitlines() if set(line) - set("- ")]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_text_table_aligns_its_columns():
    table = text_table(["name", "x"], [["a", "1.00"], ["longer", "-"]])
    assert table.splitlines() == ["name       x", "------  ----", "a       1.00", "longer     -"]
    assert text_table(["only"], []).splitlines() == ["only", "----"]


def test_number_has_the_unit_of_the_papers():
    assert number("dice", 0.90123) == "90.12" and number("asd_vox", 1.825) in ("1.82", "1.83")
    assert number("hd95_vox", math.nan) == number("dice", math.inf) == "-"


def test_pick_keeps_one_output_in_the_order_of_the_cases():
    assert [row["case"] for row in pick(SCORES, "seg", "none")] == ["a", "b", "cc"]
    assert pick(SCORES, "mean", "none") == []


def test_case_table_shows_a_missed_case_and_counts_it():
    header, a, b, cc, mean = cells(case_table(SCORES, "seg", "none"))
    assert header == ["case", "Dice [%]", "Jaccard [%]", "ASD [vox]", "95HD [vox]"]
    assert a == ["a", "80.00", "66.67", "2.00", "8.00"]
    assert b == ["b", "0.00", "0.00", "-", "-"]
    assert cc == ["cc", "100.00", "100.00", "1.00", "4.00"]
    # Dice over three cases, distances over the two that have one
    assert mean == ["mean ± sd", "60.00 ± 52.92", "55.56 ± 50.92", "1.50 ± 0.71 (1 missed)", "6.00 ± 2.83 (1 missed)"]


def test_a_distance_says_that_nothing_was_missed():
    mean = cells(case_table([score("a", 0.8, 2.0), score("b", 0.8, 2.0)], "seg", "none"))[-1]
    assert mean[1] == "80.00 ± 0.00" and mean[3].endswith("(0 missed)") and mean[4].endswith("(0 missed)")


def test_every_case_missed():
    mean = cells(case_table([MISSED, score("c", 0.0, math.nan)], "seg", "none"))[-1]
    assert mean[3:] == ["- ± - (2 missed)"] * 2


def test_summary_table_has_a_row_per_output_and_filter():
    rows = cells(summary_table(SCORES))[1:]
    assert [row[0] for row in rows] == ["seg, none", "sdm, none", "seg, lcc"]
    assert rows[0][3] == "1.50 ± 0.71 (1 missed)" and rows[1][1] == "90.00 ± 0.00"
    missed = summarise(pick(SCORES, "seg", "none"))["asd_vox"]
    assert missed["mean_penalised"] == pytest.approx((2 + 1 + 100) / 3)


def test_printed_row():
    header, row = cells(printed_table(printed_row("dtml", 16, 64)))
    assert header[0] == "as printed"
    assert row == ["DTML, 16 labeled + 64 unlabeled", "90.12", "82.14", "1.82", "7.01"]


def run(dices, names="abcdefgh"):
    return [score(name, dice) for name, dice in zip(names, dices, strict=False)]


def test_comparison_pairs_cases_by_name():
    first, second = run([0.5, 0.6, 0.7, 0.8]), run([0.7, 0.8, 0.9, 1.0])
    header, one, two = cells(comparison_table({"base": first, "new": second[::-1]}))
    assert header[-1] == "Dice minus first [95 % interval]"
    assert one[0] == "base" and len(one) == 5  # nothing to compare the first with
    assert two[0] == "new" and two[-1] == "+20.00 [+20.00, +20.00]"


def test_comparison_of_runs_that_share_some_cases():
    first = run([0.5, 0.6, 0.7, 0.8])
    tables = {
        "three": run([0.6, 0.7, 0.8], "bcd"),
        "one": run([0.45], "a"),
        "none": run([0.5, 0.5], "xy"),
    }
    rows = cells(comparison_table({"base": first, **tables}))[2:]
    assert [row[-1] for row in rows] == [
        "+0.00 [+0.00, +0.00] (3 of 4 cases)",
        "-5.00 (1 of 4 cases)",
        "no case in common",
    ]
