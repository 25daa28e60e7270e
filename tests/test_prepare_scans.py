"""The command line from raw scans to a data folder, and from there to a tested model."""

import csv
import json
import os
import shutil
from unittest.mock import Mock

import h5py
import nibabel as nib
import numpy as np
import pytest

import check_data
import prepare_scans
import test_LA
import train
from dataloaders import case_files
from dataloaders.case_files import read_list
from inference.scoring import write_prediction
from options.presets import PRESETS
from runtime import runs
from scans import prepare
from scans.files import Scan, find_scans, read_scan
from scans.preprocess import Preprocessing
from utils.errors import BAD_INPUT, InputError, run_script

SHORT = "--preset demo --patch_size 32 32 32 --n_filters 2 --batch_size 2 --max_iterations 2 --labelnum 3 --exp run"


@pytest.fixture
def raw(raw_scans, tmp_path):
    """A copy of the raw scans that a test may damage."""
    return shutil.copytree(raw_scans, tmp_path / "raw")


@pytest.fixture
def command(raw, tmp_path):
    """A command line over the raw scans; the last of two equal flags wins."""

    def build(*flags) -> list[str]:
        where = ["--images", raw / "images", "--labels", raw / "labels", "--dest", tmp_path / "out"]
        return [*map(str, where), *map(str, flags)]

    return build


def lists_in(dest) -> dict[str, list[str]]:
    return {path.name: read_list(path, "") for path in sorted(dest.glob("*.list"))}


def test_from_raw_scans_to_a_tested_model(command, tmp_path, capsys):
    dest, model = str(tmp_path / "out"), str(tmp_path / "model")
    flags = ["--spacing_mm", 2, 2, 2, "--orientation", "LPS", "--normalise", "percentile", "--foreground", "1,2"]
    assert prepare_scans.main(command(*flags)) == 0
    out = capsys.readouterr().out
    assert "4 labeled and 2 unlabeled cases (6 written, 0 were there already)" in out
    assert "3 labeled cases (--labelnum 3 or fewer), then 2 unlabeled" in out
    assert check_data.main(["--root_path", dest, "--labelnum", "3"]) == 0
    assert check_data.main(["--root_path", dest, "--labelnum", "4"]) == 1  # the fourth of the list has no label
    where = ["--model_path", model]
    assert train.main([*SHORT.split(), "--device", "cpu", "--root_path", dest, *where]) == 0
    state = runs.load_checkpoint(tmp_path / "model" / "run" / runs.LAST)
    assert sorted(state["cases"]["unlabeled"]) == ["scan4", "scan5"]
    expected = Preprocessing((2.0, 2.0, 2.0), "percentile", orientation="LPS")
    assert Preprocessing.from_record(state["preprocessing"]) == expected
    assert test_LA.main(["--exp", "run", "--stride_xy", "32", "--stride_z", "32", "--skip", "figures", *where]) == 0
    scores = json.loads((tmp_path / "model" / "run" / runs.METRICS_JSON).read_text())
    assert {score["case"] for score in scores["cases"]} == set(lists_in(tmp_path / "out")["test.list"])


def test_a_prediction_lies_over_the_prepared_case(command, tmp_path):
    prepare_scans.main(command())
    (case,) = lists_in(tmp_path / "out")["test.list"]
    geometry = case_files.read_geometry(tmp_path / "out", case)
    folder = tmp_path / "run"
    (folder / runs.PREDICTIONS).mkdir(parents=True)
    label = case_files.read_label(tmp_path / "out", case)
    write_prediction(folder, case, label, label, label, geometry, {}, ["figures"])
    written = nib.load(folder / runs.PREDICTIONS / f"{case}.nii.gz")
    scan = read_scan(find_scans(tmp_path / "raw" / "images")[case])
    np.testing.assert_allclose(written.affine, scan.affine, atol=1e-4)


# --- lists


def test_test_cases_are_drawn_from_the_labeled_ones(command, tmp_path):
    assert prepare_scans.main(command()) == 0
    lists = lists_in(tmp_path / "out")
    assert list(lists) == ["test.list", "train.list"]
    assert (len(lists["test.list"]), len(lists["train.list"])) == (1, 5)
    assert sorted(lists["train.list"][:3] + lists["test.list"]) == [f"scan{i}" for i in range(4)]
    assert lists["train.list"][3:] == ["scan4", "scan5"]
    orders = {tuple(lists["train.list"])}
    for seed in (1, 2, 3):
        prepare_scans.main(command("--seed", seed, "--dest", tmp_path / str(seed)))
        orders.add(tuple(lists_in(tmp_path / str(seed))["train.list"]))
    assert len(orders) > 1


