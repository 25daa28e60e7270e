import json
import shutil

import h5py
import numpy as np
import pytest

from check_data import main
from dataloaders.case_files import IMAGE_KEY, LABEL_KEY, MANIFEST, case_path, class_attributes
from utils.labels import LabelClass

TRAIN, TEST = ["a", "b", "c"], ["d", "e"]


def rewrite(root, case, key, array):
    """Replace one data set of a case; None takes it out."""
    with h5py.File(case_path(root, case), "a") as file:
        if key in file:
            del file[key]
        if array is not None:
            file[key] = array


@pytest.fixture
def root(tmp_path):
    """A valid data folder: three training cases, two test cases of 1 labeled voxel in 4."""
    for index, case in enumerate(TRAIN + TEST):
        case_path(tmp_path, case).parent.mkdir()
        image = np.arange(24 * (5 + index), dtype=np.float32).reshape(4, 5 + index, 6)
        rewrite(tmp_path, case, IMAGE_KEY, image)
        label = np.zeros(image.shape, np.uint8)
        label[0] = 1
        rewrite(tmp_path, case, LABEL_KEY, label)
    write_lists(tmp_path)
    return tmp_path


def write_lists(root, train=TRAIN, test=TEST, prefix=""):
    (root / f"{prefix}train.list").write_text("\n".join(train))
    (root / f"{prefix}test.list").write_text("\n".join(test))


def check(capsys, root, *flags):
    """Exit status and fault lines of a run that asks for two labels unless told otherwise."""
    status = main(["--root_path", str(root), "--labelnum", "2", *flags])
    output = capsys.readouterr().out
    return status, [line for line in output.splitlines() if line.startswith("fault: ")], output


def test_valid_folder_and_its_summary(root, capsys):
    status, faults, output = check(capsys, root)
    assert (status, faults) == (0, [])
    assert "3 training cases, 2 test cases" in output
    assert "4-4 x 5-9 x 6-6 voxels" in output
    assert "0.625 x 0.625 x 0.625 mm" in output
    assert "25.0-25.0 % of a volume (5 cases)" in output
    assert f"--root_path {root} --labelnum 2" in output.splitlines()[-1]


def with_classes(root, case, names):
    with h5py.File(case_path(root, case), "a") as file:
        file.attrs.update(class_attributes([LabelClass(name, (number,)) for number, name in enumerate(names, 1)]))


def test_classes_and_their_sizes(root, capsys):
    for case in TRAIN + TEST:
        with_classes(root, case, ("rim", "core"))
    label = np.zeros((4, 6, 6), np.uint8)
    label[0], label[1:3] = 1, 2
    rewrite(root, "b", LABEL_KEY, label)
    status, faults, output = check(capsys, root)
    assert (status, faults) == (0, [])
    assert "25.0-75.0 % of a volume (5 cases)" in output
    assert "class rim: 25.0-25.0 % of a volume (5 cases)" in output
    assert "class core: 50.0-50.0 % of a volume (1 case)" in output
    label[3] = 3
    rewrite(root, "b", LABEL_KEY, label)
    assert check(capsys, root)[0] == 1


def test_all_cases_have_the_same_classes(root, capsys):
    with_classes(root, "d", ("rim", "core"))
    status, faults, _ = check(capsys, root)
    assert status == 1 and len(faults) == 1 and "--classes" in faults[0] and " d " in faults[0]


def test_classes_that_no_case_records_are_numbered_by_a_flag(root, capsys):
    for case in TRAIN + TEST:
        label = np.zeros((4, 5 + (TRAIN + TEST).index(case), 6), np.uint8)
        label[0], label[1:3] = 1, 2
        rewrite(root, case, LABEL_KEY, label)
    status, faults, _ = check(capsys, root)
    assert status == 1 and all("--num_classes 2" in fault for fault in faults)
    status, faults, output = check(capsys, root, "--num_classes", "2")
    assert (status, faults) == (0, []) and "--num_classes 2" in output.splitlines()[-1]
    sizes = [line for line in output.splitlines() if line.startswith("class ")]
    assert len(sizes) == 2 and "50.0-50.0 % of a volume (5 cases)" in sizes[1]


@pytest.mark.parametrize("number", ["1", "3"])
def test_another_number_of_classes_than_recorded_is_a_fault(root, capsys, number):
    for case in TRAIN + TEST:
        with_classes(root, case, ("rim", "core"))
    status, faults, _ = check(capsys, root, "--num_classes", number)
    assert status == 1 and len(faults) == 1 and f"--num_classes {number}" in faults[0] and "rim, core" in faults[0]


