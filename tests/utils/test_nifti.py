"""NIfTI files against geometry worked by hand, and against nibabel's reading of the file."""

import errno
import os

import nibabel as nib
import numpy as np
import pytest

from utils.errors import InputError
from utils.nifti import affine_ras, write_nifti

SPACING = (0.5, 0.75, 2.0)
ORIGIN = (10.0, -20.0, 30.0)  # LPS
TURNED = np.array([[0.0, -1.0, 0.0], [0.6, 0.0, -0.8], [0.8, 0.0, 0.6]])  # columns: LPS unit vectors of the axes


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((5, 4, 3), dtype=np.uint8)
    mask[4, 1, 2] = 1
    return mask


def test_default_axes_run_left_posterior_superior(tmp_path, mask):
    write_nifti(tmp_path / "a.nii.gz", mask, SPACING)
    image = nib.load(tmp_path / "a.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    assert image.header.get_zooms() == SPACING
    # Voxel (4, 1, 2) by hand: 4 x 0.5 mm to the left: R = -2; 0.75 mm back: A = -0.75; 2 x 2 mm up: S = 4.
    voxel = np.argwhere(np.asarray(image.dataobj))[0]
    np.testing.assert_allclose(nib.affines.apply_affine(image.affine, voxel), (-2.0, -0.75, 4.0))


def test_origin_and_turned_axes_are_converted_from_lps(tmp_path, mask):
    write_nifti(tmp_path / "a.nii.gz", mask, SPACING, ORIGIN, TURNED)
    affine = nib.load(tmp_path / "a.nii.gz").affine
    for voxel in ((0, 0, 0), (4, 1, 2)):  # ITK's rule: origin + direction @ (spacing x index), in LPS
        left, posterior, superior = np.array(ORIGIN) + TURNED @ (np.array(SPACING) * voxel)
        np.testing.assert_allclose(nib.affines.apply_affine(affine, voxel), (-left, -posterior, superior), atol=1e-5)


def test_nine_numbers_are_read_row_by_row():
    np.testing.assert_array_equal(
        affine_ras(SPACING, ORIGIN, TURNED.ravel().tolist()), affine_ras(SPACING, ORIGIN, TURNED)
    )


@pytest.mark.parametrize("direction", [None, TURNED, TURNED @ np.diag([1, 1, -1])], ids=["plain", "turned", "mirror"])
def test_qform_sform_and_units_agree(tmp_path, mask, direction):
    write_nifti(tmp_path / "a.nii.gz", mask, SPACING, ORIGIN, direction)
    header = nib.load(tmp_path / "a.nii.gz").header
    sform, sform_code = header.get_sform(coded=True)
    qform, qform_code = header.get_qform(coded=True)
    assert (int(sform_code), int(qform_code)) == (1, 1)
    np.testing.assert_allclose(qform, sform, atol=1e-5)
    assert header.get_xyzt_units()[0] == "mm"


def test_tilted_gantry_keeps_its_shear_in_sform(tmp_path, mask):
    tilted = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.28], [0.0, 0.0, 0.96]])
    write_nifti(tmp_path / "a.nii.gz", mask, SPACING, direction=tilted)
    header = nib.load(tmp_path / "a.nii.gz").header
    np.testing.assert_allclose(header.get_sform(), affine_ras(SPACING, direction=tilted), atol=1e-6)


@pytest.mark.parametrize(
    ("array", "stored"),
    [
        (np.ones((2, 3, 4), bool), np.uint8),
        (np.full((2, 3, 4), 255, np.int64), np.uint8),
        (np.linspace(0, 1, 24).reshape(2, 3, 4), np.float32),
        (np.zeros((1, 1, 1), np.float16), np.float32),
    ],
    ids=["bool", "int64", "float64", "one voxel of float16"],
)
def test_type_and_values_on_disk(tmp_path, array, stored):
    write_nifti(tmp_path / "a.nii.gz", array, SPACING)
    image = nib.load(tmp_path / "a.nii.gz")
    assert image.get_data_dtype() == stored
    np.testing.assert_array_equal(np.asarray(image.dataobj), array.astype(stored))  # no slope, no intercept


def test_fortran_order_is_no_trap(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_nifti(tmp_path / "c.nii.gz", array, SPACING)
    write_nifti(tmp_path / "f.nii.gz", np.asfortranarray(array), SPACING)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "f.nii.gz").dataobj), array)
    assert (tmp_path / "c.nii.gz").read_bytes() == (tmp_path / "f.nii.gz").read_bytes()


def test_equal_input_gives_equal_bytes(tmp_path, mask, monkeypatch):
    write_nifti(tmp_path / "a.nii.gz", mask, SPACING)
    monkeypatch.setattr("time.time", lambda: 1e9)  # gzip would store it
    write_nifti(tmp_path / "b.nii.gz", mask, SPACING)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_full_disk_keeps_the_old_file_and_leaves_nothing_else(tmp_path, mask, monkeypatch, broken):
    path = tmp_path / "a.nii.gz"
    write_nifti(path, mask, SPACING)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(InputError, match=r"a\.nii\.gz"):
        write_nifti(path, 1 - mask, SPACING)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.nii.gz"]


@pytest.mark.parametrize(
    ("name", "array", "spacing", "origin", "direction"),
    [
        ("a.nii", np.zeros((2, 2, 2), bool), SPACING, ORIGIN, None),
        ("a.nii.gz", np.zeros((1, 2, 2, 2), bool), SPACING, ORIGIN, None),
        ("a.nii.gz", np.full((2, 2, 2), 65536), SPACING, ORIGIN, None),
        ("a.nii.gz", np.full((2, 2, 2), -1), SPACING, ORIGIN, None),
        ("a.nii.gz", np.zeros((2, 2, 2), bool), (1, 1, 0), ORIGIN, None),
        ("a.nii.gz", np.zeros((2, 2, 2), bool), (1, 1, np.nan), ORIGIN, None),
        ("a.nii.gz", np.zeros((2, 2, 2), bool), (1, 1), ORIGIN, None),
        ("a.nii.gz", np.zeros((2, 2, 2), bool), (0.625,), ORIGIN, None),
        ("a.nii.gz", np.zeros((2, 2, 2), bool), SPACING, (0, 0, np.inf), None),
        ("a.nii.gz", np.zeros((2, 2, 2), bool), SPACING, ORIGIN, 2 * np.eye(3)),
        ("a.nii.gz", np.zeros((2, 2, 2), bool), SPACING, ORIGIN, np.eye(3)[:, [0, 1, 1]]),
    ],
)
def test_wrong_arguments_raise_and_write_nothing(tmp_path, name, array, spacing, origin, direction):
    with pytest.raises(ValueError):
        write_nifti(tmp_path / name, array, spacing, origin, direction)
    assert not list(tmp_path.iterdir())
