import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from dataloaders import case_files
from dataloaders.case_files import IMAGE_KEY, LABEL_KEY, case_path, find_faults, read_list
from utils.errors import InputError
from utils.labels import ONE_CLASS, LabelClass

CASE = "A1"


def write_case(root, image=None, label=None, case=CASE, **attributes):
    """A case file of small arrays; data sets that are None are left out."""
    path = case_path(root, case)
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in ((IMAGE_KEY, image), (LABEL_KEY, label)):
            if array is not None:
                file.create_dataset(key, data=array, compression="gzip")
        file.attrs.update(attributes)
    return path


@pytest.fixture
def image():
    return np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)


@pytest.fixture
def label(image):
    return (image > 0).astype(np.uint8)


def the_fault(read, *names):
    """The one-line message of the InputError that `read()` raises; it must contain every name."""
    with pytest.raises(InputError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    for name in names:
        assert str(name) in message
    return message


def test_list_keeps_order_and_ignores_blank_lines(tmp_path):
    path = tmp_path / "train.list"
    path.write_bytes(b"\xef\xbb\xbfB2 \r\n\r\n  A1\n\nC3")  # byte-order mark, other line ends, no last line end
    assert read_list(path, "--train_list") == ["B2", "A1", "C3"]


@pytest.mark.parametrize("text, word", [("", "no case"), (" \n\n", "no case"), ("A\nB\nA\n", "A 2 times")])
def test_list_faults_name_file_and_flag(tmp_path, text, word):
    path = tmp_path / "x.list"
    path.write_text(text)
    the_fault(lambda: read_list(path, "--test_list"), path, "--test_list", word)


def test_missing_or_unreadable_list(tmp_path):
    the_fault(lambda: read_list(tmp_path / "no.list", "--train_list"), "no.list does not exist", "--train_list")
    the_fault(lambda: read_list(tmp_path, "--train_list"), tmp_path, "--train_list")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    the_fault(lambda: read_list(tmp_path / "binary", "--train_list"), "binary", "--train_list")


def test_arrays_come_back_in_type_and_value(tmp_path, image, label):
    write_case(tmp_path, image.astype(np.float64), label.astype(np.float32))
    read = case_files.read_image(tmp_path, CASE)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, image)
    read = case_files.read_label(tmp_path, CASE)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, label)
    assert case_files.read_shape(tmp_path, CASE) == (4, 5, 6)
    assert find_faults(tmp_path, CASE) == []


def test_crop_equals_slice_of_whole(tmp_path, image, label):
    write_case(tmp_path, image, label.astype(np.float32))
    crop = case_files.read_crop(tmp_path, CASE, IMAGE_KEY, (1, 0, 2), (3, 5, 2))
    np.testing.assert_array_equal(crop, image[1:4, 0:5, 2:4])
    crop = case_files.read_crop(tmp_path, CASE, LABEL_KEY, (3, 4, 5), (1, 1, 1))
    assert crop.dtype == np.uint8
    assert crop.item() == label[3, 4, 5]


@pytest.mark.parametrize("start, size", [((-1, 0, 0), (2, 2, 2)), ((3, 0, 0), (2, 2, 2)), ((0, 0, 0), (2, 0, 2))])
def test_crop_outside_the_volume_is_a_programming_error(tmp_path, image, start, size):
    write_case(tmp_path, image)
    with pytest.raises(ValueError, match="leaves the volume"):
        case_files.read_crop(tmp_path, CASE, IMAGE_KEY, start, size)


def test_label_of_unlabeled_case_is_not_needed(tmp_path, image):
    write_case(tmp_path, image)
    np.testing.assert_array_equal(case_files.read_image(tmp_path, CASE), image)
    assert not case_files.has_label(tmp_path, CASE)
    assert find_faults(tmp_path, CASE, expect_label=False) == []
    assert len(find_faults(tmp_path, CASE)) == 1


