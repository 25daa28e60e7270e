import math

import pytest

from evaluation.metrics import summarise
from evaluation.tables import case_table, class_names, metric_text, of_class, pick, summary_table, text_table


def score(case, dice, asd=2.0, head="seg", post="none"):
    distances = {"asd_vox": asd, "hd95_vox": 4 * asd, "diagonal_vox": 100.0}
    distances |= {"asd_mm": 2 * asd, "hd95_mm": 8 * asd, "diagonal_mm": 200.0}
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
    assert metric_text("dice", 0.90123) == "90.12" and metric_text("asd_vox", 1.825) in ("1.82", "1.83")
    assert metric_text("hd95_vox", math.nan) == metric_text("dice", math.inf) == "-"


def test_case_table_counts_the_missed_cases_where_there_are_any():
    header, a, b, cc, mean = cells(case_table(SCORES, "seg", "none"))
    assert header == ["case", "Dice [%]", "Jaccard [%]", "ASD [vox]", "95HD [vox]", "ASD [mm]", "95HD [mm]"]
    assert a == ["a", "80.00", "66.67", "2.00", "8.00", "4.00", "16.00"]
    assert b == ["b", "0.00", "0.00", "-", "-", "-", "-"]
    # Dice over three cases, distances over the two that have one
    assert mean[:4] == ["mean ± sd", "60.00 ± 52.92", "55.56 ± 50.92", "1.50 ± 0.71 (1 missed)"]
    assert cells(case_table([MISSED], "seg", "none"))[-1][3:] == ["- ± - (1 missed)"] * 4
    assert cells(case_table([score("a", 0.8), score("b", 0.8)], "seg", "none"))[-1][1:4:2] == [
        "80.00 ± 0.00",
        "2.00 ± 0.00",
    ]


def test_summary_table_has_a_row_per_output_and_filter():
    rows = cells(summary_table(SCORES))[1:]
    assert [row[0] for row in rows] == ["seg", "sdm", "seg"] and len({tuple(row[:2]) for row in rows}) == 3
    assert rows[0][4] == "1.50 ± 0.71 (1 missed)" and rows[1][2] == "90.00 ± 0.00"
    assert summarise(pick(SCORES, "seg", "none"))["asd_vox"]["mean_penalised"] == pytest.approx((2 + 1 + 100) / 3)


def test_a_row_for_each_class_below_the_mean():
    by_class = {"rim": [score("a", 0.9), MISSED], "core": [score("a", 0.7), score("b", 0.5)]}
    means = [{**score("a", 0.8), "missed_classes": 0, "num_classes": 2}]
    means += [{**score("b", 0.25), "missed_classes": 1, "num_classes": 2}]
    *_, mean, rim, core = cells(case_table(means, "seg", "none", by_class))
    assert mean[0] == "mean ± sd" and mean[1].startswith("52.50") and "(1 missed)" in mean[3]
    assert rim[:2] == ["rim", "45.00 ± 63.64"] and "(1 missed)" in rim[3]
    assert core[:2] == ["core", "60.00 ± 14.14"] and "missed" not in core[3]


def test_a_class_of_several_as_if_it_were_the_only_one(make_scores, make_class_scores):
    rim, core = {"a": 0.9, "b": None}, {"a": 0.7, "b": 0.5}
    content = make_class_scores({"rim": rim, "core": core})
    alone = make_scores(rim)
    found = of_class(content, "rim")
    assert found["summary"] == alone["summary"] and class_names(content) == ["rim", "core"]
    assert [{k: v for k, v in score.items() if k != "class"} for score in found["cases"]] == alone["cases"]
    mean = of_class(content)
    assert mean["summary"]["seg/none"]["dice"]["mean"] == pytest.approx((0.8 + 0.25) / 2)
    assert mean["summary"]["seg/none"]["asd_vox"]["missed"] == 1
    assert of_class(alone)["cases"] == alone["cases"] and class_names(alone) == []
