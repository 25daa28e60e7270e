from argparse import Namespace

import numpy as np
import pytest

from dataloaders.case_files import read_list, write_case
from dataloaders.split import cases_to_test, refuse_copies, training_split
from utils import files
from utils.errors import InputError

CASES = [f"case{i:02}" for i in range(10)]


@pytest.fixture
def options(tmp_path):
    """Options for ten training and two test cases, four of them labeled, two and two in a batch."""
    write(tmp_path / "train.list", CASES)
    write(tmp_path / "test.list", ["test0", "test1"])

    def build(**changes) -> Namespace:
        plain = {
            "root_path": str(tmp_path),
            "split": "official",
            "train_list": None,
            "test_list": None,
            "labelnum": 4,
            "labeled_list": None,
            "unlabelnum": None,
            "val_cases": 0,
            "batch_size": 4,
            "labeled_bs": 2,
        }
        return Namespace(**{**plain, **changes})

    return build


def write(path, cases):
    path.write_text("\n".join(cases) + "\n")
    return str(path)


def test_first_cases_are_labeled_the_rest_is_not(options):
    split = training_split(options())
    assert (split.labeled, split.unlabeled, split.validation) == (CASES[:4], CASES[4:], [])


def test_last_labeled_cases_are_held_out(options):
    split = training_split(options(val_cases=1))
    assert (split.labeled, split.unlabeled, split.validation) == (CASES[:3], CASES[4:], [CASES[3]])
    assert len(training_split(options(val_cases=3)).labeled) == 1
    for number in (4, -1):
        with pytest.raises(InputError, match=f"--val_cases {number}"):
            training_split(options(val_cases=number))


def test_labeled_list_replaces_the_first_cases(options, tmp_path):
    path = write(tmp_path / "chosen.list", [CASES[7], CASES[2]])
    split = training_split(options(labeled_list=path))
    assert split.labeled == [CASES[7], CASES[2]]
    assert split.unlabeled == [case for case in CASES if case not in split.labeled]
    with pytest.raises(InputError, match="stranger of --labeled_list.*train.list"):
        training_split(options(labeled_list=write(tmp_path / "wrong.list", ["stranger"])))


def test_relative_lists_start_at_the_repository(options, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "REPOSITORY", tmp_path)
    write(tmp_path / "chosen.list", [CASES[5]])
    assert training_split(options(labeled_list="chosen.list")).labeled == [CASES[5]]


def test_unlabelnum(options):
    assert training_split(options(unlabelnum=2)).unlabeled == CASES[4:6]
    assert training_split(options(unlabelnum=6)).unlabeled == CASES[4:]
    for number in (7, -1):
        with pytest.raises(InputError, match=f"--unlabelnum {number}"):
            training_split(options(unlabelnum=number))


def test_batches_without_a_place_for_unlabeled_cases_have_none(options):
    assert training_split(options(labeled_bs=4)).unlabeled == []
    assert training_split(options(labeled_bs=4, unlabelnum=0, labelnum=10)).labeled == CASES


@pytest.mark.parametrize(("changes", "named"), [({"labelnum": 10}, "train.list.*--labelnum"), ({"unlabelnum": 0}, "")])
def test_places_without_unlabeled_cases_are_an_error(options, changes, named):
    with pytest.raises(InputError, match=f"--labeled_bs 2 .*{named}.*--labeled_bs to 4"):
        training_split(options(**changes))


def test_more_labels_than_cases(options):
    with pytest.raises(InputError, match="--labelnum 11 .*train.list"):
        training_split(options(labelnum=11))


def test_overlap_of_the_lists(options, tmp_path):
    path = write(tmp_path / "mixed.list", ["test0", CASES[3], CASES[5]])
    with pytest.raises(InputError, match="case03.*--test_list"):
        training_split(options(test_list=path))


def test_missing_lists(options, tmp_path):
    with pytest.raises(InputError, match="nowhere.list.*--train_list"):
        training_split(options(train_list=str(tmp_path / "nowhere.list")))
    with pytest.raises(InputError, match="nowhere.list.*--test_list"):
        training_split(options(test_list=str(tmp_path / "nowhere.list")))
    with pytest.raises(InputError, match="nowhere.list.*--labeled_list"):
        training_split(options(labeled_list=str(tmp_path / "nowhere.list")))
    (tmp_path / "test.list").unlink()
    assert training_split(options()).labeled == CASES[:4]  # training alone needs no test list
    with pytest.raises(InputError, match="test.list.*--test_list"):
        cases_to_test(options())


def test_split_names_the_pair_of_lists(options, tmp_path):
    write(tmp_path / "dev_train.list", CASES[2:])
    write(tmp_path / "dev_test.list", CASES[:2])
    assert training_split(options(split="dev")).labeled == CASES[2:6]
    assert cases_to_test(options(split="dev")) == CASES[:2]
    assert cases_to_test(options()) == ["test0", "test1"]


def test_lists_of_the_repository():
    folder = files.REPOSITORY / "data/LA"
    names = ("train", "test", "dev_train", "dev_test")
    train, test, dev_train, dev_test = (read_list(folder / f"{name}.list", "") for name in names)
    assert (len(train), len(test)) == (80, 20)
    assert not set(train) & set(test)
    assert dev_train == train[:64] and dev_test == train[64:]
    for fold in range(1, 5):
        ends = 16 * fold - 16, 16 * fold
        assert read_list(folder / f"fold{fold}_test.list", "") == train[slice(*ends)]
        assert read_list(folder / f"fold{fold}_train.list", "") == train[ends[1] :] + train[: ends[0]]


def test_a_test_case_under_another_id_is_refused(options, tmp_path):
    image = np.random.default_rng(0).normal(size=(4, 5, 6))
    for case, voxels in ((CASES[1], image), ("test0", image + 1), ("test1", image + 2)):
        write_case(tmp_path, case, voxels, None, {})
    assert training_split(options()).labeled == CASES[:4]
    for copy in ("test1", CASES[5]):  # in the test, or among the unlabeled cases of a validation case
        write_case(tmp_path, copy, image, None, {})
        with pytest.raises(InputError, match=f"{CASES[1]} and {copy} .*--test_list"):
            training_split(options())
        write_case(tmp_path, copy, image + 3, None, {})


def test_what_was_trained_on_twice_can_be_tested(tmp_path):
    for case in "abc":
        write_case(tmp_path, case, np.full((4, 5, 6), float(case == "c")), None, {})
    refuse_copies(tmp_path, ["a", "b"], ["c"])
    with pytest.raises(InputError, match="a and b"):
        refuse_copies(tmp_path, ["a"], ["b", "c"])