def test_a_new_scan_leaves_the_order_of_the_others(command):
    options = prepare_scans.parse_options(command("--test_fraction", "0"))
    some = [f"case{i}" for i in range(20)]
    (before,) = prepare_scans.draw_lists(some, [], {}, options).values()
    (after,) = prepare_scans.draw_lists([*some, "new"], [], {}, options).values()
    assert before != sorted(before)
    assert [case for case in after if case != "new"] == before


def test_folds_cover_every_labeled_training_case_once(command, tmp_path):
    assert prepare_scans.main(command("--folds", 3)) == 0
    lists = lists_in(tmp_path / "out")
    train = lists["train.list"][:3]
    held = [case for fold in range(3) for case in lists[f"fold{fold}_test.list"]]
    assert sorted(held) == sorted(train) and len(lists) == 8
    for fold in range(3):
        rest = [case for case in train if case not in lists[f"fold{fold}_test.list"]]
        assert lists[f"fold{fold}_train.list"] == [*rest, "scan4", "scan5"]
    prepare_scans.main(command("--folds", 2, "--test_fraction", 0, "--overwrite"))
    assert list(lists_in(tmp_path / "out")) == [f"fold{k}_{n}.list" for k in (0, 1) for n in ("test", "train")] + [
        "train.list"  # lists of the old split are gone
    ]


def test_running_again_leaves_the_lists_to_their_user(command, raw, tmp_path):
    prepare_scans.main(command())
    (tmp_path / "out" / "train.list").write_text("scan0\n")
    assert prepare_scans.main(command()) == 0
    assert lists_in(tmp_path / "out")["train.list"] == ["scan0"]
    scan = nib.load(raw / "images" / "scan5.nii.gz")
    nib.save(nib.Nifti1Image(1.5 * np.asanyarray(scan.dataobj), scan.affine), raw / "images" / "scan6.nii.gz")
    prepare_scans.main(command())
    assert len(lists_in(tmp_path / "out")["train.list"]) == 6


def test_lists_that_a_user_wrote_stay(command, raw, tmp_path):
    dest, own = tmp_path / "out", ["test.list", "fold_a_train.list", "fold7_test.list"]
    prepare_scans.main(command("--test_fraction", 0, "--folds", 2))
    for name in own:
        (dest / name).write_text("scan0\n")
    prepare_scans.main(command("--test_fraction", 0, "--folds", 2))
    assert {name: lists_in(dest).get(name) for name in own} == dict.fromkeys(own, ["scan0"])
    (raw / "images" / "scan5.nii.gz").unlink()  # so that the lists are drawn anew
    prepare_scans.main(command("--test_fraction", 0, "--folds", 2))
    assert {name: lists_in(dest).get(name) for name in own} == dict.fromkeys(own, ["scan0"])
    (dest / "fold1_test.list").write_text("scan1\n")
    prepare_scans.main(command("--test_fraction", 0, "--overwrite"))
    assert set(lists_in(dest)) == {"train.list", "fold1_test.list", *own}


def test_lists_of_the_old_split_go_after_an_interruption_too(command, tmp_path, monkeypatch):
    prepare_scans.main(command("--folds", 2))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "write_case", Mock(side_effect=KeyboardInterrupt))
        prepare_scans.main(command("--test_fraction", 0, "--overwrite"))
    prepare_scans.main(command("--test_fraction", 0))
    assert list(lists_in(tmp_path / "out")) == ["train.list"]


# --- a CSV file of scans


def write_table(raw, rows):
    path = raw / "scans.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_table_names_scans_labels_ids_and_parts(raw, tmp_path):
    rows = [
        {"image": "images/scan0.nii.gz", "label": "labels/scan0.nii.gz", "id": "anna", "split": "test"},
        {"image": raw / "images/scan1.nrrd", "label": raw / "labels/scan1.nrrd", "id": "", "split": "train"},
        {"image": "images/scan2.mha", "label": "labels/scan2.mha", "id": "", "split": ""},
        {"image": "images/scan4.nrrd", "label": "", "id": "", "split": ""},
    ]
    path = write_table(raw, rows)
    assert prepare_scans.main(["--images", str(path), "--dest", str(tmp_path / "out")]) == 0
    lists = lists_in(tmp_path / "out")
    assert lists["test.list"] == ["anna"]
    assert sorted(lists["train.list"][:2]) == ["scan1", "scan2"] and lists["train.list"][2] == "scan4"
    whole, _ = Preprocessing().apply(read_scan(raw / "images/scan0.nii.gz"))
    np.testing.assert_array_equal(case_files.read_image(tmp_path / "out", "anna"), whole)


