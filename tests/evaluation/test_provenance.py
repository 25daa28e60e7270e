"""What a report says on where its scores come from."""

from pathlib import Path

import pytest

from evaluation.comparison import TestedRun
from evaluation.provenance import OUTPUT_TITLES, counted, facts, options, output_name
from methods import METHODS


def a_run(**content) -> TestedRun:
    base = {
        "reported": {"head": "sdm", "post": "lcc", "weights": "best_val"},
        "iteration": 7,
        "options": {},
        "cases": [],
    }
    return TestedRun("a", base | content, Path())


@pytest.mark.parametrize("official", [True, False])
def test_only_the_lists_of_the_challenge_are_said_to_be_its(official):
    data = {"folder": "/d", "train_list": "/d/a.list", "test_list": "/d/b.list", "official": official}
    run = a_run(data=data, options={"split": "official", "test_list": "/d/b.list", "base_lr": 0.1, "exp": "a_s1"})
    said = facts(run)
    assert said["run"] == "a_s1"
    assert ("challenge" in said["lists"]) is official and ("your own" in said["lists"]) is not official
    assert (said["data folder"], said["training list"], said["test list"]) == ("/d", "/d/a.list", "/d/b.list")
    assert options(run) == {"--base_lr": "0.1"}  # --split has no say where lists are given


def test_facts_are_words():
    machine = {"gpu": None, "processor": "CPU", "threads": 1}
    said = facts(a_run(training_seconds=5400, test_seconds=90, peak_memory_gib=1.25, test_machine=machine))
    assert said["training time"] == "90.0 min" and said["test time"] == "90.0 s"
    assert facts(a_run(training_seconds=7200))["training time"] == "2.0 h"
    assert said["test machine"] == "CPU, 1 thread" and said["peak training memory"] == "1.2 GiB"
    assert said["weights"] == "best_val, iteration 7" and output_name("sdm") in said["reported output"]
    assert options(a_run(options={"a": True, "b": None, "c": [1, 2]})) == {"--a": "on", "--b": "", "--c": "1 2"}
    assert [counted(n, "case") for n in (0, 1, 2)] == ["0 cases", "1 case", "2 cases"]


def test_every_output_of_a_method_and_no_other_has_a_title():
    assert OUTPUT_TITLES.keys() == {output for method in METHODS.values() for output in method.outputs}


def test_scores_of_an_older_version_lack_some_facts():
    assert facts(a_run())["data folder"] == facts(a_run())["test code"] == facts(a_run())["lists"] == ""


def test_classes_are_named_where_there_are_several():
    classes = [{"name": "rim", "values": [1]}, {"name": "core", "values": [2, 4]}]
    assert facts(a_run(classes=classes))["classes"] == "rim (1), core (2+4)"
    assert facts(a_run())["classes"] == ""
