"""Reading and writing of scans against geometry worked by hand, and against the libraries' own view of the files."""

import gzip
import os
import re
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from scans import files as scans
from scans import formats
from scans.files import (
    Scan,
    find_scans,
    grid_distance,
    on_grid_of,
    orientation_of,
    read_scan,
    reorient,
    write_scan,
)
from scans.formats import files_of
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


@pytest.mark.parametrize("name", "a.nii.gz a.nii a.nrrd a.mha a.mhd a.nhdr A.NRRD A.MHA A.NII".split())
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
    for name in ("a.nrrd", "a.nii.gz"):
        with pytest.raises(InputError, match="cannot write.*--output"):
            write_scan(tmp_path / "no" / name, array > 0, np.eye(4))
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


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd"])
def test_a_file_without_the_right_to_read_is_not_damaged(tmp_path, array, name, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, os.strerror(13))

    sitk.WriteImage(itk_image(array), str(tmp_path / name))
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(InputError) as caught:
        read_scan(tmp_path / name)
    assert os.strerror(13) in str(caught.value) and "damaged" not in str(caught.value)


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
    sitk.WriteImage(sitk.RealAndImaginaryToComplex(*[sitk.Cast(itk_image(array), 8)] * 2), str(tmp_path / "c.nrrd"))
    fault(lambda: read_scan(tmp_path / "c.nrrd"), "c.nrrd", "complex")
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
    (tmp_path / "empty" / "slice_1.h5").touch()
    fault(lambda: find_scans(tmp_path / "empty"), tmp_path / "empty" / "slice_1.h5", "mri_norm2.h5", "--root_path")
    fault(lambda: find_scans(tmp_path / "nowhere"), "no folder", tmp_path / "nowhere")
    (tmp_path / "b.mha").touch()
    fault(lambda: find_scans(tmp_path), "b.nii.gz", "b.mha", "one case id")
    (tmp_path / "b.mha").rename(tmp_path / "c.mgz")
    fault(lambda: find_scans(tmp_path), tmp_path / "c.mgz")  # a patient that would be left out


def test_accents_are_one_character_in_an_id(tmp_path):
    for name in ("Mu\u0308ller.nii", "M\xfcller.nrrd"):
        (tmp_path / name).touch()
        assert find_scans(tmp_path) == {"M\xfcller": tmp_path / name}
        (tmp_path / name).rename(tmp_path.with_name("away"))


@pytest.mark.parametrize("name", ["a.nii", "a.nrrd"])
def test_itk_is_not_asked_for_names_in_other_encodings(tmp_path, array, name, monkeypatch):
    """Its Python bindings would end the process."""
    sitk.WriteImage(itk_image(array), str(tmp_path / name))
    path = (tmp_path / name).rename(tmp_path / f"lat\udce9in{name}")
    monkeypatch.setattr(sitk.ImageFileReader, "SetFileName", lambda *arguments: pytest.fail("the process ends"))
    if name == "a.nii":
        np.testing.assert_array_equal(read_scan(path).array, array)
    else:
        fault(lambda: read_scan(path), path)


FOUND = {"a.1": "a.1.nrrd", "b": "b.nii.gz", "patient": "patient"}


def test_grids_are_compared_in_voxels(array):
    affine = np.diag([*SPACING, 1.0])
    scan = Scan(array, affine)
    turned, moved = affine.copy(), affine.copy()
    turned[:3, 0] += 0.02
    moved[2, 3] += 0.5
    assert grid_distance(scan, Scan(array, affine)) == 0
    assert grid_distance(scan, Scan(array, moved)) == pytest.approx(1.0)  # of the smallest voxel, 0.5 mm
    assert grid_distance(scan, Scan(array, turned)) == pytest.approx(0.02 * 6 * 3**0.5 / 0.5)  # at the far end
    assert grid_distance(scan, Scan(array[1:], affine)) == np.inf


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


# --- NIfTI headers