IMAGE, LABEL = "images/scan0.nii.gz", "labels/scan0.nii.gz"


@pytest.mark.parametrize(
    "rows, words",
    [
        ([{"image": IMAGE, "lable": LABEL}], ("lable", "label, id, split")),
        ([{"picture": IMAGE}], ("picture", "needs rows with image")),
        ([{"image": IMAGE, "label": LABEL}, {"image": IMAGE, "label": ""}], ("line 3", "scan0 stands there twice")),
        ([{"image": IMAGE, "id": "up/down"}], ("line 2", "up/down cannot name a folder")),
        ([{"image": IMAGE, "id": ".."}], ("line 2", ".. cannot name a folder")),
        ([{"image": IMAGE, "label": LABEL, "split": "val"}], ("line 2", "split is val")),
        ([{"image": IMAGE, "label": "", "split": "test"}], ("line 2", "has no label")),
        ([{"image": "", "label": LABEL}], ("line 2", "image is missing")),
        ([{"image": IMAGE, "label": LABEL, "split": "test"}], ("no labeled case is left",)),
    ],
)
def test_tables_with_faults(raw, tmp_path, capsys, rows, words):
    path = write_table(raw, rows)
    refused(["--images", str(path), "--dest", str(tmp_path / "out")], capsys, *words)
    assert not (tmp_path / "out").exists()


def refused(argv, capsys, *words):
    with pytest.raises(SystemExit) as end:
        run_script(lambda: prepare_scans.main(argv))
    error = capsys.readouterr().err
    assert end.value.code == BAD_INPUT
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error


# --- bad input


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--spacing_mm", 1, 0, 1], ("--spacing_mm",)),
        (["--normalise", "percentile", "--percentiles", 99, 1], ("percentiles", "0..100")),
        (["--orientation", "XYZ"], ("orientation", "XYZ")),
        (["--test_fraction", 1], ("--test_fraction",)),
        (["--folds", 1], ("--folds 1",)),
        (["--folds", 4], ("--folds 4", "there are 3")),
        (["--seed", -1], ("--seed",)),
        (["--images", "/nowhere"], ("/nowhere",)),
    ],
)
def test_bad_flags_write_nothing(command, tmp_path, capsys, flags, words):
    refused(command(*flags), capsys, *words)
    assert not (tmp_path / "out").exists()


def test_labels_that_fit_no_scan(command, raw, tmp_path, capsys):
    (raw / "labels" / "scan0.nii.gz").rename(raw / "labels" / "seg0.nii.gz")
    refused(command(), capsys, "1 of 4 labels", "seg0.nii.gz", "CSV")
    assert not (tmp_path / "out").exists()


def test_a_broken_scan_is_reported_and_left_out(command, raw, tmp_path, capsys):
    (raw / "images" / "scan1.nrrd").write_text("junk")
    assert prepare_scans.main(command()) == 1
    out = capsys.readouterr().out
    assert "fault: scan1: " in out and "1 of 6 scans were left out" in out
    assert "scan1" not in sum(lists_in(tmp_path / "out").values(), [])


def test_names_in_other_encodings_and_links_in_a_circle_cost_one_scan_each(command, raw, tmp_path, capsys):
    for folder in ("images", "labels"):
        (raw / folder / "scan1.nrrd").rename(raw / folder / "lat\udce9in.nrrd")
        (raw / folder / "scan3.nii.gz").unlink()
        os.symlink("scan3.nii.gz", raw / folder / "scan3.nii.gz")
    with pytest.raises(SystemExit) as end:
        run_script(lambda: prepare_scans.main(command()))
    assert end.value.code == 1 and "2 of 6 scans were left out" in capsys.readouterr().out


def test_no_valid_scan_is_an_error_too(command, raw, tmp_path, capsys):
    for path in (raw / "labels").iterdir():
        path.write_text("junk")
    assert prepare_scans.main(command()) == 1
    assert lists_in(tmp_path / "out") == {"train.list": ["scan4", "scan5"]}


def test_scans_that_lie_differently_bring_a_remark(command, raw, capsys):
    prepare_scans.main(command())
    assert "run in different ways" not in capsys.readouterr().out
    path = raw / "images" / "scan5.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj)[::-1], image.affine @ np.diag([-1, 1, 1, 1])), path)
    prepare_scans.main(command())
    assert "--orientation LPS" in capsys.readouterr().out
    prepare_scans.main(command("--orientation", "LPS", "--overwrite"))
    assert "run in different ways" not in capsys.readouterr().out


