"""The rows of the tables: complete, and printed metrics that are consistent, so that a slip of the pen shows."""

import pytest

from evaluation.tables import METRIC_COLUMNS
from paper.systems import FIGURE, PAIRED_METRICS, PAIRS, PRINTED_ROWS, SYSTEMS, TABLES, TITLES, PrintedRow, printed_row
from train import parse_options


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=lambda system: system.key)
def test_a_row_trains_what_its_name_says(system):
    options = parse_options(["--method", system.method, "--preset", "cpu", *system.flags])
    assert options.method == system.method
    if not system.scans[1]:  # the whole batch is labeled
        assert (options.unlabelnum, options.labeled_bs) == (0, options.batch_size)
    else:
        assert options.unlabelnum is None and options.labeled_bs < options.batch_size


@pytest.mark.parametrize("system", [s for s in SYSTEMS.values() if s.equal_time is None], ids=lambda s: s.key)
def test_a_row_has_its_printed_figures(system):
    assert (system.printed.labeled, system.printed.unlabeled) == system.scans


def test_every_row_is_in_a_table_and_every_table_is_complete():
    assert {key for keys in TABLES.values() for key in keys} == set(SYSTEMS)
    assert TABLES.keys() == TITLES.keys() == PAIRS.keys() == PAIRED_METRICS.keys()
    assert all("m_d" in keys for keys in TABLES.values())  # labels only, with the distance head
    assert set(FIGURE) <= set(SYSTEMS)


def test_statistics_compare_rows_of_their_table():
    for table, pairs in PAIRS.items():
        assert {key for pair in pairs for key in pair} <= set(TABLES[table])
        assert set(PAIRED_METRICS[table]) <= set(METRIC_COLUMNS)
    assert PAIRS["table2"] == (("v_net", "dtml_labeled"), ("m_d", "dtml_labeled"))  # the paper's claim
    assert PAIRED_METRICS["table2"] == tuple(METRIC_COLUMNS)


def test_the_row_of_equal_time_is_ours_and_trains_after_those_that_it_is_measured_by():
    system, order = SYSTEMS["v_net_equal_time"], list(SYSTEMS)
    assert system.printed is None
    assert all(order.index(key) < order.index(system.key) for key in system.equal_time)
    assert ("v_net_equal_time", "dtml") in PAIRS["table3"]


# --- what was printed

METHOD_KEYS = {"supervised", "asdnet", "tcse", "ua_mt", "sassnet", "dtc", "double_uncertainty", "dtml"}


def test_every_method_has_a_row_at_the_protocol_of_the_table():
    protocol = {method: (16, 0 if method == "supervised" else 64) for method in METHOD_KEYS}
    assert all(printed_row(method, *counts) for method, counts in protocol.items())
    assert {row.method for row in PRINTED_ROWS} == METHOD_KEYS


def test_the_headline_row():
    row = printed_row("dtml", 16, 64)
    assert (row.dice_percent, row.jaccard_percent, row.asd_vox, row.hd95_vox) == (90.12, 82.14, 1.82, 7.01)


def test_variants_are_told_apart():
    assert printed_row("dtml", 16, 64, "dis").dice_percent == 89.72
    assert printed_row("dtml", 16, 64, "dis+mask").hd95_vox == 6.61
    assert printed_row("dtml", 16, 0).dice_percent == 89.17
    assert printed_row("dtml", 16, 0, "sdm_only").dice_percent == 88.69
    assert printed_row("supervised", 80, 0).dice_percent == 91.14


@pytest.mark.parametrize("asked", [("dtml", 8, 72), ("dtml", 16, 48), ("mean_teacher", 16, 64), ("dtc", 16, 64, "x")])
def test_nothing_printed_is_none(asked):
    assert printed_row(*asked) is None


@pytest.mark.parametrize("row", PRINTED_ROWS, ids=lambda row: f"{row.method}-{row.variant}-{row.labeled}")
def test_a_row_is_possible(row: PrintedRow):
    """Per case J = D / (2 - D), which is convex: the mean J lies at, or a little above, that of the mean D."""
    dice = row.dice_percent / 100
    excess = row.jaccard_percent - 100 * dice / (2 - dice)
    assert 0 <= excess < 1.0
    assert 0 < row.asd_vox < row.hd95_vox
    assert row.labeled + row.unlabeled <= 80
    assert row.note


def test_no_row_is_listed_twice():
    keys = [(row.method, row.variant, row.labeled, row.unlabeled) for row in PRINTED_ROWS]
    assert len(set(keys)) == len(keys)
