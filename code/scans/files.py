"""Scans as scanners and viewers store them: NIfTI, NRRD, MetaImage, a folder of DICOM slices.

One convention for all formats: arrays are (W, H, D) in the order of the file's own axes x, y, z, and geometry is a
NIfTI affine, voxel index to millimetres in RAS (right, anterior, superior), as nibabel gives it. ITK's LPS is
converted where such a file is read or written.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from utils.errors import InputError
from utils.files import atomic
from utils.nifti import RAS_FROM_LPS, affine_ras, stored, write_with_affine

NIFTI = (".nii.gz", ".nii")
READABLE = (*NIFTI, ".nrrd", ".mha", ".mhd")
WRITABLE = (".nii.gz", ".nrrd", ".mha")  # each a single file, so that it can appear whole or not at all
GRID_TOLERANCE = 0.05  # voxels by which corners may differ on one grid: headers are rounded, in NIfTI to float32
LEAST_VOLUME = 1e-3  # spanned by the unit vectors of the axes, 1 for orthogonal ones
SLICE_POSITION = "0020|0032"  # DICOM: Image Position (Patient)


@dataclass(frozen=True, eq=False)
class Scan:
    """A volume and where it lies: `array` (W, H, D), as stored; `affine` (4, 4), voxel index to RAS millimetres."""

    array: np.ndarray
    affine: np.ndarray

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along W, H, D."""
        return tuple(np.linalg.norm(self.affine[:3, :3], axis=0).tolist())

    @property
    def origin_mm(self) -> tuple[float, float, float]:
        """LPS position of the centre of voxel (0, 0, 0), as ITK states it."""
        return tuple((RAS_FROM_LPS @ self.affine[:3, 3]).tolist())

    @property
    def direction(self) -> np.ndarray:
        """(3, 3): column j is the LPS unit vector of array axis j, as ITK states it."""
        return RAS_FROM_LPS @ self.affine[:3, :3] / self.spacing_mm


# --- read


def read_scan(path: Path | str) -> Scan:
    """One scan: a NIfTI, NRRD or MetaImage file, or a folder that holds one DICOM series.

    Axes of length one beyond the third are dropped. What cannot be read, is no volume of real numbers or has no usable
    geometry is an `InputError` that names the path.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no scan {path}; correct the path that was given")
    with _explained(path):
        if path.is_dir():
            array, affine = _from_itk(_read_series(path))
        elif path.name.lower().endswith(NIFTI):
            image = nib.load(path)
            array, affine = np.asanyarray(image.dataobj), image.affine
        elif path.name.lower().endswith(READABLE):
            array, affine = _from_itk(sitk.ReadImage(str(path)))
        else:
            raise InputError(f"{path} is no scan that can be read; give {', '.join(READABLE)} or a DICOM folder")
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(f"{path} has shape {array.shape}; give one volume (W, H, D) per scan")
    if array.dtype.kind not in "fiub":
        raise InputError(f"{path} holds values of type {array.dtype}; give one real number per voxel")
    _check_affine(affine, path)
    return Scan(array, np.asarray(affine, dtype=np.float64))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever a library raises on a damaged file becomes an `InputError` that names it."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what matters is raised below, in one sentence
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if "ERROR" in line] or str(error).splitlines() or [""]
        reason = re.sub(r"^.*ERROR: ", "", lines[0]) or type(error).__name__
        raise InputError(f"{path} is damaged or no scan ({reason}); export it again") from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def _read_series(folder: Path) -> sitk.Image:
    series = dicom_series(folder)
    if len(series) != 1:
        found = f"{len(series)} DICOM series ({', '.join(series)})" if series else "no DICOM series"
        raise InputError(f"folder {folder} holds {found}; give a folder of one series")
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    reader.MetaDataDictionaryArrayUpdateOn()
    image = reader.Execute()
    if len(files) > 1 and not _evenly_spaced([reader.GetMetaData(k, SLICE_POSITION) for k in range(len(files))]):
        raise InputError(f"the DICOM series in {folder} lacks slices or spaces them unevenly; export it again")
    return image


def _evenly_spaced(positions: list[str]) -> bool:
    """Whether the slices follow each other in equal steps; ITK would go on with their mean."""
    steps = np.diff([[float(mm) for mm in position.split("\\")] for position in positions], axis=0)
    typical = np.median(steps, axis=0)
    return bool(np.linalg.norm(steps - typical, axis=1).max() <= GRID_TOLERANCE * np.linalg.norm(typical))


def dicom_series(folder: Path) -> list[str]:
    """Identifiers of the DICOM series in a folder, itself, without its sub-folders."""
    with _explained(folder):
        return list(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))


def _from_itk(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """Array (W, H, D) or as many axes as there are, and affine; components of a colour image come last."""
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[..., 0]
    array = sitk.GetArrayViewFromImage(image)
    components = int(image.GetNumberOfComponentsPerPixel() > 1)
    axes = (*reversed(range(image.GetDimension())), *([image.GetDimension()] if components else []))
    array = np.array(array.transpose(axes))
    if image.GetDimension() != 3:
        return array, np.eye(4)
    return array, affine_ras(image.GetSpacing(), image.GetOrigin(), image.GetDirection())


def _check_affine(affine: np.ndarray | None, path: Path) -> None:
    usable = affine is not None and bool(np.isfinite(affine).all())
    if usable:
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        usable = lengths.min() > 0 and abs(np.linalg.det(affine[:3, :3] / lengths)) > LEAST_VOLUME
    if not usable:
        raise InputError(f"{path} states no usable geometry (affine {np.asarray(affine).tolist()}); mend its header")


# --- write


def write_scan(path: Path | str, array: np.ndarray, affine: np.ndarray) -> None:
    """Write a volume in a given geometry, whole or not at all; the suffix decides on the format.

    Args:
        path: ends in .nii.gz, .nrrd or .mha; its folder exists.
        array: (W, H, D); Boolean and integer values (0..255) are stored as uint8, floating ones as float32.
        affine: (4, 4), voxel index to RAS millimetres. NRRD and MHA hold no shear: there it is an `InputError`.
    """
    path = Path(path)
    if not path.name.endswith(WRITABLE):
        raise InputError(f"{path} cannot be written; name a scan {', '.join(WRITABLE)}")
    if path.name.endswith(".nii.gz"):
        write_with_affine(path, array, affine)
        return
    scan = Scan(stored(array), np.asarray(affine, dtype=np.float64))
    if not np.allclose(scan.direction.T @ scan.direction, np.eye(3), atol=1e-4):
        raise InputError(f"{path}: {path.suffix} cannot hold the oblique axes of the scan; write .nii.gz")
    image = sitk.GetImageFromArray(np.ascontiguousarray(scan.array.transpose(2, 1, 0)))
    image.SetSpacing(scan.spacing_mm)
    image.SetOrigin(scan.origin_mm)
    image.SetDirection(scan.direction.ravel().tolist())
    with atomic(path) as temporary, tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name  # ITK takes the format from the suffix
        try:
            sitk.WriteImage(image, str(draft), useCompression=True)
        except RuntimeError as error:
            raise InputError(f"cannot write {draft} ({str(error).splitlines()[-1]}); make room") from error
        shutil.copyfile(draft, temporary)


# --- find


def find_scans(folder: Path | str) -> dict[str, Path]:
    """The scans of a folder by case id, sorted: files by name without suffix, sub-folders with DICOM by name.

    A folder that holds DICOM slices itself is one scan. None at all, or two of one id, is an `InputError`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; correct the path that was given")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        case = path.name if path.is_dir() else case_id(path)
        if path.name.startswith(".") or case is None or (path.is_dir() and not dicom_series(path)):
            continue
        if case in found:
            raise InputError(f"{found[case]} and {path} have one case id, {case}; rename or remove one of them")
        found[case] = path
    if not found and dicom_series(folder):
        found = {folder.resolve().name: folder}
    if not found:
        raise InputError(f"folder {folder} holds no scan; give one with {', '.join(READABLE)} or DICOM sub-folders")
    return found