@pytest.mark.parametrize("sheared", [True, False])
def test_a_tilted_gantry_brings_a_remark(command, raw, capsys, sheared):
    path = raw / "images" / "scan5.nii.gz"
    image = nib.load(path)
    affine = image.affine.copy()
    affine[1, 2] += 0.5 * sheared
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), affine), path)
    assert prepare_scans.main(command()) == 0
    assert ("sheared" in capsys.readouterr().out) == sheared


def test_foreground_is_a_list_of_numbers(command, capsys):
    with pytest.raises(InputError, match="--foreground"):
        prepare_scans.main(command("--foreground", "one"))
    with pytest.raises(InputError, match="--labels"):
        prepare_scans.main(command("--images", __file__))


# --- several classes


def raw_label(raw, case):
    return read_scan(find_scans(raw / "labels")[case]).array


def stored(path, case="scan0"):
    with h5py.File(case_files.case_path(path, case)) as file:
        return file["label"][()], dict(file.attrs)


def test_classes_stay_apart(command, raw, tmp_path, capsys):
    assert prepare_scans.main(command("--classes", "lower=1,upper=2")) == 0
    out = capsys.readouterr().out
    assert "class lower (1): in 4 cases" in out and "one foreground" not in out
    label, attributes = stored(tmp_path / "out")
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, raw_label(raw, "scan0"))
    assert json.loads(attributes["class_names"]) == ["lower", "upper"]
    assert json.loads(attributes["class_values"]) == [[1], [2]]
    manifest = json.loads((tmp_path / "out" / case_files.MANIFEST).read_text())
    assert [one["name"] for one in manifest["settings"]["classes"]] == ["lower", "upper"]
    volumes = manifest["cases"]["scan0"]["class_ml"]
    expected = [np.count_nonzero(label == number) * 2 * 2 * 2 / 1000 for number in (1, 2)]
    np.testing.assert_allclose([volumes["lower"], volumes["upper"]], expected)
    assert manifest["cases"]["scan5"]["label"] is None and "class_ml" not in manifest["cases"]["scan5"]


def test_classes_take_their_own_order_and_may_merge_values(command, raw, tmp_path):
    prepare_scans.main(command("--classes", "2,1"))
    assert json.loads(stored(tmp_path / "out")[1]["class_names"]) == ["class 2", "class 1"]
    np.testing.assert_array_equal(stored(tmp_path / "out")[0], np.array([0, 2, 1])[raw_label(raw, "scan0")])
    prepare_scans.main(command("--classes", "whole=1+2", "--overwrite"))
    label, attributes = stored(tmp_path / "out")
    np.testing.assert_array_equal(label, raw_label(raw, "scan0") > 0)
    assert attributes["class_values"] == "[[1, 2]]"


def test_a_value_without_class_is_refused_unless_it_is_ignored(command, raw, tmp_path, capsys):
    assert prepare_scans.main(command("--classes", "2")) == 1
    assert "--ignore_values 1" in capsys.readouterr().out
    assert not case_files.case_path(tmp_path / "out", "scan0").exists()
    assert prepare_scans.main(command("--classes", "2", "--ignore_values", "1", "--overwrite")) == 0
    np.testing.assert_array_equal(stored(tmp_path / "out")[0], raw_label(raw, "scan0") == 2)


def test_a_class_that_no_case_holds_is_said(command, capsys):
    assert prepare_scans.main(command("--classes", "1,2,none=9")) == 0
    assert "class none (9): in 0 cases" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", [("--classes", "1", "--foreground", "2"), ("--ignore_values", "1"), ("--classes", "a=1,a=2")]
)
def test_classes_that_contradict(command, capsys, flags):
    refused(command(*flags), capsys, flags[0])


