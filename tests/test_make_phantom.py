import json
import tempfile
import zlib

import h5py
import numpy as np
import pytest
from scipy import ndimage

import make_phantom
from dataloaders.case_files import find_faults, read_image, read_label, read_list, read_spacing
from make_phantom import main, make_case
from utils.errors import InputError

SHAPE = (32, 32, 24)
SMALL = ["--train", "2", "--test", "1", "--shape", "16", "16", "16"]
# zlib.crc32 of the gray steps (little-endian int16) and of the label of make_case(2021, 0, SHAPE)
CHECKSUM = (378215432, 3732033551)


@pytest.fixture(scope="module")
def cases():
    return [make_case(2021, index, SHAPE) for index in range(8)]


def overlap(a, b):
    """Dice of two boolean masks."""
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_arrays_are_the_same_on_every_machine(cases):
    image, label = cases[0]
    steps = (image * make_phantom.GRAY_STEPS).astype("<i2")
    assert (zlib.crc32(steps.tobytes()), zlib.crc32(label.tobytes())) == CHECKSUM


def test_a_case_depends_on_seed_and_index_alone(cases):
    np.random.seed(5)  # noqa: NPY002 - the global stream must not matter
    again = make_case(2021, 1, SHAPE)
    for array, other in zip(again, cases[1], strict=True):
        np.testing.assert_array_equal(array, other)
    small = [make_case(seed, index, (16, 16, 16))[0].tobytes() for seed, index in ((1, 0), (1, 1), (2, 0))]
    assert len(set(small)) == 3


def test_types_shapes_and_gray_steps(cases):
    for image, label in cases:
        assert (image.dtype, label.dtype) == (np.float32, np.uint8)
        assert image.shape == label.shape
        assert image.shape[2] == SHAPE[2]
        assert all(32 <= side <= 36 for side in image.shape[:2])
        np.testing.assert_array_equal(image * 256, np.round(image * 256))
    assert len({image.shape for image, _ in cases}) > 3


def test_the_appendage_may_be_a_class_of_its_own(cases, tmp_path):
    for index, (image, label) in enumerate(cases):
        apart = make_case(2021, index, SHAPE, classes=2)
        np.testing.assert_array_equal(apart[0], image)
        np.testing.assert_array_equal(apart[1] > 0, label)
        assert 10 < np.count_nonzero(apart[1] == 2) < 0.2 * label.sum()
    main([*SMALL, "--classes", "2", "--dest", str(tmp_path)])
    with h5py.File(tmp_path / "phantom_000" / "mri_norm2.h5") as file:
        assert json.loads(file.attrs["class_names"]) == ["atrium", "appendage"] and file["label"][()].max() == 2


def test_label_is_one_piece_of_plausible_size(cases):
    for _, label in cases:
        assert set(np.unique(label)) == {0, 1}
        assert ndimage.label(label, np.ones((3, 3, 3)))[1] == 1
        assert 0.05 < label.mean() < 0.25


def test_gray_values_are_z_scores_of_a_scan_with_an_empty_surround(cases):
    share = make_phantom.SCAN_SHARE
    for image, _ in cases:
        image = image.astype(np.float64)
        empty = -share / (1 - share) * image.mean()  # z-score of zero signal, if the whole has mean 0
        assert share * (image**2).mean() + (1 - share) * empty**2 == pytest.approx(1, abs=0.01)
        assert image.min() == pytest.approx(empty, abs=0.05)
        assert -0.65 < image.min() < -0.4


def test_brightness_alone_does_not_find_the_atrium(cases):
    best = []
    for image, label in cases:
        smooth = ndimage.gaussian_filter(image, 0.7)
        masks = [make_phantom.largest_component(smooth > level) for level in np.linspace(0, 4, 41)]
        best.append(max(overlap(mask, label > 0) for mask in masks if mask.any()))
    assert np.mean(best) < 0.75


def test_neighbours_are_as_bright_as_the_atrium(cases):
    for image, label in cases:
        low, high = np.percentile(image[label > 0], [10, 90])
        outside = image[label == 0]
        assert ((low < outside) & (outside < high)).sum() > 0.5 * label.sum()


def test_annotated_blood_is_seen_and_veins_go_on_beyond_it():
    for index in range(4):
        rng = np.random.default_rng(index)
        scene = make_phantom.draw_pose(rng, SHAPE, make_phantom.spacing_of(SHAPE))
        seen, annotated, _ = make_phantom.draw_atrium(scene, np.array([30.0, 21.0, 19.0]))
        assert not ((annotated < 0) & (seen >= 0)).any()
        assert ((seen < 0) & (annotated >= 0)).sum() > 10