def case_id(path: Path) -> str | None:
    """Name of a scan's file without its suffix; None for a file of another kind."""
    suffix = next((suffix for suffix in READABLE if path.name.lower().endswith(suffix)), None)
    return path.name[: -len(suffix)] if suffix else None


# --- geometry


def same_grid(one: Scan, other: Scan) -> bool:
    """Whether two scans have one shape and lie in one place, up to the rounding of headers."""
    if one.array.shape != other.array.shape:
        return False
    corners = np.array(np.meshgrid(*([0, n - 1] for n in one.array.shape))).reshape(3, -1)
    apart = (one.affine - other.affine)[:3] @ np.vstack([corners, np.ones(corners.shape[1])])
    return bool(np.linalg.norm(apart, axis=0).max() <= GRID_TOLERANCE * min(one.spacing_mm))


def orientation_of(affine: np.ndarray) -> str:
    """Where the array axes point, to the nearest anatomical axis: "LPS" runs to the left, posterior, superior."""
    return "".join(nib.aff2axcodes(affine))


def turn_to(affine: np.ndarray, code: str) -> np.ndarray:
    """The permutation and flips that make axes run nearest to the directions of `code`, e.g. "RAS".

    Returns: (3, 2), an orientation as nibabel has it, for `apply_turn` and `undo_turn`.
    """
    return nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(code))


def apply_turn(array: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """The array with its axes permuted and flipped, never resampled; a view."""
    return nib.apply_orientation(array, turn)


def undo_turn(array: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """The inverse of `apply_turn`; a view."""
    back = np.empty_like(turn)
    for axis, (new_axis, flip) in enumerate(turn):
        back[int(new_axis)] = axis, flip
    return nib.apply_orientation(array, back)


def reorient(scan: Scan, code: str) -> Scan:
    """The same scan with axes that run nearest to the directions of `code`; its array is a view."""
    turn = turn_to(scan.affine, code)
    back = nib.orientations.inv_ornt_aff(turn, scan.array.shape)
    return Scan(apply_turn(scan.array, turn), scan.affine @ back)
