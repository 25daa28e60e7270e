"""The printed figures: consistent, so that a slip of the pen shows, and found by what a run knows."""

import pytest

from paper.printed import ROWS, PrintedRow, printed_row

METHOD_KEYS = {"supervised", "asdnet", "tcse", "ua_mt", "sassnet", "dtc", "double_uncertainty", "dtml"}


def test_every_method_has_a_row_at_the_protocol_of_the_table():
    protocol = {method: (16, 0 if method == "supervised" else 64) for method in METHOD_KEYS}
    assert all(printed_row(method, *counts) for method, counts in protocol.items())
    assert {row.method for row in ROWS} == METHOD_KEYS


def test_the_headline_row():
    row = printed_row("dtml", 16, 64)
    assert (row.dice_percent, row.jaccard_percent, row.asd_vox, row.hd95_vox) == (90.12, 82.14, 1.82, 7.01)


def test_variants_are_told_apart():
    assert printed_row("dtml", 16, 64, "dis").dice_percent == 89.72
    assert printed_row("dtml", 16, 64, "dis+mask").hd95_vox == 6.61
    assert printed_row("dtml", 16, 0).dice_percent == 89.17
    assert printed_row("dtml", 16, 0, "sdm_only").dice_percent == 88.69
    assert printed_row("supervised", 80, 0).dice_percent == 91.14


def test_one_run_serves_both_tables():
    m_s, v_net = printed_row("dtml", 16, 0, "seg_only"), printed_row("supervised", 16, 0)
    assert m_s[5:9] == v_net[5:9]


@pytest.mark.parametrize("asked", [("dtml", 8, 72), ("dtml", 16, 48), ("mean_teacher", 16, 64), ("dtc", 16, 64, "x")])
def test_nothing_printed_is_none(asked):
    assert printed_row(*asked) is None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.method}-{row.variant}-{row.labeled}")
def test_a_row_is_possible(row: PrintedRow):
    """Per case J = D / (2 - D), which is convex: the mean J lies at, or a little above, that of the mean D."""
    dice = row.dice_percent / 100
    excess = row.jaccard_percent - 100 * dice / (2 - dice)
    assert 0 <= excess < 1.0
    assert 0 < row.asd_vox < row.hd95_vox
    assert row.labeled + row.unlabeled <= 80
    assert row.note


def test_no_row_is_listed_twice():
    keys = [(row.method, row.variant, row.labeled, row.unlabeled) for row in ROWS]
    assert len(set(keys)) == len(keys)