def test_folder_has_the_layout_of_the_scans(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")  # it may be another disk: a rename would fail
    dest = tmp_path / "new" / "phantom"
    assert main(["--dest", str(dest), *SMALL, "--seed", "4"]) == 0
    train, test = (read_list(dest / name, name) for name in make_phantom.LISTS)
    assert (len(train), len(test), len({*train, *test})) == (2, 1, 3)
    for index, case in enumerate(train + test):
        assert find_faults(dest, case) == []
        image, label = make_case(4, index, (16, 16, 16))
        np.testing.assert_array_equal(read_image(dest, case), image)
        np.testing.assert_array_equal(read_label(dest, case), label)
        assert read_spacing(dest, case) == (5.45, 5.45, 5.45)  # 87.2 mm / 16
    with h5py.File(dest / train[0] / "mri_norm2.h5") as file:
        assert {file[key].compression for key in file} == {"gzip"}
        assert (file["image"].dtype, file["label"].dtype) == (np.float32, np.uint8)
    assert [path.name for path in dest.parent.iterdir()] == ["phantom"]  # nothing temporary is left
    assert "wrote 2 + 1 cases" in capsys.readouterr().out


def test_nothing_is_done_twice(tmp_path, capsys):
    flags = ["--dest", str(tmp_path / "p"), *SMALL]
    main(flags)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").rglob("*")}
    assert main(flags) == 0
    assert "already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "p").rglob("*")}


def test_incomplete_folder_is_written_again(tmp_path):
    flags = ["--dest", str(tmp_path / "p"), *SMALL]
    main(flags)
    lost = tmp_path / "p" / "phantom_001" / "mri_norm2.h5"
    lost.unlink()
    main(flags)
    assert lost.exists()


@pytest.mark.parametrize("change", [["--seed", "9"], ["--train", "3"], ["--shape", "16", "16", "17"]])
def test_other_parameters_need_overwrite(tmp_path, change):
    dest = tmp_path / "p"
    main(["--dest", str(dest), *SMALL])
    kept = (dest / "phantom.json").read_text()
    with pytest.raises(InputError, match="--overwrite"):
        main(["--dest", str(dest), *SMALL, *change])
    assert (dest / "phantom.json").read_text() == kept
    main(["--dest", str(dest), *SMALL, *change, "--overwrite"])
    assert json.loads((dest / "phantom.json").read_text()) != json.loads(kept)


def test_overwrite_replaces_a_damaged_file(tmp_path):
    flags = ["--dest", str(tmp_path), *SMALL]
    main(flags)
    (tmp_path / "phantom_000" / "mri_norm2.h5").write_bytes(b"")
    main([*flags, "--overwrite"])
    assert find_faults(tmp_path, "phantom_000") == []


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_folder_that_is_no_phantom_is_left_alone(tmp_path, flags):
    (tmp_path / "scan.nii").write_text("precious")
    with pytest.raises(InputError, match="no phantom"):
        main(["--dest", str(tmp_path), *SMALL, *flags])
    with pytest.raises(InputError, match="no phantom"):
        main(["--dest", str(tmp_path / "scan.nii"), *SMALL, *flags])
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii"]


@pytest.mark.parametrize("error, expected", [(OSError(28, "No space left"), InputError), (KeyboardInterrupt,) * 2])
def test_a_stop_half_way_leaves_nothing(tmp_path, monkeypatch, error, expected):
    main(["--dest", str(tmp_path / "old"), *SMALL])

    def stop(seed, index, *rest):
        if index == 2:
            raise error
        return make_case(seed, index, *rest)

    monkeypatch.setattr(make_phantom, "make_case", stop)
    for dest in ("new", "old"):
        with pytest.raises(expected):
            main(["--dest", str(tmp_path / dest), *SMALL, "--overwrite"])
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert all(find_faults(tmp_path / "old", f"phantom_00{index}") == [] for index in range(3))


@pytest.mark.parametrize("flags", [["--train", "0"], ["--test", "0"], ["--seed", "-1"], ["--shape", "64", "15", "64"]])
def test_bad_numbers_name_their_flag(tmp_path, flags):
    with pytest.raises(InputError, match=flags[0]):
        main(["--dest", str(tmp_path / "p"), *flags])
    assert not (tmp_path / "p").exists()