@pytest.mark.parametrize("labels", [{"1": "lower part", "2": "upper part"}, {"lower part": 1, "upper part": 2}])
def test_names_come_from_dataset_json(command, raw, tmp_path, labels, capsys):
    (raw / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert prepare_scans.main(command()) == 0  # merged, and told how to keep them apart
    assert "--classes 'lower part=1,upper part=2'" in capsys.readouterr().out
    assert "class_names" not in stored(tmp_path / "out")[1]
    assert prepare_scans.main(command("--classes", "1,2", "--overwrite")) == 0
    assert json.loads(stored(tmp_path / "out")[1]["class_names"]) == ["lower part", "upper part"]


# --- what it says, and other folders


def test_it_says_what_it_found_and_what_to_run(command, tmp_path, capsys):
    assert prepare_scans.main(command()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "36.5 x 34 x 30 voxels" in next(line for line in lines if line.startswith("sizes"))
    assert "2 x 2 x 2 to 2 x 2 x 3.25" in next(line for line in lines if line.startswith("voxel sizes"))
    assert "label values: 0, 1, 2" in lines
    assert any("--foreground" in line for line in lines)  # two values were merged
    (words,) = (line.split()[2:] for line in lines if line.startswith("train: python"))
    assert words[words.index("--patch_size") :][:4] == ["--patch_size", "48", "48", "32"]
    flags = [*words[1:], *"--n_filters 2 --max_iterations 1 --num_workers 0 --device cpu --model_path".split()]
    assert train.main(["--method", "dtml", *flags, str(tmp_path / "model")]) == 0
    prepare_scans.main(command("--foreground", "2", "--overwrite"))
    assert "--foreground" not in capsys.readouterr().out


def test_all_labels_are_used_by_default(command, tmp_path, capsys):
    prepare_scans.main(command())
    root = ["--root_path", str(tmp_path / "out")]
    for flags, number in (("", 3), ("--labelnum 2", 2), ("--preset cpu", 3), ("--preset cpu --labelnum 2", 2)):
        assert train.parse_options([*root, *flags.split()]).labelnum == number
    assert train.parse_options([*root, "--preset", "demo"]).labelnum == PRESETS["demo"]["labelnum"]
    assert check_data.main(root) == 0
    manifest = tmp_path / "out" / case_files.MANIFEST
    manifest.write_text(manifest.read_text().replace("prepare_scans", "prepare_LA"))  # whose lists label all cases
    assert train.parse_options(root).labelnum == 16


def test_unlabeled_scans_alone(raw, tmp_path, capsys):
    flags = ["--images", str(raw / "images"), "--dest", str(tmp_path / "out")]
    assert prepare_scans.main(flags) == 0
    assert "--labels" in capsys.readouterr().out
    assert lists_in(tmp_path / "out") == {"train.list": [f"scan{i}" for i in range(6)]}
    refused([*flags, "--folds", "2"], capsys, "--folds")


@pytest.mark.parametrize("channel", ["", "_0000"])
def test_folders_of_nnunet_and_the_decathlon(raw, tmp_path, channel, capsys):
    root = tmp_path / "Dataset001"
    for old, new, end in (("images", "imagesTr", channel), ("labels", "labelsTr", "")):
        (root / new).mkdir(parents=True)
        for path in (raw / old).iterdir():
            shutil.copy(path, root / new / path.name.replace(".", f"{end}.", 1))
    flags = ["--images", str(root), "--dest", str(tmp_path / "out")]
    assert prepare_scans.main(flags) == 0
    assert sorted(sum(lists_in(tmp_path / "out").values(), [])) == [f"scan{i}" for i in range(6)]
    if channel:
        shutil.copy(raw / "images/scan0.nii.gz", root / "imagesTr/scan0_0001.nii.gz")
        refused(flags, capsys, "--images")


def test_the_folder_of_images_is_no_folder_of_labels(raw, tmp_path, capsys):
    refused(
        ["--images", str(raw / "images"), "--labels", str(raw / "images"), "--dest", str(tmp_path / "o")],
        capsys,
        "--labels",
    )


def test_a_label_that_lies_apart_is_accepted_by_a_flag(command, raw, capsys):
    path = raw / "labels" / "scan0.nii.gz"
    image = nib.load(path)
    image.affine[0, 3] += 0.2 * 2  # voxels of 2 mm
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine), path)
    assert prepare_scans.main(command()) == 1
    assert "--grid_tolerance" in capsys.readouterr().out
    assert prepare_scans.main(command("--grid_tolerance", 0.5)) == 0


def test_nan_is_filled_by_a_flag(command, raw, tmp_path, capsys):
    path = raw / "images" / "scan0.nii.gz"
    image = nib.load(path)
    array = np.asanyarray(image.dataobj).astype(np.float32)
    array[0] = np.nan
    nib.save(nib.Nifti1Image(array, image.affine), path)
    assert prepare_scans.main(command()) == 1
    assert "--fill_nan" in capsys.readouterr().out
    assert prepare_scans.main(command("--fill_nan", 0, "--overwrite")) == 0
    array[0] = 0
    expected, _ = Preprocessing().apply(Scan(array, image.affine))
    np.testing.assert_array_equal(case_files.read_image(tmp_path / "out", "scan0"), expected)