def test_only_unlabeled_cases_may_lack_a_label(root, capsys):
    rewrite(root, "c", LABEL_KEY, None)
    status, _, output = check(capsys, root)
    assert status == 0
    assert "(4 cases)" in output
    status, faults, _ = check(capsys, root, "--labelnum", "3")
    assert status == 1
    assert "'label'" in faults[0]
    rewrite(root, "d", LABEL_KEY, None)
    assert len(check(capsys, root)[1]) == 1


def test_all_faults_at_once(root, capsys):
    write_lists(root, train=["a", "b", "b", "c", "misspelt"], test=["d", "e", "a"])
    rewrite(root, "a", IMAGE_KEY, np.full((4, 5, 6), np.nan, np.float32))
    rewrite(root, "c", LABEL_KEY, np.full((4, 7, 6), 255, np.uint8))
    rewrite(root, "d", LABEL_KEY, np.zeros((4, 4, 4), np.uint8))
    case_path(root, "e").write_bytes(b"")
    status, faults, output = check(capsys, root, "--labelnum", "9")
    text = "\n".join(faults)
    for word in ("b 2 times", "both lists (a)", "--labelnum is 9", "NaN", "255", "misspelt", "shape", "e/mri_norm2"):
        assert word in text
    assert status == 1
    assert len(faults) == 8
    assert "8 faults found" in output
    assert "valid cases      1" in output  # b


def test_all_faults_at_once_in_a_prepared_folder(root, capsys):
    labels = {case: {"label": {"file": case}} for case in TRAIN}
    (root / MANIFEST).write_text(json.dumps({"settings": {"script": "prepare_scans"}, "cases": labels}))
    write_lists(root, train=["a", "b", "b", "c"])
    rewrite(root, "c", LABEL_KEY, None)
    assert main(["--root_path", str(root)]) == 1
    faults = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fault: ")]
    assert len(faults) == 2 and "b 2 times" in faults[0] and "'label'" in faults[1]


@pytest.mark.parametrize("labelnum", ["0", "-1", "4"])
def test_number_of_labels(root, capsys, labelnum):
    status, faults, _ = check(capsys, root, "--labelnum", labelnum)
    assert status == 1
    assert f"--labelnum is {labelnum}" in faults[0]
    assert len(faults) == 1


def test_a_list_of_labeled_cases_takes_the_place_of_their_number(root, capsys):
    rewrite(root, "a", LABEL_KEY, None)
    (root / "labeled.list").write_text("b\nc\n")
    listed = ("--labelnum", "99", "--labeled_list", str(root / "labeled.list"))
    assert check(capsys, root, *listed)[:2] == (0, [])
    (root / "labeled.list").write_text("a\nz\n")
    status, faults, _ = check(capsys, root, *listed)
    assert status == 1 and len(faults) == 2
    assert "case z of --labeled_list" in faults[0] and "'label'" in faults[1]


def test_lists_by_split_and_by_flag(root, capsys):
    status, faults, _ = check(capsys, root, "--split", "dev")
    assert status == 1
    assert ["dev_train.list" in faults[0], "dev_test.list" in faults[1], len(faults)] == [True, True, 2]
    write_lists(root, TRAIN[:2], TRAIN[2:], prefix="dev_")
    assert "2 training cases, 1 test case" in check(capsys, root, "--split", "dev")[2]
    named = ["--train_list", str(root / "test.list"), "--test_list", str(root / "dev_test.list")]
    status, _, output = check(capsys, root, *named)
    assert status == 0
    assert "2 training cases, 1 test case" in output


def test_missing_folder_is_one_fault_beside_its_lists(root, capsys):
    lists = ["--train_list", str(root / "train.list"), "--test_list", str(root / "test.list")]
    (root / "empty").mkdir()
    for folder in ("no", "empty"):
        status, faults, _ = check(capsys, root / folder, *lists)
        assert status == 1 and len(faults) == 1
        assert "--root_path" in faults[0]


def test_one_scan_under_two_ids(root, capsys):
    shutil.copy(case_path(root, "a"), case_path(root, "d"))
    status, faults, _ = check(capsys, root)
    assert status == 1 and len(faults) == 1
    assert "a and d" in faults[0] and "--test_list" in faults[0]
