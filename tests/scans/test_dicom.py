"""DICOM series, as single files and as frames of one, against the positions that their headers state."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from scans.files import find_scans, read_scan
from utils.errors import InputError

pydicom = pytest.importorskip("pydicom")
N = 6
TILT = (1, 0, 0, 0, np.cos(0.26), np.sin(0.26))  # of the gantry, by 15 degrees


def z(k: float) -> tuple[float, float, float]:
    return (-20, -30, 10 + 3.0 * k)


def item(**values) -> "pydicom.Dataset":
    dataset = pydicom.Dataset()
    for key, value in values.items():
        setattr(dataset, key, value)
    return dataset


def plane(shape, **values) -> "pydicom.Dataset":
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    storage = "EnhancedMRImageStorage" if "NumberOfFrames" in values else "MRImageStorage"
    meta.MediaStorageSOPClassUID = getattr(pydicom.uid, storage)
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    dataset = pydicom.dataset.FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    stored = {"BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1, "SamplesPerPixel": 1}
    uids = {"SOPClassUID": meta.MediaStorageSOPClassUID, "SOPInstanceUID": meta.MediaStorageSOPInstanceUID}
    kind = {"Modality": "MR", "PhotometricInterpretation": "MONOCHROME2", "StudyInstanceUID": "1.2.3"}
    size = {"Rows": shape[0], "Columns": shape[1], "SeriesInstanceUID": "1.2.3.4"}
    for key, value in {**stored, **uids, **kind, **size, **values}.items():
        setattr(dataset, key, value)
    return dataset


def files(folder, volume, where, directions=(1, 0, 0, 0, 1, 0), slopes=None, series="1.2.3.4"):
    """One file per slice. Args: volume (slices, rows, columns) int16."""
    folder.mkdir(parents=True)
    for k, pixels in enumerate(volume):
        scale = {"RescaleSlope": slopes[k], "RescaleIntercept": "0"} if slopes else {}
        geometry = {"ImagePositionPatient": list(where[k]), "ImageOrientationPatient": list(directions)}
        dataset = plane(pixels.shape, PixelSpacing=[1.5, 1.0], SliceThickness=3, **geometry, **scale)
        dataset.SeriesInstanceUID, dataset.PixelData = series, pixels.astype("<i2").tobytes()
        dataset.save_as(folder / f"{k}.dcm", enforce_file_format=True)


def frames(folder, volume, where, directions=(1, 0, 0, 0, 1, 0)):
    """The same as one multi-frame file."""
    folder.mkdir(parents=True)
    dataset = plane(volume.shape[1:], NumberOfFrames=len(volume))
    measures = item(PixelSpacing=[1.5, 1.0], SliceThickness=3.0)
    orientation = item(ImageOrientationPatient=list(directions))
    dataset.SharedFunctionalGroupsSequence = [
        item(PixelMeasuresSequence=[measures], PlaneOrientationSequence=[orientation])
    ]
    if where:
        positions = [item(PlanePositionSequence=[item(ImagePositionPatient=list(p))]) for p in where]
        dataset.PerFrameFunctionalGroupsSequence = positions
    dataset.PixelData = volume.astype("<i2").tobytes()
    dataset.save_as(folder / "multi.dcm", enforce_file_format=True)


@pytest.fixture
def volume() -> np.ndarray:
    return np.random.default_rng(0).integers(-300, 500, (N, 5, 4)).astype(np.int16)


@pytest.mark.parametrize("write", [files, frames])
def test_a_gantry_tilt_is_a_shear(tmp_path, volume, write):
    write(tmp_path / "a", volume, [z(k) for k in range(N)], TILT)
    scan = read_scan(tmp_path / "a")
    np.testing.assert_array_equal(scan.array, volume.T)
    for voxel in ((0, 0, 0), (3, 0, 0), (0, 4, 0), (3, 4, N - 1)):
        lps = np.array(z(voxel[2])) + voxel[0] * np.array(TILT[:3]) + 1.5 * voxel[1] * np.array(TILT[3:])
        np.testing.assert_allclose((scan.affine @ (*voxel, 1))[:3], lps * (-1, -1, 1), atol=1e-5)


@pytest.mark.parametrize("write", [files, frames])
def test_slices_are_put_in_the_order_of_their_positions(tmp_path, volume, write):
    order = [3, 0, 5, 1, 4, 2]
    write(tmp_path / "a", volume[order], [z(k) for k in order])
    np.testing.assert_array_equal(read_scan(tmp_path / "a").array, volume.T)


@pytest.mark.parametrize("write", [files, frames])
@pytest.mark.parametrize(
    "places, word",
    [
        ([0, 0, 1, 1, 2, 2], "repeat"),  # echoes
        ([0, 1, 2, 0, 1, 2], "repeat"),  # phases
        ([0, 1, 2, 3, 4, 4], "repeat"),  # a copy
        ([0, 1, 2, 4, 5, 6], "lacks"),
        ([0, 0, 0, 0, 0, 0], "one place"),
    ],
)
def test_what_is_no_stack_of_slices(tmp_path, volume, write, places, word):
    write(tmp_path / "a", volume, [z(k) for k in places])
    with pytest.raises(InputError, match=word) as caught:
        read_scan(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)


def test_frames_without_positions(tmp_path, volume):
    frames(tmp_path / "a", volume, None)
    with pytest.raises(InputError, match="multi.dcm"):
        read_scan(tmp_path / "a")
    edit(tmp_path / "a", setting(ImagePositionPatient=list(z(0))))  # of which frame?
    with pytest.raises(InputError, match="multi.dcm"):
        read_scan(tmp_path / "a")


def test_each_slice_has_its_own_rescaling(tmp_path, volume):
    slopes = ["1", *["0.001"] * (N - 1)]
    files(tmp_path / "a", volume, [z(k) for k in range(N)], slopes=slopes)
    expected = (volume * np.array(slopes, float)[:, None, None]).T
    np.testing.assert_allclose(read_scan(tmp_path / "a").array, expected, rtol=1e-5)


def test_each_folder_of_a_tree_is_a_scan(tmp_path, volume):
    places = [z(k) for k in range(N)]
    files(tmp_path / "in" / "anna", volume, places)
    for series in ("t1", "t2"):
        files(tmp_path / "in" / "bert" / "study" / series, volume, places, series=f"1.2.{series[1]}")
    (tmp_path / "in" / "bert" / "DICOMDIR").write_text("not an image")
    found = find_scans(tmp_path / "in")
    assert list(found) == ["anna", "bert_study_t1", "bert_study_t2"]
    np.testing.assert_array_equal(read_scan(found["bert_study_t2"]).array, volume.T)


@pytest.mark.parametrize("length", [0, 200, 510])
def test_a_slice_that_is_cut_is_not_left_out(tmp_path, volume, length):
    files(tmp_path / "a", volume, [z(k) for k in range(N)])
    last = max((tmp_path / "a").iterdir())
    os.truncate(last, length)
    with pytest.raises(InputError) as caught:
        read_scan(tmp_path / "a")
    assert str(last) in str(caught.value)


def edit(folder, change, names=None):
    """Change the headers of a series, or of some of its files."""
    for path in [folder / name for name in names] if names else list(folder.iterdir()):
        dataset = pydicom.dcmread(path)
        change(dataset)
        dataset.save_as(path, enforce_file_format=True)


def setting(**values):
    return lambda dataset: [setattr(dataset, key, value) for key, value in values.items()]


def colour(dataset):
    setting(SamplesPerPixel=3, PlanarConfiguration=0, BitsAllocated=8, BitsStored=8, HighBit=7)(dataset)
    setting(PhotometricInterpretation="RGB", PixelRepresentation=0, PixelData=bytes(60))(dataset)


@pytest.mark.parametrize(
    "change",
    [
        setting(PhotometricInterpretation="MONOCHROME1"),  # which ITK inverts
        colour,
        setting(SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4"),  # of a segmentation
        setting(PixelData=bytes(20)),  # of 40
        lambda dataset: dataset.__delitem__("PixelData"),
        setting(ImagePositionPatient=["0", "0", "nan"]),
        setting(ImageOrientationPatient=[0] * 6),
        setting(PixelSpacing=[0, 1]),
    ],
)
def test_a_slice_that_does_not_fit_is_named(tmp_path, volume, change):
    files(tmp_path / "a", volume, [z(k) for k in range(N)])
    edit(tmp_path / "a", change, ["2.dcm"])
    with pytest.raises(InputError) as caught:
        read_scan(tmp_path / "a")
    assert str(tmp_path / "a" / "2.dcm") in str(caught.value)


def test_slices_of_several_sizes(tmp_path, volume):
    files(tmp_path / "a", volume, [z(k) for k in range(N)])
    edit(tmp_path / "a", setting(Rows=4), ["2.dcm"])
    with pytest.raises(InputError) as caught:
        read_scan(tmp_path / "a")
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("write", [files, frames])
def test_compressed_pixels(tmp_path, write):
    volume = np.random.default_rng(0).integers(-300, 500, (N, 64, 48)).astype(np.int16)
    write(tmp_path / "a", volume, [z(k) for k in range(N)])
    edit(tmp_path / "a", lambda dataset: dataset.compress(pydicom.uid.RLELossless))
    np.testing.assert_array_equal(read_scan(tmp_path / "a").array, volume.T)


ENCODED = "RLE bigendian expb implicit jp2klossless jpeg_ls_lossless padded".split()


@pytest.mark.parametrize("encoding", ENCODED)
def test_every_encoding_of_one_slice(tmp_path, encoding):
    """Files that come with pydicom."""
    samples = Path(pydicom.__file__).parent / "data" / "test_files"
    if not (samples / "MR_small.dcm").is_file():
        pytest.skip("pydicom without its files")
    shutil.copy(samples / f"MR_small_{encoding}.dcm", tmp_path)
    expected = pydicom.dcmread(samples / "MR_small.dcm").pixel_array
    np.testing.assert_array_equal(read_scan(tmp_path).array[..., 0], expected.T)


@pytest.mark.parametrize("part", ["shared", "each"])
def test_the_rescaling_of_frames(tmp_path, volume, part):
    def rescale(dataset):
        scale = [item(RescaleSlope="2.5", RescaleIntercept="-1024", RescaleType="US")]
        shared, each = dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence
        for group in shared if part == "shared" else each:
            group.PixelValueTransformationSequence = scale

    frames(tmp_path / "a", volume, [z(k) for k in range(N)])
    edit(tmp_path / "a", rescale)
    np.testing.assert_allclose(read_scan(tmp_path / "a").array, volume.T * 2.5 - 1024)


def test_a_series_in_two_folders_is_not_two_scans(tmp_path, volume):
    places = [z(k) for k in range(N)]
    for name, part in (("DIR000", slice(3)), ("DIR001", slice(3, N))):
        files(tmp_path / "patient" / name, volume[part], places[part])
    with pytest.raises(InputError, match="DIR000.*DIR001"):
        find_scans(tmp_path)


def test_slices_beside_other_scans_are_not_left_out(tmp_path, volume):
    files(tmp_path / "anna", volume, [z(k) for k in range(N)])
    (tmp_path / "report.dcm").write_bytes(b"\0" * 128 + b"DICM")
    assert list(find_scans(tmp_path)) == ["anna"]
    os.rename(tmp_path / "anna" / "0.dcm", tmp_path / "loose")
    with pytest.raises(InputError, match="loose"):
        find_scans(tmp_path)


def test_links_to_folders_are_followed_once(tmp_path, volume):
    files(tmp_path / "real", volume, [z(k) for k in range(N)])
    (tmp_path / "in" / "anna").mkdir(parents=True)
    os.symlink(tmp_path / "real", tmp_path / "in" / "anna" / "t1")
    for loop in ("loop", "again"):  # of which a walk without an end has more and more
        os.symlink(tmp_path / "in", tmp_path / "in" / "anna" / loop)
    assert list(find_scans(tmp_path / "in")) == ["anna"]
