"""Reading and writing of scans against geometry worked by hand, and against the libraries' own view of the files."""

import os

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from scans import files as scans
from scans.files import Scan, find_scans, read_scan, reorient, same_grid, write_scan
from utils.errors import InputError

SPACING = (0.5, 0.75, 2.0)
ORIGIN = (10.0, -20.0, 30.0)  # LPS
TURNED = np.array([[0.0, -1.0, 0.0], [0.6, 0.0, -0.8], [0.8, 0.0, 0.6]])  # columns: LPS unit vectors of the axes


def itk_image(array: np.ndarray, direction=TURNED) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection(np.asarray(direction).ravel().tolist())
    return image


def write_dicom(folder, array, series="1.2.3.4", leave_out=()):
    """A DICOM series of int16 slices, as a scanner would export it: positions are a hundredth of a mm off."""
    folder.mkdir(exist_ok=True)
    image, writer = itk_image(array), sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in set(range(array.shape[2])).difference(leave_out):
        part = image[:, :, k]
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.4",  # MR image
            "0008|0018": f"{series}.{k}",
            "0008|0060": "MR",
            "0020|000d": "1.2.3",
            "0020|000e": series,
            "0020|0013": str(k),
            "0020|0032": "\\".join(str(mm + 0.01 * (k == 1)) for mm in image.TransformIndexToPhysicalPoint((0, 0, k))),
            "0020|0037": "\\".join(map(str, [*TURNED[:, 0], *TURNED[:, 1]])),
            "0020|0052": "1.2.3.9",
        }
        for tag, value in tags.items():
            part.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series}_{k}.dcm"))
        writer.Execute(part)


@pytest.fixture
def array() -> np.ndarray:
    return np.random.default_rng(0).integers(-300, 500, (7, 6, 5)).astype(np.int16)


def by_hand(voxel) -> np.ndarray:
    """RAS position of a voxel by ITK's rule, origin + direction @ (spacing x index), which is LPS."""
    left, posterior, superior = np.array(ORIGIN) + TURNED @ (np.array(SPACING) * voxel)
    return np.array([-left, -posterior, superior])


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha", "a.mhd", "A.NRRD"])
def test_every_format_gives_the_same_scan(tmp_path, array, name):
    sitk.WriteImage(itk_image(array), str(tmp_path / name.lower()))
    os.rename(tmp_path / name.lower(), tmp_path / name)
    scan = read_scan(tmp_path / name)
    np.testing.assert_array_equal(scan.array, array)
    for voxel in ((0, 0, 0), (6, 1, 4)):
        np.testing.assert_allclose(nib.affines.apply_affine(scan.affine, voxel), by_hand(voxel), atol=1e-4)
    np.testing.assert_allclose(scan.spacing_mm, SPACING, rtol=1e-5)
    np.testing.assert_allclose(scan.origin_mm, ORIGIN, rtol=1e-5)
    np.testing.assert_allclose(scan.direction, TURNED, atol=1e-5)


def test_dicom_series_gives_the_same_scan(tmp_path, array, capfd):
    write_dicom(tmp_path / "series", array)
    sitk.WriteImage(itk_image(array), str(tmp_path / "a.nrrd"))
    series, nrrd = read_scan(tmp_path / "series"), read_scan(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(series.array, nrrd.array)
    np.testing.assert_allclose(series.affine, nrrd.affine, atol=0.02)
    assert capfd.readouterr() == ("", "")


def test_nifti_of_nibabel_keeps_affine_and_scaling(tmp_path, array):
    affine = np.array([[-0.5, 0.1, 0, 4], [0, 0.75, 0, 5], [0, 0, 2, 6], [0, 0, 0, 1.0]])  # with shear
    image = nib.Nifti1Image(array, affine)
    image.header.set_slope_inter(2.0, -1.0)
    nib.save(image, tmp_path / "a.nii.gz")
    scan = read_scan(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(scan.array, 2.0 * array - 1)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-6)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd"])
def test_fourth_axis_of_one_volume_is_dropped(tmp_path, array, name):
    if name == "a.nrrd":
        sitk.WriteImage(sitk.JoinSeries([itk_image(array)]), str(tmp_path / name))
    else:
        nib.save(nib.Nifti1Image(array[..., None, None], np.eye(4)), tmp_path / name)
    np.testing.assert_array_equal(read_scan(tmp_path / name).array, array)


@pytest.mark.parametrize("turn", [np.eye(3), TURNED], ids=["plain", "turned"])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
def test_written_scans_come_back_and_itk_agrees(tmp_path, array, name, turn):
    affine = np.eye(4)
    affine[:3, :3] = turn * SPACING
    affine[:3, 3] = 3, -4, 5
    path = tmp_path / name
    write_scan(path, array.astype(np.float32), affine)
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.array, array)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-5)
    assert list(tmp_path.iterdir()) == [path]
    position = sitk.ReadImage(str(path)).TransformIndexToPhysicalPoint((6, 1, 4))
    np.testing.assert_allclose(np.array(position) * (-1, -1, 1), (affine @ (6, 1, 4, 1))[:3], atol=1e-4)


def test_masks_are_written_as_bytes(tmp_path, array):
    for name in ("a.nii.gz", "a.nrrd"):
        write_scan(tmp_path / name, array > 0, np.eye(4))
        assert read_scan(tmp_path / name).array.dtype == np.uint8


