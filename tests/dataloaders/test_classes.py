from argparse import Namespace

import numpy as np
import pytest

from dataloaders.case_files import class_attributes, write_case
from dataloaders.classes import refuse_absent, settle_classes
from scans.classes import label_classes, named
from utils.errors import InputError
from utils.labels import ONE_CLASS, LabelClass

TWO = (LabelClass("anterior", (1,)), LabelClass("posterior", (2, 5)))


@pytest.fixture
def settle(tmp_path):
    """Settle the classes of labeled cases, one for each argument: what they record, None for nothing."""

    def of(*recorded, num_classes=None):
        volume = np.zeros((2, 2, 2))
        for number, classes in enumerate(recorded):
            write_case(tmp_path, f"case{number}", volume, volume, class_attributes(classes) if classes else {})
        options = Namespace(root_path=str(tmp_path), num_classes=num_classes)
        classes = settle_classes(options, [f"case{number}" for number in range(len(recorded))])
        assert options.num_classes == len(classes)
        return classes

    return of


def test_classes_are_those_that_the_cases_record(settle):
    assert settle(TWO, TWO) == TWO
    assert settle(TWO, num_classes=2) == TWO
    assert settle(None, None) == ONE_CLASS


def test_cases_that_record_nothing_have_as_many_as_the_flag_says(settle):
    assert settle(None, num_classes=1) == ONE_CLASS
    classes = settle(None, None, num_classes=3)
    assert [one.values for one in classes] == [(1,), (2,), (3,)] and len({one.name for one in classes}) == 3
    assert not set(classes) & set(named(label_classes("1,2,3"), {}))  # so that a test can tell them apart


@pytest.mark.parametrize("number", [1, 3])
def test_another_number_than_recorded_is_refused(settle, number):
    with pytest.raises(InputError, match=rf"--num_classes {number}.*case0.*anterior, posterior"):
        settle(TWO, num_classes=number)


@pytest.mark.parametrize("other", [None, TWO[:1], TWO[::-1], (TWO[0], LabelClass("posterior", (2,)))])
def test_cases_that_differ_are_refused(settle, other):
    with pytest.raises(InputError, match=r"case1.*case0.*--classes"):
        settle(TWO, other)


def test_a_class_that_no_case_holds_is_refused():
    refuse_absent(set(), TWO)
    with pytest.raises(InputError, match=r"posterior.*--labelnum"):
        refuse_absent({2}, TWO)