def test_spacing_is_the_challenge_s_unless_stored(tmp_path, image):
    write_case(tmp_path, image)
    assert case_files.read_spacing(tmp_path, CASE) == (0.625, 0.625, 0.625)
    write_case(tmp_path, image, spacing_mm=(1.0, 1.5, 2.0))
    assert case_files.read_spacing(tmp_path, CASE) == (1.0, 1.5, 2.0)


BAD_SPACINGS = [1.0, (1, 1), (1, 0, 1), (1, np.inf, 1), (np.nan,) * 3, (1, 1, 1e-4), (1, 1, 600), "1 x 1"]


@pytest.mark.parametrize("stored", BAD_SPACINGS)
def test_bad_spacing(tmp_path, image, label, stored):
    path = write_case(tmp_path, image, label, spacing_mm=stored)
    message = the_fault(lambda: case_files.read_spacing(tmp_path, CASE), path, "spacing_mm")
    assert find_faults(tmp_path, CASE) == [message]


def test_geometry_is_that_of_a_plain_grid_unless_stored(tmp_path, image):
    write_case(tmp_path, image)
    assert case_files.read_geometry(tmp_path, CASE) == ((0.625,) * 3, (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1))
    turned = (0, -1, 0, 1, 0, 0, 0, 0, 1)
    write_case(tmp_path, image, spacing_mm=(1.0, 1.5, 2.0), origin_mm=(3, -4, 5), direction=turned)
    assert case_files.read_geometry(tmp_path, CASE) == ((1, 1.5, 2), (3, -4, 5), turned)


@pytest.mark.parametrize(
    "key, stored",
    [("origin_mm", (1, 2)), ("origin_mm", (1, 2, np.nan)), ("direction", np.eye(3)), ("direction", [0] * 9)],
)
def test_bad_geometry(tmp_path, image, label, key, stored):
    path = write_case(tmp_path, image, label, **{key: stored})
    message = the_fault(lambda: case_files.read_geometry(tmp_path, CASE), path, key)
    assert find_faults(tmp_path, CASE) == [message]


@pytest.mark.parametrize("labeled", [True, False])
def test_a_written_case_comes_back(tmp_path, image, label, labeled):
    case_files.write_case(tmp_path, CASE, image, label > 0 if labeled else None, {"spacing_mm": (1.0, 2.0, 3.0)})
    np.testing.assert_array_equal(case_files.read_image(tmp_path, CASE), image)
    assert case_files.has_label(tmp_path, CASE) == labeled
    assert case_files.read_spacing(tmp_path, CASE) == (1, 2, 3)
    assert find_faults(tmp_path, CASE, expect_label=labeled) == []
    assert [path.name for path in (tmp_path / CASE).iterdir()] == [case_files.CASE_FILE]


def test_a_written_list_comes_back(tmp_path):
    case_files.write_list(tmp_path / "a.list", ["B2", "A1"])
    assert read_list(tmp_path / "a.list", "") == ["B2", "A1"]
    the_fault(lambda: case_files.write_list(tmp_path / "no" / "a.list", ["B2"]), "cannot write", "--dest")


def test_missing_folder_and_missing_file(tmp_path, image):
    the_fault(lambda: case_files.read_image(tmp_path / "no", CASE), "data folder", tmp_path / "no", "--root_path")
    the_fault(lambda: case_files.read_image(tmp_path, CASE), tmp_path, "data/README.md", "--root_path", "make demo")
    case_files.write_case(tmp_path, "other", image, None, {})
    the_fault(lambda: case_files.read_shape(tmp_path, CASE), case_path(tmp_path, CASE), "--root_path", "list")


@pytest.mark.parametrize("read", [case_files.read_image, case_files.read_shape, case_files.read_spacing])
def test_file_that_is_no_hdf5(tmp_path, image, read):
    path = write_case(tmp_path, image)
    path.write_bytes(b"not a scan")
    the_fault(lambda: read(tmp_path, CASE), path)


def test_truncated_file(tmp_path, image, label):
    path = write_case(tmp_path, image, label)
    os.truncate(path, path.stat().st_size - 100)
    the_fault(lambda: case_files.read_image(tmp_path, CASE), path, "damaged")
    assert len(find_faults(tmp_path, CASE)) == 1  # said once, not once per data set