def test_what_cannot_be_written(tmp_path, array):
    with pytest.raises(InputError, match=r"\.nii\.gz, \.nrrd, \.mha"):
        write_scan(tmp_path / "a.png", array > 0, np.eye(4))
    with pytest.raises(InputError, match="cannot write"):
        write_scan(tmp_path / "no" / "a.nrrd", array > 0, np.eye(4))
    sheared = np.eye(4)
    sheared[0, 1] = 0.3
    with pytest.raises(InputError, match="oblique"):
        write_scan(tmp_path / "a.nrrd", array > 0, sheared)
    assert list(tmp_path.iterdir()) == []


def fault(read, *words):
    """The one-line message of the InputError that `read()` raises; it must contain every word."""
    with pytest.raises(InputError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha"])
def test_damaged_files(tmp_path, array, name, capfd):
    path = tmp_path / name
    sitk.WriteImage(itk_image(array), str(path))
    os.truncate(path, path.stat().st_size - 60)
    fault(lambda: read_scan(path), path, "damaged")
    path.write_text("not a scan")
    fault(lambda: read_scan(path), path, "damaged")


def test_what_is_no_volume(tmp_path, array):
    fault(lambda: read_scan(tmp_path / "a.nrrd"), "no scan", tmp_path / "a.nrrd")
    (tmp_path / "a.txt").write_text("hello")
    fault(lambda: read_scan(tmp_path / "a.txt"), "a.txt", ".nrrd")
    nib.save(nib.Nifti1Image(np.stack([array, array], axis=3), np.eye(4)), tmp_path / "4d.nii")
    fault(lambda: read_scan(tmp_path / "4d.nii"), "4d.nii", "(7, 6, 5, 2)")
    sitk.WriteImage(itk_image(array)[:, :, 0], str(tmp_path / "2d.nrrd"))
    fault(lambda: read_scan(tmp_path / "2d.nrrd"), "2d.nrrd", "(7, 6)")
    sitk.WriteImage(sitk.Compose([itk_image(array)] * 3), str(tmp_path / "rgb.nrrd"))
    fault(lambda: read_scan(tmp_path / "rgb.nrrd"), "rgb.nrrd", "(7, 6, 5, 3)")
    nib.save(nib.Nifti1Image(array.astype(complex), np.eye(4)), tmp_path / "c.nii")
    fault(lambda: read_scan(tmp_path / "c.nii"), "c.nii", "complex")
    flat = nib.Nifti1Image(array, None)
    flat.header.set_sform(np.diag([1.0, 0, 1, 1]), code=1)
    nib.save(flat, tmp_path / "flat.nii")
    fault(lambda: read_scan(tmp_path / "flat.nii"), "flat.nii", "geometry")


def test_dicom_folders_with_faults(tmp_path, array, capfd):
    (tmp_path / "empty").mkdir()
    fault(lambda: read_scan(tmp_path / "empty"), "no DICOM series", tmp_path / "empty")
    write_dicom(tmp_path / "gap", array, leave_out=[2])
    fault(lambda: read_scan(tmp_path / "gap"), "slices", tmp_path / "gap")
    write_dicom(tmp_path / "two", array)
    write_dicom(tmp_path / "two", array, series="1.2.3.5")
    fault(lambda: read_scan(tmp_path / "two"), "2 DICOM series", "1.2.3.4, 1.2.3.5")
    assert capfd.readouterr() == ("", "")


def test_find_scans(tmp_path, array):
    for name in ("b.nii.gz", "a.1.nrrd", "._c.nii", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    write_dicom(tmp_path / "patient", array)
    assert find_scans(tmp_path) == {name: tmp_path / path for name, path in FOUND.items()}
    assert list(find_scans(tmp_path)) == list(FOUND)
    assert find_scans(tmp_path / "patient") == {"patient": tmp_path / "patient"}
    fault(lambda: find_scans(tmp_path / "empty"), "no scan", tmp_path / "empty")
    fault(lambda: find_scans(tmp_path / "nowhere"), "no folder", tmp_path / "nowhere")
    (tmp_path / "b.mha").touch()
    fault(lambda: find_scans(tmp_path), "b.nii.gz", "b.mha", "one case id")


FOUND = {"a.1": "a.1.nrrd", "b": "b.nii.gz", "patient": "patient"}


def test_same_grid_forgives_rounding_only(array):
    affine = np.diag([*SPACING, 1.0])
    scan = Scan(array, affine)
    rounded, turned, moved = affine.copy(), affine.copy(), affine.copy()
    rounded[:3, 3] += 0.01
    turned[:3, 0] += 0.02
    moved[2, 3] += 0.5
    assert same_grid(scan, Scan(array, rounded))
    assert not same_grid(scan, Scan(array, turned))  # 0.02 mm per voxel are 0.12 mm at the far end
    assert not same_grid(scan, Scan(array, moved))
    assert not same_grid(scan, Scan(array[1:], affine))


@pytest.mark.parametrize("code", ["RAS", "LPS", "SAL", "PIR"])
def test_reorienting_keeps_every_voxel_in_its_place(array, code):
    affine = np.eye(4)
    affine[:3, :3] = TURNED * SPACING
    scan = Scan(array, affine)
    turned = reorient(scan, code)
    assert scans.orientation_of(turned.affine) == code
    position = {}
    for one in (scan, turned):
        at = np.argwhere(np.ones(one.array.shape, bool))
        places = nib.affines.apply_affine(one.affine, at).round(6)
        position[one] = {tuple(p): v for p, v in zip(places + 0.0, one.array[tuple(at.T)], strict=True)}
    assert position[scan] == position[turned]
    back = scans.undo_turn(turned.array, scans.turn_to(affine, code))
    np.testing.assert_array_equal(back, array)