def corners_by_itk(path) -> np.ndarray:
    image = sitk.ReadImage(str(path))
    return np.array([image.TransformIndexToPhysicalPoint(voxel) for voxel in ((0, 0, 0), (6, 0, 0), (6, 5, 4))])


def nifti(array, affine, moved=0.0, codes=(1, 2), unit="mm") -> nib.Nifti1Image:
    """A header whose sform lies `moved` mm from its qform."""
    image = nib.Nifti1Image(array, affine)
    other = affine.copy()
    other[0, 3] += moved
    image.set_qform(affine, 1)
    image.set_sform(other, 2)
    image.header["qform_code"], image.header["sform_code"] = codes
    image.header.set_xyzt_units(unit)
    return nib.Nifti1Image(array, None, image.header)  # nibabel would put codes for an affine


@pytest.mark.parametrize("codes", [(1, 2), (0, 0), (1, 0), (0, 2)])
def test_a_mask_states_its_place_in_the_words_of_its_scan(tmp_path, array, codes):
    nib.save(nifti(array, np.diag([*SPACING, 1.0]), moved=10, codes=codes), tmp_path / "a.nii.gz")
    scan = read_scan(tmp_path / "a.nii.gz")
    write_scan(tmp_path / "m.nii.gz", scan.array > 0, scan.affine, scan.header)
    np.testing.assert_allclose(corners_by_itk(tmp_path / "m.nii.gz"), corners_by_itk(tmp_path / "a.nii.gz"))
    one, other = (nib.load(tmp_path / name).header for name in ("a.nii.gz", "m.nii.gz"))
    for field in ("qform_code", "sform_code", "pixdim", "xyzt_units", "srow_x", "quatern_b", "qoffset_x"):
        np.testing.assert_array_equal(one[field], other[field])


@pytest.mark.parametrize("quaternion", [9.0, np.nan])
def test_a_broken_qform_beside_a_valid_sform(tmp_path, array, quaternion):
    image = nib.Nifti1Image(array, np.diag([*SPACING, 1.0]))
    content = bytearray(image.to_bytes())
    content[256:260] = np.float32(quaternion).tobytes()  # quatern_b
    (tmp_path / "a.nii").write_bytes(content)
    np.testing.assert_allclose(read_scan(tmp_path / "a.nii").spacing_mm, SPACING)


@pytest.mark.parametrize("unit, mm", [("meter", 1e3), ("micron", 1e-3), ("mm", 1)])
def test_units_are_converted(tmp_path, array, unit, mm):
    nib.save(nifti(array, np.diag([*np.array(SPACING) / mm, 1.0]), unit=unit), tmp_path / "a.nii")
    np.testing.assert_allclose(read_scan(tmp_path / "a.nii").spacing_mm, SPACING, rtol=1e-5)


def with_line(path, array, line, before):
    """An ITK file with a further line in its header."""
    sitk.WriteImage(itk_image(array), str(path))
    path.write_bytes(path.read_bytes().replace(before, line.encode() + b"\n" + before, 1))


@pytest.mark.parametrize(
    "name, line, mm",
    [
        ("a.nrrd", 'space units: "cm" "cm" "cm"', 10),
        ("a.nrrd", 'space units: "millimetres" "" "mm"', 1),
        ("a.mha", "DistanceUnits = cm", 10),
        ("a.mha", "DistanceUnits = mm", 1),
    ],
)
def test_units_of_nrrd_and_metaimage_are_converted(tmp_path, array, name, line, mm):
    with_line(tmp_path / name, array, line, b"sizes:" if name == "a.nrrd" else b"DimSize")
    np.testing.assert_allclose(read_scan(tmp_path / name).spacing_mm, np.array(SPACING) * mm, rtol=1e-5)


@pytest.mark.parametrize("units", ['"mm" "mm" "cm"', '"in" "in" "in"', '"mm" "mm" "pixel"'])
def test_units_that_cannot_be_converted(tmp_path, array, units):
    with_line(tmp_path / "a.nrrd", array, f"space units: {units}", b"sizes:")
    fault(lambda: read_scan(tmp_path / "a.nrrd"), tmp_path / "a.nrrd", units.split()[-1].strip('"'))