def test_message_of_the_library_is_cut_to_one_line(tmp_path, image, monkeypatch):
    def fail(*arguments):
        raise OSError("read failed\nat address 0")

    write_case(tmp_path, image)
    monkeypatch.setattr(h5py, "File", fail)
    the_fault(lambda: case_files.read_image(tmp_path, CASE), "read failed")


def test_damaged_voxels(tmp_path):
    noise = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32)
    path = write_case(tmp_path, noise)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2  # within the compressed voxels: the file opens, reading fails
    content[middle : middle + 2000] = bytes(2000)
    path.write_bytes(content)
    assert case_files.read_shape(tmp_path, CASE) == (20, 20, 20)
    the_fault(lambda: case_files.read_image(tmp_path, CASE), path, "damaged")
    the_fault(lambda: case_files.read_crop(tmp_path, CASE, IMAGE_KEY, (0, 0, 0), (20, 20, 20)), path, "damaged")


def test_missing_key_names_what_is_there(tmp_path, image, label):
    path = write_case(tmp_path, image)
    the_fault(
        lambda: case_files.read_label(tmp_path, CASE),
        path,
        "'label'",
        "image",
        "(--train_list and --labelnum, --test_list)",
    )
    write_case(tmp_path, None, label)
    the_fault(lambda: case_files.read_image(tmp_path, CASE), path, "'image'", "label")
    with h5py.File(path, "w") as file:
        file.create_group(IMAGE_KEY)
    the_fault(lambda: case_files.read_image(tmp_path, CASE), path, "'image'")


@pytest.mark.parametrize("array", [np.zeros((4, 4)), np.zeros((1, 4, 4, 4)), np.zeros((4, 0, 4))])
def test_not_a_volume(tmp_path, array):
    path = write_case(tmp_path, array)
    the_fault(lambda: case_files.read_image(tmp_path, CASE), path, "'image'", array.shape)
    the_fault(lambda: case_files.read_shape(tmp_path, CASE), path, "'image'")


def test_type_must_be_a_real_number(tmp_path):
    path = write_case(tmp_path, np.zeros((2, 2, 2), complex))
    the_fault(lambda: case_files.read_image(tmp_path, CASE), path, "complex")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_image_must_be_finite(tmp_path, image, value):
    image = image.astype(np.float64)
    image[1, 2, 3] = value
    path = write_case(tmp_path, image)
    the_fault(lambda: case_files.read_image(tmp_path, CASE), path, "'image'", "finite")


def test_a_type_that_numpy_does_not_know(tmp_path, image):
    write_case(tmp_path, image)
    strange = h5py.h5t.IEEE_F32LE.copy()
    strange.set_ebias(2**20)  # of the exponent
    with h5py.File(case_path(tmp_path, CASE), "w") as file:
        h5py.h5d.create(file.id, b"image", strange, h5py.h5s.create_simple(image.shape))
    the_fault(lambda: case_files.read_image(tmp_path, CASE), CASE, "damaged")


def test_image_must_not_be_constant(tmp_path, image):
    """A virtual data set whose file is missing, and chunks that were never written, read as zeros."""
    write_case(tmp_path, np.zeros_like(image))
    the_fault(lambda: case_files.read_image(tmp_path, CASE), CASE, "0 everywhere")
    layout = h5py.VirtualLayout(image.shape, image.dtype)
    layout[...] = h5py.VirtualSource("nowhere.h5", "image", image.shape)
    with h5py.File(case_path(tmp_path, CASE), "w") as file:
        file.create_virtual_dataset("image", layout)
    the_fault(lambda: case_files.read_image(tmp_path, CASE), CASE, "0 everywhere")


def test_a_volume_that_memory_cannot_hold(tmp_path, image):
    write_case(tmp_path, image)
    with h5py.File(case_path(tmp_path, CASE), "w") as file:
        file.create_dataset("image", (10**5,) * 3, np.float32, chunks=(64, 64, 64))
    the_fault(lambda: case_files.read_image(tmp_path, CASE), CASE, "memory")


