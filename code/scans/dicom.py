"""A DICOM series as a volume: pydicom reads where each slice lies, SimpleITK decodes its voxels.

The affine follows from the positions of the slices, so that a gantry tilt stays a shear. Frames of one file and single
files are tested alike: same directions, even steps, no slice twice.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk

from scans.formats import itk_name
from utils.errors import InputError
from utils.nifti import RAS_FROM_LPS

SERIES = "SeriesInstanceUID"  # of every DICOM file but a DICOMDIR
STEP_TOLERANCE = 0.05  # part of a step by which slices may lie off: positions are rounded
LARGE = 1 << 16  # bytes: what is longer is read when it is asked for, so that the pixels are not
UNKNOWN_LENGTH = 0xFFFFFFFF  # of compressed pixels
GREY = "MONOCHROME2"  # ITK turns other kinds into it, or into colours, slice by slice
FORCED = (".dcm", ".ima")  # read without the preamble, too, which old files lack
TAGS = (
    "SOPClassUID SeriesInstanceUID Rows Columns NumberOfFrames ImagePositionPatient ImageOrientationPatient "
    "PixelSpacing SliceThickness RescaleSlope RescaleIntercept BitsAllocated PixelRepresentation "
    "PhotometricInterpretation PixelData "
    "SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence"
).split()


@dataclass(frozen=True)
class _Slice:
    file: Path
    frame: int
    position: np.ndarray  # (3,), LPS mm
    axes: np.ndarray  # (2, 3): LPS steps in mm along the columns and the rows of the image
    values: tuple  # rescaling and stored type
    thickness: float


def series_in(folder: Path) -> dict[str, list[tuple[Path, pydicom.Dataset]]]:
    """Files and headers of the images in a folder, itself, by series; other files are ignored.

    A file that is empty or cut is an `InputError`: it may be a slice, which the volume would lack.
    """
    series: dict[str, list[tuple[Path, pydicom.Dataset]]] = {}
    for path in sorted(folder.iterdir()):
        header = _header(path)
        if header is None:
            continue
        if SERIES not in header or ("Rows" not in header and _is_image(header)):
            raise InputError(f"{path} is empty, cut or of no series; copy the series again, or remove what is no slice")
        if "Rows" in header:
            series.setdefault(str(header.SeriesInstanceUID), []).append((path, header))
    return series


def is_slice(path: Path) -> bool:
    """Whether a file is a DICOM image."""
    return "Rows" in (_header(path) or ())


def _is_image(header: pydicom.Dataset) -> bool:
    return "SOPClassUID" in header and header.SOPClassUID.keyword.endswith("ImageStorage")


def series_folders(folder: Path) -> dict[Path, str]:
    """The folder and those below it, behind links, too, that hold DICOM images, each with the series of its first."""
    found, seen = {}, set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # links in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        headers = (_header(Path(place, name)) for name in sorted(files))
        if first := next((header for header in headers if header and "Rows" in header), None):
            found[Path(place)] = str(first.get(SERIES))
    return found


def _header(path: Path) -> pydicom.Dataset | None:
    """What a DICOM file states, nothing for an empty file; None for another file."""
    if path.name.startswith(".") or path.name == "DICOMDIR" or not path.is_file():
        return None
    if not path.stat().st_size:
        return pydicom.Dataset()
    try:
        return pydicom.dcmread(path, defer_size=LARGE, specific_tags=TAGS, force=path.suffix.lower() in FORCED)
    except pydicom.errors.InvalidDicomError:
        return None


def read_series(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Array (W, H, D) and RAS affine of the only series in a folder."""
    series = series_in(folder)
    if len(series) != 1:
        found = f"{len(series)} DICOM series ({', '.join(series)})" if series else "no DICOM series"
        raise InputError(f"folder {folder} holds {found}; give a folder of one series")
    (files,) = series.values()
    slices = [one for path, header in files for one in _slices(path, header)]
    axes = np.array([one.axes for one in slices])
    sizes = {(header.Rows, header.get("Columns")) for _, header in files}
    if len(sizes) > 1 or np.abs(axes - axes[0]).max() > 1e-3 * np.abs(axes[0]).max():
        raise InputError(f"the slices in {folder} differ in direction, size or pixel size; export one stack of slices")
    normal = np.cross(*axes[0])
    slices.sort(key=lambda one: one.position @ normal)
    step = _step(folder, slices, normal)
    affine = np.eye(4)
    affine[:3] = RAS_FROM_LPS @ np.column_stack([*axes[0], step, slices[0].position])
    return _voxels(folder, slices), affine