def test_an_unknown_unit_number_of_nifti(tmp_path, array):
    image = nib.Nifti1Image(array, np.eye(4))
    image.header["xyzt_units"] = 5
    nib.save(image, tmp_path / "a.nii")
    fault(lambda: read_scan(tmp_path / "a.nii"), tmp_path / "a.nii", "5", " mm")


@pytest.mark.parametrize("mm", [1e-4, 1e3])
def test_voxels_of_no_patient(tmp_path, array, mm):
    nib.save(nib.Nifti1Image(array, np.diag([1, 1, mm, 1.0])), tmp_path / "a.nii")
    fault(lambda: read_scan(tmp_path / "a.nii"), tmp_path / "a.nii")


def test_the_content_decides_whether_nifti_is_compressed(tmp_path, array):
    content = nib.Nifti1Image(array, np.eye(4)).to_bytes()
    (tmp_path / "a.nii").write_bytes(gzip.compress(content))
    (tmp_path / "a.nii.gz").write_bytes(content)
    for name in ("a.nii", "a.nii.gz"):
        np.testing.assert_array_equal(read_scan(tmp_path / name).array, array)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
def test_a_flipped_bit_in_a_compressed_file(tmp_path, array, name):
    sitk.WriteImage(itk_image(array), str(tmp_path / name), useCompression=True)
    content = bytearray((tmp_path / name).read_bytes())
    content[-6 if name != "a.mha" else -2] ^= 1  # within the checksum
    (tmp_path / name).write_bytes(content)
    fault(lambda: read_scan(tmp_path / name), tmp_path / name)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd"])
def test_a_compressed_file_without_the_end_of_its_checksum(tmp_path, array, name):
    sitk.WriteImage(itk_image(array), str(tmp_path / name), useCompression=True)
    os.truncate(tmp_path / name, (tmp_path / name).stat().st_size - 2)
    fault(lambda: read_scan(tmp_path / name), tmp_path / name, "damaged")