@pytest.mark.parametrize("value", [255, -1, 0.5, np.nan])
def test_label_must_be_zero_or_one(tmp_path, image, label, value):
    label = label.astype(np.float32)
    label[0, 0, 0] = value
    path = write_case(tmp_path, image, label)
    the_fault(lambda: case_files.read_label(tmp_path, CASE), path, "'label'", "0 and 1", value)
    np.testing.assert_array_equal(case_files.read_image(tmp_path, CASE), image)  # a label is read only when asked for


def test_label_values_that_are_nearly_whole(tmp_path, image, label):
    write_case(tmp_path, image, label * np.float32(0.9999999))
    np.testing.assert_array_equal(case_files.read_label(tmp_path, CASE), label)
    crop = case_files.read_crop(tmp_path, CASE, "label", (0, 0, 0), label.shape)
    np.testing.assert_array_equal(crop, label)
    assert find_faults(tmp_path, CASE) == []


@pytest.mark.parametrize("fill", [0, 1])
def test_empty_and_full_labels_are_valid(tmp_path, image, fill):
    write_case(tmp_path, image, np.full(image.shape, fill, bool))
    assert case_files.read_label(tmp_path, CASE).sum() == fill * image.size


def test_image_and_label_of_different_shape(tmp_path, image, label):
    path = write_case(tmp_path, image, label[:, :, 1:])
    the_fault(lambda: case_files.read_label(tmp_path, CASE), path, "(4, 5, 5)", "(4, 5, 6)")


def test_find_faults_returns_all_of_them(tmp_path, image, label):
    image[0, 0, 0] = np.nan
    write_case(tmp_path, image, 255 * label[1:], spacing_mm=(1.0, 1.0, -1.0))
    faults = find_faults(tmp_path, CASE, expect_label=False)  # a label that is there is checked all the same
    words = ["NaN", "shape", "0 and 1", "spacing_mm"]
    assert len(faults) == len(words)
    assert all(word in fault for word, fault in zip(words, faults, strict=True))


@pytest.mark.parametrize("case", ["./A1", "/data/A1", "up/A1", "..", ".A1", "up\\A1"])
def test_an_id_is_a_name(tmp_path, case):
    (tmp_path / "train.list").write_text(f"{case}\n")
    the_fault(lambda: read_list(tmp_path / "train.list", "--train_list"), case, "--train_list")


@pytest.mark.parametrize("case", ["A1", "M\xfcller", "a b", "a,b"])
def test_names_that_are_ids(case):
    assert case_files.is_name(case)


@pytest.mark.parametrize("case", ["", "a\nb", " a", "a\0", "lat\udce9in"])  # the last: bytes that are not UTF-8
def test_names_that_no_list_can_hold(case):
    assert not case_files.is_name(case)


def test_same_scans(tmp_path, image, label):
    for case, voxels in (("a", image), ("b", image + 1), ("c", image), ("d", image[1:]), ("g", 5 * image)):
        case_files.write_case(tmp_path, case, voxels, None, {})
    for case, factor in (("e", 5), ("f", 6)):  # prepared in two ways from one scan
        case_files.write_case(tmp_path, case, factor * image, None, {case_files.VOXELS_KEY: "digest"})
    image[0, 0, 0] += 1  # not in the middle slice
    case_files.write_case(tmp_path, "h", image, None, {})
    found = case_files.same_scans(tmp_path, list("abcdefgh") + ["missing"])
    assert sorted(found) == [("a", "c"), ("e", "f"), ("e", "g")]


def test_a_locked_file_is_not_damaged(tmp_path, image, label):
    path = write_case(tmp_path, image, label)
    code = f"import h5py; f = h5py.File({str(path)!r}, 'r+'); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as writer:
        writer.stdout.readline()
        the_fault(lambda: case_files.read_image(tmp_path, CASE), path, "HDF5_USE_FILE_LOCKING")


