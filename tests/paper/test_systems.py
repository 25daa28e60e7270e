import pytest

from evaluation.tables import COLUMNS
from paper.printed import printed_row
from paper.systems import BASELINES, FIGURE, PAIRED_METRICS, PAIRS, SYSTEMS, TABLES, TITLES
from paper.tables import PAPER_SCANS, UPPER_BOUND
from train import parse_options


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=lambda system: system.key)
def test_a_row_trains_what_its_name_says(system):
    options = parse_options(["--method", system.method, "--preset", "cpu", *system.flags])
    assert options.method == system.method
    if not system.unlabeled:  # the whole batch is labeled
        assert (options.unlabelnum, options.labeled_bs) == (0, options.batch_size)
    else:
        assert options.unlabelnum is None and options.labeled_bs < options.batch_size


@pytest.mark.parametrize("system", [s for s in SYSTEMS.values() if s.equal_time is None], ids=lambda s: s.key)
def test_a_row_has_its_printed_figures(system):
    labeled, unlabeled = UPPER_BOUND if system.all_labeled else PAPER_SCANS
    assert printed_row(system.method, labeled, unlabeled if system.unlabeled else 0, system.variant) is not None


def test_every_row_is_in_a_table_and_every_table_is_complete():
    assert {key for keys in TABLES.values() for key in keys} == set(SYSTEMS)
    assert TABLES.keys() == TITLES.keys() == PAIRS.keys() == PAIRED_METRICS.keys()
    assert all("m_d" in keys for keys in TABLES.values())  # labels only, with the distance head
    assert set(FIGURE) <= set(SYSTEMS)


def test_statistics_compare_rows_of_their_table():
    for table, pairs in PAIRS.items():
        assert {key for pair in pairs for key in pair} <= set(TABLES[table])
        assert set(PAIRED_METRICS[table]) <= set(COLUMNS)
    assert PAIRS["table2"] == (("v_net", "dtml_labeled"), ("m_d", "dtml_labeled"))  # the paper's claim
    assert PAIRED_METRICS["table2"] == tuple(COLUMNS)


def test_the_baselines_and_dtml_come_first():
    assert tuple(SYSTEMS)[:3] == (*BASELINES, "dtml")


def test_names_are_the_papers():
    names = [SYSTEMS[key].name for key in TABLES["table3"]]
    rivals = ["ASDNet", "TCSE", "UA-MT", "DTC", "SASSNet", "Double-Uncertainty"]
    assert names == ["V-Net", "V-Net", "M_d only", "V-Net, DTML's seconds", *rivals, "DTML"]


def test_the_row_of_equal_time_is_ours_and_trains_after_those_that_it_is_measured_by():
    system, order = SYSTEMS["v_net_equal_time"], list(SYSTEMS)
    assert printed_row(system.method, *PAPER_SCANS, system.variant) is None
    assert printed_row(system.method, 16, 0, system.variant) is None
    assert all(order.index(key) < order.index(system.key) for key in system.equal_time)
    assert ("v_net_equal_time", "dtml") in PAIRS["table3"]