@pytest.mark.parametrize("place", ["middle", "checksum"])
@pytest.mark.parametrize("name, voxels", [("a.mhd", "a.zraw"), ("a.nhdr", "a.raw.gz")])
def test_a_flipped_bit_in_a_detached_compressed_file(tmp_path, array, name, voxels, place, capfd):
    sitk.WriteImage(itk_image(array), str(tmp_path / name), useCompression=True)
    content = bytearray((tmp_path / voxels).read_bytes())
    content[len(content) // 2 if place == "middle" else -2] ^= 1
    (tmp_path / voxels).write_bytes(content)
    fault(lambda: read_scan(tmp_path / name), tmp_path / name)


@pytest.mark.parametrize("stated", [b"", b"CompressedDataSize = 10\n"])
def test_the_length_of_compressed_voxels(tmp_path, array, stated, capfd):
    """ITK reads other bytes without a word where this line of the header is missing or wrong."""
    for name in ("a.mha", "a.mhd"):
        sitk.WriteImage(itk_image(array), str(tmp_path / name), useCompression=True)
        content = re.sub(rb"CompressedDataSize.*\n", stated, (tmp_path / name).read_bytes())
        (tmp_path / name).write_bytes(content)
    fault(lambda: read_scan(tmp_path / "a.mha"), tmp_path / "a.mha", "damaged")
    if stated:
        fault(lambda: read_scan(tmp_path / "a.mhd"), tmp_path / "a.mhd", "damaged")
    else:
        np.testing.assert_array_equal(read_scan(tmp_path / "a.mhd").array, array)


def write_list(folder, array, count):
    """A MetaImage whose slices are files."""
    sitk.WriteImage(itk_image(array), str(folder / "a.mhd"))
    header = (folder / "a.mhd").read_text().replace("= a.raw", "= LIST")
    (folder / "a.mhd").write_text(header + "".join(f"s{k}.raw\n" for k in range(count)))
    for k in range(array.shape[2]):
        (folder / f"s{k}.raw").write_bytes(array[..., k].tobytes(order="F"))


def resized(path, change):
    content = path.read_bytes()
    path.write_bytes(content + bytes(range(change)) if change > 0 else content[:change])


@pytest.mark.parametrize("change", [-2, 2])
@pytest.mark.parametrize(
    "name, voxels", [("a.nii", "a.nii"), ("a.mhd", "a.raw"), ("a.nhdr", "a.raw"), ("a.mha", "a.mha")]
)
def test_a_file_has_the_length_that_its_header_states(tmp_path, array, name, voxels, change, capfd):
    sitk.WriteImage(itk_image(array), str(tmp_path / name))
    resized(tmp_path / voxels, change)
    fault(lambda: read_scan(tmp_path / name), tmp_path / name, array.nbytes + 352 * (name == "a.nii"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["a.nii", "a.mha", "a.nrrd"])
def test_a_header_that_states_terabytes_is_damaged(tmp_path, array, name):
    sitk.WriteImage(itk_image(array), str(tmp_path / name))
    content = bytearray((tmp_path / name).read_bytes())
    if name == "a.nii":
        content[42:48] = np.array([32767] * 3, "<i2").tobytes()
    else:
        content = content.replace(b"7 6 5", b"99999 99999 99999")
    (tmp_path / name).write_bytes(content)
    fault(lambda: read_scan(tmp_path / name), tmp_path / name, "damaged")


def test_every_slice_of_a_list_must_be_there(tmp_path, array):
    write_list(tmp_path, array, 5)
    np.testing.assert_array_equal(read_scan(tmp_path / "a.mhd").array, array)
    (tmp_path / "s2.raw").unlink()
    fault(lambda: read_scan(tmp_path / "a.mhd"), tmp_path / "s2.raw", "missing")
    write_list(tmp_path, array, 4)  # ITK leaves the last slice as the memory was
    fault(lambda: read_scan(tmp_path / "a.mhd"), tmp_path / "a.mhd", "damaged")


@pytest.mark.parametrize("codes", [(0, 0), (1, 0)])
@pytest.mark.parametrize("size", [0, -1.5, np.nan])
def test_a_voxel_size_is_not_made_up_in_nifti(tmp_path, array, codes, size, caplog):
    image = nifti(array, np.diag([*SPACING, 1.0]), codes=codes)
    content = bytearray(image.to_bytes())
    content[80:84] = np.float32(size).tobytes()  # pixdim[1]
    (tmp_path / "a.nii").write_bytes(content)
    fault(lambda: read_scan(tmp_path / "a.nii"), tmp_path / "a.nii", "size of its voxels")
    assert not caplog.records  # of nibabel


@pytest.mark.parametrize(
    "name, stated",
    [
        ("a.nrrd", b"spacings: nan 1 2\n"),
        ("a.nrrd", b"space directions: none (0,1,0) (0,0,2)\n"),
        ("a.nrrd", b""),
        ("a.mha", b""),
    ],
)
def test_a_voxel_size_is_not_made_up_elsewhere(tmp_path, array, name, stated):
    sitk.WriteImage(itk_image(array), str(tmp_path / name))
    content = (tmp_path / name).read_bytes()
    line = rb"space directions:.*\n" if name == "a.nrrd" else rb"ElementSpacing.*\n"
    content = re.sub(rb"space:.*\n|space origin:.*\n", b"", content) if stated.startswith(b"spacings") else content
    (tmp_path / name).write_bytes(re.sub(line, stated, content))
    fault(lambda: read_scan(tmp_path / name), tmp_path / name)


def test_voxels_within_the_header_of_nifti(tmp_path, array):
    content = bytearray(nib.Nifti1Image(array, np.eye(4)).to_bytes())
    content[108:112] = np.float32(0).tobytes()  # vox_offset: nibabel reads from 0, ITK from 348
    content[-352:] = bytes(352)  # so that the length is no clue
    (tmp_path / "a.nii").write_bytes(content)
    fault(lambda: read_scan(tmp_path / "a.nii"), tmp_path / "a.nii")


def test_zeros_may_pad_nifti(tmp_path, array):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(nib.Nifti1Image(array, np.eye(4)).to_bytes() + bytes(100)))
    np.testing.assert_array_equal(read_scan(tmp_path / "a.nii.gz").array, array)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
def test_a_stream_that_unpacks_to_more_than_its_header_states(tmp_path, array, name):
    sitk.WriteImage(itk_image(array), str(tmp_path / name), useCompression=True)
    content, zeros = (tmp_path / name).read_bytes(), bytes(3 << 20)
    if name == "a.nii.gz":
        content = gzip.compress(gzip.decompress(content) + b"\1" + zeros)
    else:
        pack, mark = (gzip.compress, b"\n\n") if name == "a.nrrd" else (zlib.compress, b"LOCAL\n")
        packed = pack(array.tobytes(order="F") + zeros)
        content = content[: content.index(mark) + len(mark)] + packed
        content = re.sub(rb"DataSize = \d+", b"DataSize = %d" % len(packed), content)
    (tmp_path / name).write_bytes(content)
    fault(lambda: read_scan(tmp_path / name), tmp_path / name, "damaged")


def test_what_memory_cannot_hold_is_not_unpacked(tmp_path, array, monkeypatch):
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii.gz")
    monkeypatch.setattr(formats, "available_memory", lambda: array.nbytes)
    with pytest.raises(MemoryError):
        read_scan(tmp_path / "a.nii.gz")


def test_memory_that_itk_cannot_get_is_no_damage(tmp_path, array, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("Exception thrown in ITK\nFailed to allocate memory for image.")

    sitk.WriteImage(itk_image(array), str(tmp_path / "a.nrrd"))
    monkeypatch.setattr(sitk.ImageFileReader, "Execute", fail)
    with pytest.raises(MemoryError):
        read_scan(tmp_path / "a.nrrd")


@pytest.mark.parametrize("kind", [">i2", "<u4", "<f8"])
@pytest.mark.parametrize("make", [nib.Nifti1Header, nib.Nifti2Header])
def test_any_byte_order_type_and_version_of_nifti(tmp_path, array, kind, make):
    header = make(endianness=kind[0])
    header.set_data_dtype(np.dtype(kind))
    header.set_data_shape(array.shape)
    header.set_sform(np.diag([*SPACING, 1.0]), 1)
    header["vox_offset"], header["magic"] = header.single_vox_offset, header.single_magic
    values = np.abs(array).astype(kind)
    filled = header.binaryblock.ljust(header.single_vox_offset, b"\0") + values.tobytes(order="F")
    (tmp_path / "a.nii").write_bytes(filled)
    np.testing.assert_array_equal(read_scan(tmp_path / "a.nii").array, values)
    write_scan(tmp_path / "m.nii.gz", array > 0, np.eye(4), read_scan(tmp_path / "a.nii").header)
    np.testing.assert_allclose(read_scan(tmp_path / "m.nii.gz").spacing_mm, SPACING, rtol=1e-6)


# --- labels on the grid of their scan


def label_over(scan_file, array, path):
    """A label as ITK-SNAP, 3D Slicer and SimpleITK write it: on the grid that ITK reads."""
    label = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    label.CopyInformation(sitk.ReadImage(str(scan_file)))
    sitk.WriteImage(label, str(path))


@pytest.mark.parametrize("kind", ["sheared", "sform", "codes"])
def test_labels_of_itk_fit_in_one_reading_of_the_header(tmp_path, array, kind):
    affine = np.diag([-1.0, -1, 2, 1])
    affine[0, 1] = 0.03 * (kind == "sheared")
    image = nifti(array, affine, 10 * (kind == "sform"), (0, 0) if kind == "codes" else (1, 2))
    nib.save(image, tmp_path / "a.nii.gz")
    label_over(tmp_path / "a.nii.gz", (array > 0).astype(np.uint8), tmp_path / "l.nrrd")
    label, off = on_grid_of(read_scan(tmp_path / "a.nii.gz"), read_scan(tmp_path / "l.nrrd"))
    np.testing.assert_array_equal(label, array > 0)
    assert off < 0.01


def test_a_label_fits_the_qform_that_itk_leaves_aside(tmp_path, array):
    affine = np.diag([*SPACING, 1.0])
    nib.save(nifti(array, affine, 10, (1, 1)), tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "l.nii.gz")
    assert on_grid_of(read_scan(tmp_path / "a.nii.gz"), read_scan(tmp_path / "l.nii.gz"))[1] < 0.01


@pytest.mark.parametrize("code", ["RAS", "SPL", "IAR"])
def test_turned_labels_are_turned_back(array, code):
    scan = Scan(array, np.diag([*SPACING, 1.0]))
    label, off = on_grid_of(scan, reorient(scan, code))
    np.testing.assert_array_equal(label, array)
    assert off < 1e-9


def test_a_label_drawn_over_forms_that_are_mirror_images_is_not_turned(tmp_path, array):
    affine = np.diag([-1.0, 1, 1, 1])
    affine[:3, 3] = np.array([1, -1, -1]) * (np.array(array.shape) - 1) / 2  # centred: a mirrored grid fits, too
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, 2)
    image.set_qform(np.diag([-1, 1, 1, 1]) @ affine, 1)
    nib.save(image, tmp_path / "a.nii.gz")
    label_over(tmp_path / "a.nii.gz", (array > 0).astype(np.uint8), tmp_path / "l.nrrd")
    scan, drawn = read_scan(tmp_path / "a.nii.gz"), read_scan(tmp_path / "l.nrrd")
    assert orientation_of(scan.affine) != orientation_of(drawn.affine)
    label, off = on_grid_of(scan, drawn)
    np.testing.assert_array_equal(label, array > 0)
    assert off < 0.01


def test_a_label_of_a_part_is_padded(array):
    affine = np.diag([*SPACING, 1.0])
    part = affine.copy()
    part[:3, 3] = affine[:3, :3] @ (1, 2, 1)
    label, off = on_grid_of(Scan(array, affine), Scan(array[1:4, 2:5, 1:3], part), part=True)
    assert off < 1e-9 and np.count_nonzero(label) == np.count_nonzero(array[1:4, 2:5, 1:3])
    np.testing.assert_array_equal(label[1:4, 2:5, 1:3], array[1:4, 2:5, 1:3])
    assert on_grid_of(Scan(array, affine), Scan(array[1:4, 2:5, 1:3], part))[1] == np.inf
    part[0, 3] += 0.3 * SPACING[0]
    assert on_grid_of(Scan(array, affine), Scan(array[1:4, 2:5, 1:3], part), part=True)[1] > 0.2


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.mhd", "ElementDataFile = s1.raw"),
        ("a.mhd", "ElementDataFile = LIST\ns1.raw\ns2.raw"),
        ("a.mhd", "ElementDataFile = s%d.raw 1 2 1"),
        ("a.nhdr", "NRRD0004\ndata file: s1.raw\n"),
        ("a.nhdr", "NRRD0004\ndata file: LIST\ns1.raw\ns2.raw\n"),
        ("a.nrrd", "NRRD0004\ndata file: s%d.raw 1 2 1\n"),
    ],
)
def test_all_files_of_a_scan(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    for number in (1, 2):
        (tmp_path / f"s{number}.raw").touch()
    count = 2 if "LIST" in text or "%" in text else 1
    assert [path.name for path in files_of(tmp_path / name)] == [name, "s1.raw", "s2.raw"][: count + 1]


def test_segmentations_of_slicer_are_labels(tmp_path):
    for name in ("a.nrrd", "a.seg.nrrd"):
        (tmp_path / name).touch()
    assert find_scans(tmp_path) == {"a": tmp_path / "a.nrrd"}
    assert find_scans(tmp_path, labels=True) == {"a": tmp_path / "a.seg.nrrd"}