def test_files_of_another_layout_are_named(tmp_path, image, label):
    path = write_case(tmp_path, image, label)
    other = path.rename(path.with_name("mri_norm.h5"))
    the_fault(lambda: case_files.read_image(tmp_path, CASE), path, other)
    slices = path.parent.with_name(f"{CASE}_slice_1.h5")
    other.rename(slices)
    the_fault(lambda: case_files.read_image(tmp_path, CASE), path, slices)


def test_an_accent_in_other_characters_is_named(tmp_path, image, label):
    case_files.write_case(tmp_path, "M\xfcller", image, label, {})
    the_fault(lambda: case_files.read_image(tmp_path, "Mu\u0308ller"), tmp_path / "M\xfcller")


def test_an_unknown_filter_is_not_damage(tmp_path, image):
    path = write_case(tmp_path, image)
    with h5py.File(path, "w") as file:  # as blosc and others write that hdf5plugin brings
        data = file.create_dataset("image", image.shape, "f4", chunks=image.shape, compression="gzip")
        data.id.write_direct_chunk((0, 0, 0), b"compressed")
    content = path.read_bytes()
    gzip, other = b"\x01\x00\x08\x00\x01\x00\x01\x00deflate\x00", b"\x01\x7d\x08\x00\x01\x00\x01\x00deflate\x00"
    assert content.count(gzip) == 1
    path.write_bytes(content.replace(gzip, other))
    message = the_fault(lambda: case_files.read_image(tmp_path, CASE), path, "filter deflate (32001)")
    assert "damaged" not in message


def test_a_file_without_the_right_to_read_is_not_damaged(tmp_path, image, monkeypatch):
    path = write_case(tmp_path, image)
    monkeypatch.setattr(
        case_files.h5py, "File", lambda *args: (_ for _ in ()).throw(PermissionError(13, "h5py's words"))
    )
    message = the_fault(lambda: case_files.read_image(tmp_path, CASE), path, os.strerror(13))
    assert "damaged" not in message


TWO = [LabelClass("anterior", (1,)), LabelClass("posterior", (2, 7))]


def test_a_case_records_its_classes(tmp_path, image, label):
    write_case(tmp_path, image, label)
    assert case_files.read_classes(tmp_path, CASE) == ONE_CLASS
    case_files.write_case(tmp_path, CASE, image, 2 * label, case_files.class_attributes(TWO))
    assert list(case_files.read_classes(tmp_path, CASE)) == TWO
    assert find_faults(tmp_path, CASE) == []


BAD_CLASSES = [("[]", "[]"), ('["a"]', "[[1], [2]]"), ("a", "[[1]]"), ('["a"]', "[1]"), ("3", "[[1]]"), ('["a"]', None)]


@pytest.mark.parametrize("names, values", BAD_CLASSES)
def test_bad_classes(tmp_path, image, label, names, values):
    attributes = {"class_names": names} | ({} if values is None else {"class_values": values})
    path = write_case(tmp_path, image, label, **attributes)
    message = the_fault(lambda: case_files.read_classes(tmp_path, CASE), path, "class_names", "class_values")
    assert find_faults(tmp_path, CASE) == [message]


def test_label_values_up_to_the_number_of_classes(tmp_path, image, label):
    path = write_case(tmp_path, image, 3.0 * label)
    read = case_files.read_label(tmp_path, CASE, num_classes=3)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, 3 * label)
    for fewer in (1, 2):
        the_fault(lambda fewer=fewer: case_files.read_label(tmp_path, CASE, fewer), path, "label", "--num_classes 3")
    assert len(find_faults(tmp_path, CASE)) == 1 and not find_faults(tmp_path, CASE, num_classes=3)


@pytest.mark.parametrize("value", [-1, 0.5, 300, np.nan])
def test_no_number_of_classes_helps_against_a_value_that_is_no_class(tmp_path, image, label, value):
    write_case(tmp_path, image, value * label.astype(float))
    assert "--num_classes" not in the_fault(lambda: case_files.read_label(tmp_path, CASE, num_classes=2))