def _slices(path: Path, header: pydicom.Dataset) -> Iterator[_Slice]:
    shared = _first(header, "SharedFunctionalGroupsSequence")
    frames = int(header.get("NumberOfFrames") or 1)
    groups = header.get("PerFrameFunctionalGroupsSequence") or [pydicom.Dataset()] * frames
    if len(groups) != frames:
        raise InputError(f"{path} has {frames} frames and positions of {len(groups)}; export the series again")
    _require_pixels(path, header, frames)
    for frame, own in enumerate(groups):

        def get(name: str, sequence: str, own: pydicom.Dataset = own) -> Any:
            for group in (own, shared):
                if name in (found := _first(group, sequence)):
                    return found[name].value
            return None if frames > 1 else header.get(name)

        position = get("ImagePositionPatient", "PlanePositionSequence")
        directions = get("ImageOrientationPatient", "PlaneOrientationSequence")
        spacing = get("PixelSpacing", "PixelMeasuresSequence")
        each = "each frame" if frames > 1 else "its slice"
        fault = InputError(f"{path} does not state position, orientation and pixel size of {each}; export it again")
        if position is None or directions is None or spacing is None:
            raise fault
        rows, columns = (float(mm) for mm in spacing)
        axes = np.array(directions, dtype=float).reshape(2, 3) * [[columns], [rows]]
        position = np.array(position, dtype=float)
        if not (np.isfinite(position).all() and np.isfinite(axes).all() and np.cross(*axes).any()):
            raise fault
        scale = [get(name, "PixelValueTransformationSequence") for name in ("RescaleSlope", "RescaleIntercept")]
        values = (*map(str, scale), header.get("BitsAllocated"), header.get("PixelRepresentation"))
        thickness = float(get("SliceThickness", "PixelMeasuresSequence") or 0)
        yield _Slice(path, frame, position, axes, values, thickness)


def _require_pixels(path: Path, header: pydicom.Dataset, frames: int) -> None:
    """Refuse what is no stack of grey values, and pixels that end early: GDCM goes on with what lies in the memory."""
    if header.get("SOPClassUID") == pydicom.uid.SegmentationStorage:
        raise InputError(f"{path} is a DICOM segmentation, which is not read; convert it to NIfTI, e.g. with dcmqi")
    if (kind := header.get("PhotometricInterpretation", GREY)) != GREY:
        raise InputError(f"{path} holds {kind} pixels; export the series as {GREY}")
    pixels = header.get_item("PixelData", keep_deferred=True) if "PixelData" in header else None
    held = getattr(pixels, "length", None) or len(getattr(pixels, "value", None) or b"")
    stated = int(header.Rows) * int(header.Columns) * frames * int(header.get("BitsAllocated") or 0) // 8
    if held != UNKNOWN_LENGTH and held < stated:
        raise InputError(f"{path} is damaged: {held} bytes of pixels where it states {stated}; export it again")


def _first(group: pydicom.Dataset, sequence: str) -> pydicom.Dataset:
    return (group.get(sequence) or [pydicom.Dataset()])[0]


def _step(folder: Path, slices: list[_Slice], normal: np.ndarray) -> np.ndarray:
    """LPS step in mm from slice to slice; slices at one place and uneven steps are an `InputError`."""
    if len(slices) == 1:
        return normal / np.linalg.norm(normal) * slices[0].thickness
    steps = np.diff([one.position for one in slices], axis=0)
    lengths = steps @ (normal / np.linalg.norm(normal))
    typical = np.median(steps[lengths > 1e-3], axis=0) if (lengths > 1e-3).any() else None
    if typical is None:
        raise InputError(f"all {len(slices)} slices in {folder} lie at one place; give a series that is a volume")
    if repeated := int((lengths < STEP_TOLERANCE * np.linalg.norm(typical)).sum()):
        raise InputError(
            f"{repeated} of {len(slices)} slices in {folder} repeat the place of another (echoes, phases or copies); "
            "keep one slice for each place"
        )
    if np.linalg.norm(steps - typical, axis=1).max() > STEP_TOLERANCE * np.linalg.norm(typical):
        raise InputError(f"the DICOM series in {folder} lacks slices or spaces them unevenly; export it again")
    return (slices[-1].position - slices[0].position) / (len(slices) - 1)


def _voxels(folder: Path, slices: list[_Slice]) -> np.ndarray:
    """(W, H, D), in the order of the slices; float32 where their rescaling or type differs."""
    one_kind, files = len({one.values for one in slices}) == 1, list(dict.fromkeys(one.file for one in slices))
    if len(files) < len(slices) and not (one_kind and len(files) == 1):
        raise InputError(f"the frames in {folder} differ in rescaling, or stand in several files; export single slices")
    if len(files) == 1:
        volume = sitk.GetArrayFromImage(sitk.ReadImage(itk_name(files[0])))[[one.frame for one in slices]]
    elif one_kind:
        volume = sitk.GetArrayFromImage(sitk.ReadImage([itk_name(file) for file in files]))
    else:
        parts = [sitk.GetArrayFromImage(sitk.ReadImage(itk_name(file), sitk.sitkFloat64)) for file in files]
        volume = np.concatenate(parts).astype(np.float32)
    return np.ascontiguousarray(np.moveaxis(volume, (0, 1, 2), (2, 1, 0)))
