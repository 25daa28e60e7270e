"""The challenge's folders against the published layout; the historical crop against its rule, worked by hand."""

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

import check_data
import prepare_LA
import test_LA
import train
from dataloaders import case_files
from dataloaders.case_files import read_list, write_list
from options.flags import LISTS
from scans.prepare import MANIFEST
from utils.errors import InputError

CASES = ("A0", "B1", "C2", "D3")
SHAPE = (150, 140, 6)
SHORT = "--preset demo --patch_size 32 32 32 --n_filters 2 --batch_size 2 --max_iterations 2 --labelnum 2 --exp run"


@pytest.fixture
def source(challenge, tmp_path):
    """A copy of the challenge's folders that a test may damage."""
    return shutil.copytree(challenge, tmp_path / "source")


@pytest.fixture
def partly(source):
    """The same, but D3 has no label."""
    (source / "D3" / "laendo.nrrd").unlink()
    return source


def prepare(source, dest, *flags) -> int:
    return prepare_LA.main(["--source", str(source), "--dest", str(dest), *map(str, flags)])


def raw_image(source, case):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(source / case / "lgemri.nrrd"))).T


def test_layout_and_normalisation_are_those_of_the_published_files(source, tmp_path):
    assert prepare(source, tmp_path / "out") == 0
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    for case in CASES[:3]:
        image, label = (read(tmp_path / "out", case) for read in (case_files.read_image, case_files.read_label))
        whole = raw_image(source, case)
        whole = ((whole - whole.mean()) / whole.std()).astype(np.float32)  # over the uncropped scan
        x, y, z = manifest["cases"][case]["prepared_start"]
        np.testing.assert_array_equal(image, whole[x : x + image.shape[0], y : y + image.shape[1]])
        assert z == 0 and image.shape[2] == 6 and label.sum() == 41 * 31 * 4
        assert case_files.read_spacing(tmp_path / "out", case) == (0.625, 0.625, 1.25)  # what the header says
        np.testing.assert_allclose(case_files.read_geometry(tmp_path / "out", case)[1], (0.625 * x, 0.625 * y, 0))
        assert case_files.find_faults(tmp_path / "out", case) == []
    np.testing.assert_allclose(manifest["cases"]["A0"]["label_ml"], 41 * 31 * 4 * 0.625 * 0.625 * 1.25 / 1000)


def test_margins_of_the_label_crop():
    label = np.zeros((400, 300, 1), bool)
    label[100:231, 120:141] = True  # 131 voxels need no padding; 21 are padded by (112 - 20) // 2 = 46
    starts, stops = [], []
    for index in range(300):
        x, y, z = prepare_LA.label_crop(f"case{index}", label, label.shape, seed=0)
        starts.append((x.start, y.start))
        stops.append((x.stop, y.stop))
        assert z == slice(0, 1)
    before = np.array([100, 120]) - starts
    after = np.array(stops) - [231, 141]  # beyond the last foreground voxel
    assert (before.min(axis=0).tolist(), before.max(axis=0).tolist()) == ([10, 56], [19, 65])
    assert (after.min(axis=0).tolist(), after.max(axis=0).tolist()) == ([9, 55], [18, 64])
    assert len({tuple(pair) for pair in before}) > 50  # the axes are drawn apart


@pytest.mark.data
def test_published_files_were_cropped_by_this_rule(la_dir):
    for path in sorted(la_dir.glob(f"*/{case_files.CASE_FILE}"))[:20]:
        label = case_files.read_label(la_dir, path.parent.name)
        for axis in (0, 1):
            inside = np.flatnonzero(label.any(axis=(1 - axis, 2)))
            pad = max(112 - (inside[-1] - inside[0]), 0) // 2
            assert 10 <= inside[0] - pad <= 19
            assert 9 <= label.shape[axis] - 1 - inside[-1] - pad <= 18


def test_label_crop_ends_with_the_scan():
    label = np.zeros((60, 50, 2), bool)
    label[5:50, 5:45] = True
    assert prepare_LA.label_crop("a", label, label.shape, seed=0) == (slice(0, 60), slice(0, 50), slice(0, 2))


def test_crops_depend_on_seed_and_case_alone(source, tmp_path):
    prepare(source, tmp_path / "all")
    shutil.rmtree(source / "A0")
    prepare(source, tmp_path / "two")
    prepare(source, tmp_path / "other", "--seed", 3)
    files = {name: case_files.case_path(tmp_path / name, "B1").read_bytes() for name in ("all", "two", "other")}
    assert files["all"] == files["two"]
    assert files["two"] != files["other"]


def test_crops_that_need_no_label(partly, tmp_path):
    assert prepare(partly, tmp_path / "none", "--crop", "none") == 0
    assert case_files.read_shape(tmp_path / "none", "D3") == SHAPE
    assert not case_files.has_label(tmp_path / "none", "D3") and case_files.has_label(tmp_path / "none", "A0")
    assert prepare(partly, tmp_path / "centre", "--crop", "center", "--crop_size", 100, 141, 4) == 0
    image, whole = (case_files.read_image(tmp_path / name, "D3") for name in ("centre", "none"))
    np.testing.assert_array_equal(image, whole[25:125, :, 1:5])


def test_an_unlabeled_case_has_no_label_crop(partly, tmp_path, capsys):
    assert prepare(partly, tmp_path / "out") == 1
    out = capsys.readouterr().out
    assert "3 labeled and 0 unlabeled" in out and "--crop center or --crop none" in out
    assert "1 of 4 scans" in out
    assert not case_files.case_path(tmp_path / "out", "D3").exists()


def test_the_official_lists_come_along_unless_there_are_others(source, tmp_path, capsys):
    assert prepare(source, tmp_path / "out") == 0
    out = capsys.readouterr().out
    for name, count in zip(LISTS, (80, 20), strict=True):
        assert (tmp_path / "out" / name).read_text() == (prepare_LA.OFFICIAL / name).read_text()
        assert f"{name} names {count} of {count} cases" in out
    write_list(tmp_path / "out" / "train.list", ["A0", "B1"])
    prepare(source, tmp_path / "out")
    assert read_list(tmp_path / "out" / "train.list", "") == ["A0", "B1"]
    assert "train.list" not in capsys.readouterr().out


def test_from_the_challenge_to_a_tested_model(partly, tmp_path):
    dest = tmp_path / "out"
    dest.mkdir()
    write_list(dest / "train.list", ["A0", "B1", "D3"])
    write_list(dest / "test.list", ["C2"])
    assert prepare(partly, dest, "--crop", "center", "--crop_size", 64, 64, 6) == 0
    where = ["--root_path", str(dest)]
    assert check_data.main([*where, "--labelnum", "2"]) == 0
    model = ["--model_path", str(tmp_path / "model")]
    assert train.main([*SHORT.split(), "--device", "cpu", *where, *model]) == 0
    flags = ["--exp", "run", "--stride_xy", "32", "--stride_z", "32", "--skip", "figures", "predictions"]
    assert test_LA.main([*flags, *model]) == 0


def test_bad_input(source, tmp_path, capsys):
    for flags, word in (
        (["--source", tmp_path / "nowhere"], "no folder"),
        (["--source", tmp_path], "holds no <case>/lgemri.nrrd"),
        (["--crop_size", 0, 5, 5], "--crop_size"),
        (["--seed", -1], "--seed"),
    ):
        with pytest.raises(InputError, match=word):
            prepare(source, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
    prepare(source, tmp_path / "out")
    with pytest.raises(InputError, match="crop.*--overwrite"):
        prepare(source, tmp_path / "out", "--crop", "none")


def test_a_label_without_its_scan_is_a_fault(source, tmp_path, capsys):
    (source / "A0" / "lgemri.nrrd").unlink()
    assert prepare(source, tmp_path / "out") == 1
    assert "A0" in capsys.readouterr().out


def test_published_files_are_not_overwritten(source, tmp_path, phantom):
    case = case_files.case_path(tmp_path / "out", "P0")  # no case of the source
    case.parent.mkdir(parents=True)
    shutil.copy(case_files.case_path(phantom, "phantom_000"), case)
    before = case.read_bytes()
    with pytest.raises(InputError, match="P0"):
        prepare(source, tmp_path / "out", "--overwrite")
    assert case.read_bytes() == before
    assert list((tmp_path / "out").iterdir()) == [case.parent]
