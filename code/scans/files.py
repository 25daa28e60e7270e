"""Scans as scanners and viewers store them: NIfTI, NRRD, MetaImage, a folder of DICOM slices.

One convention for all formats: arrays are (W, H, D) in the order of the file's own axes x, y, z, and geometry is a
NIfTI affine, voxel index to millimetres in RAS (right, anterior, superior), as nibabel gives it. ITK's LPS is
converted where such a file is read or written.
"""

import itertools
import math
import shutil
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from scans.dicom import is_slice, read_series, series_folders
from scans.formats import explained, read_itk, read_nifti
from utils.errors import InputError
from utils.files import atomic
from utils.nifti import RAS_FROM_LPS, VOXEL_MM, stored, write_with_affine

NIFTI = (".nii.gz", ".nii")
SEGMENTATION = ".seg.nrrd"  # of 3D Slicer: a label, of the part of the scan that it needs
READABLE = (*NIFTI, SEGMENTATION, ".nrrd", ".nhdr", ".mha", ".mhd")
WRITABLE = (".nii.gz", ".nrrd", ".mha")  # each a single file, so that it can appear whole or not at all
OUTPUT_FLAG = "--output"  # flag that names the folder of what is written
OTHER = tuple(".hdr .img .mgh .mgz .mnc .gipl .par .rec .nii.bz2 .nii.zst .nii.zip".split())  # other scans
GRID_TOLERANCE = 0.05  # voxels by which corners may differ on one grid: headers are rounded, in NIfTI to float32
LEAST_UPRIGHT = 0.999  # of the volume that orthogonal axes would give a voxel; 0.966 at a tilt of 15 degrees
LEAST_VOLUME = 1e-3  # spanned by the unit vectors of the axes, 1 for orthogonal ones


@dataclass(frozen=True, eq=False)
class Scan:
    """A volume and where it lies: `array` (W, H, D), as stored; `affine` (4, 4), voxel index to RAS millimetres.

    readings: other affines that programs read from the same header: the qform, and what ITK makes of it.
    header: of a NIfTI file, so that a mask can state its geometry in the same words.
    """

    array: np.ndarray
    affine: np.ndarray
    readings: tuple[np.ndarray, ...] = ()
    header: nib.Nifti1Header | None = None

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along W, H, D."""
        return tuple(np.linalg.norm(self.affine[:3, :3], axis=0).tolist())

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel; less than the product of its sides where the axes are sheared."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def sheared(self) -> bool:
        """Whether the axes lean, as those of a tilted gantry."""
        return self.voxel_mm3 < LEAST_UPRIGHT * math.prod(self.spacing_mm)

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
    header, readings = None, ()
    with explained(path):
        if path.is_dir():
            array, affine = read_series(path)
        elif path.name.lower().endswith(NIFTI):
            array, affine, readings, header = read_nifti(path)
        elif path.name.lower().endswith(READABLE):
            array, affine = read_itk(path)
        else:
            raise InputError(f"{path} is no scan that can be read; give {', '.join(READABLE)} or a DICOM folder")
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(f"{path} has shape {array.shape}; give one volume (W, H, D) per scan")
    if array.dtype.kind not in "fiub":
        raise InputError(f"{path} holds values of type {array.dtype}; give one real number per voxel")
    _check_affine(affine, path)
    return Scan(array, np.asarray(affine, dtype=np.float64), readings, header)


def _check_affine(affine: np.ndarray | None, path: Path) -> None:
    if affine is None:
        raise InputError(f"{path} does not state the size of its voxels; write it into its header")
    usable = bool(np.isfinite(affine).all())
    if usable:
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        usable = lengths.min() > 0 and abs(np.linalg.det(affine[:3, :3] / lengths)) > LEAST_VOLUME
    if not usable:
        raise InputError(f"{path} states no usable geometry (affine {np.asarray(affine).tolist()}); fix its header")
    if lengths.min() < VOXEL_MM[0] or lengths.max() > VOXEL_MM[1]:
        size = " x ".join(f"{mm:g}" for mm in lengths)
        raise InputError(
            f"{path} has voxels of {size} mm, which no scan of a patient has; fix the voxel size or unit in its header"
        )


# --- write


def write_scan(path: Path | str, array: np.ndarray, affine: np.ndarray, header: nib.Nifti1Header | None = None) -> None:
    """Write a volume in a given geometry, whole or not at all; the suffix decides on the format.

    Args:
        path: ends in .nii.gz, .nrrd or .mha; its folder exists.
        array: (W, H, D); Boolean and integer values go to uint8 or, above 255, uint16, floating ones to float32.
        affine: (4, 4), voxel index to RAS millimetres. NRRD and MHA hold no shear: there it is an `InputError`.
        header: of the NIfTI scan that the volume lies over; a .nii.gz then states its geometry in the same words.
    """
    path = Path(path)
    if not path.name.endswith(WRITABLE):
        raise InputError(f"{path} cannot be written; name a scan {', '.join(WRITABLE)}")
    if path.name.endswith(".nii.gz"):
        write_with_affine(path, array, affine, header, OUTPUT_FLAG)
        return
    scan = Scan(stored(array), np.asarray(affine, dtype=np.float64))
    if not np.allclose(scan.direction.T @ scan.direction, np.eye(3), atol=1e-4):
        raise InputError(f"{path}: {path.suffix} cannot hold the oblique axes of the scan; write .nii.gz")
    image = sitk.GetImageFromArray(np.ascontiguousarray(scan.array.transpose(2, 1, 0)))
    image.SetSpacing(scan.spacing_mm)
    image.SetOrigin(scan.origin_mm)
    image.SetDirection(scan.direction.ravel().tolist())
    with atomic(path, OUTPUT_FLAG) as temporary, tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / f"draft{path.suffix}"  # ITK takes the format from the suffix
        try:
            sitk.WriteImage(image, str(draft), useCompression=True)
        except RuntimeError as error:
            raise InputError(f"cannot write {draft} ({str(error).splitlines()[-1]}); make room") from error
        shutil.copyfile(draft, temporary)


# --- find


def find_scans(folder: Path | str, labels: bool = False) -> dict[str, Path]:
    """The scans of a folder by case id, sorted: files by name without suffix, sub-folders with DICOM by name.

    A tree of DICOM folders gives a scan for each folder that holds slices, with the names on the way as its id. A
    folder that holds DICOM slices itself is one scan. None at all, or two of one id, is an `InputError`.

    Args: labels, whether labels are sought: of a folder with .seg.nrrd only these, which otherwise are no scans.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; correct the path that was given")
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    segmentations = [path for path in paths if path.name.lower().endswith(SEGMENTATION)]
    paths = segmentations if labels and segmentations else [path for path in paths if path not in segmentations]
    found: dict[str, Path] = {}
    series: dict[str, Path] = {}
    for path in paths:
        below = series_folders(path) if path.is_dir() else {}
        for holder in below if path.is_dir() else [path] if case_id(path) else []:
            names = [path.name] if len(below) < 2 else holder.relative_to(folder).parts
            case = case_id(path) or unicodedata.normalize("NFC", "_".join(names))
            if case in found:
                raise InputError(f"{found[case]} and {holder} have one case id, {case}; rename or remove one of them")
            found[case] = holder
            if holder in below and series.setdefault(below[holder], holder) != holder:
                both = f"{series[below[holder]]} and {holder}"
                raise InputError(f"{both} hold slices of one DICOM series; put them into one folder, or remove a copy")
    left = [path for path in paths if path.name.lower().endswith(OTHER) or (case_id(path) is None and is_slice(path))]
    if found and left:
        raise InputError(f"{left[0]} is no scan that can be read, unlike others beside it; convert it, or take it away")
    if not found and folder in series_folders(folder):
        found = {folder.resolve().name: folder}
    if not found:
        if other := next((file for place in ("*.h5", "*/*.h5") for file in sorted(folder.glob(place))), None):
            raise InputError(
                f"folder {folder} holds HDF5 ({other}), and no scan; prepared volumes stand in <case>/mri_norm2.h5 of "
                "a folder that training reads with --root_path"
            )
        raise InputError(f"folder {folder} holds no scan; give one with {', '.join(READABLE)} or DICOM sub-folders")
    return found


def case_id(path: Path) -> str | None:
    """Name of a scan's file without its suffix; None for a file of another kind."""
    suffix = next((suffix for suffix in READABLE if path.name.lower().endswith(suffix)), None)
    return unicodedata.normalize("NFC", path.name[: -len(suffix)]) if suffix else None  # macOS takes accents apart


# --- geometry


def grid_distance(one: Scan, other: Scan) -> float:
    """Voxels of `one` by which the corners of two scans lie apart; infinite for different shapes."""
    if one.array.shape != other.array.shape:
        return np.inf
    corners = np.array(np.meshgrid(*([0, n - 1] for n in one.array.shape))).reshape(3, -1)
    apart = (one.affine - other.affine)[:3] @ np.vstack([corners, np.ones(corners.shape[1])])
    return float(np.linalg.norm(apart, axis=0).max() / min(one.spacing_mm))


def on_grid_of(scan: Scan, label: Scan, part: bool = False) -> tuple[np.ndarray, float]:
    """A label in the order of its scan's voxels, and how many voxels its corners lie off; infinite for another shape.

    The headers count in every reading, and axes may be flipped or swapped. As it is comes first: where the forms of a
    header are mirror images, a label fits one of them turned, too.

    Args: part, whether the label may cover a part of the scan, and is padded; of other files that is a misfit, which
        a header without a true origin would hide.
    """
    places = [Scan(scan.array, affine) for affine in (scan.affine, *scan.readings)]
    labels = [Scan(label.array, affine) for affine in (label.affine, *label.readings)]
    best = label.array, np.inf
    for turned in (False, True):
        for place, one in itertools.product(places, labels):
            one = reorient(one, orientation_of(place.affine)) if turned else one
            for candidate in (one, _padded(place, one)) if part else (one,):
                distance = grid_distance(place, candidate)
                best = (candidate.array, distance) if distance < best[1] else best
            if best[1] <= GRID_TOLERANCE:
                return best
    return best


def _padded(scan: Scan, label: Scan) -> Scan:
    """The label in the whole of a scan, whose voxels from some corner on it covers; itself where it does not."""
    start = np.rint(np.linalg.solve(scan.affine, label.affine[:, 3])[:3]).astype(int)
    stop = start + label.array.shape
    if label.array.shape == scan.array.shape or (start < 0).any() or (stop > scan.array.shape).any():
        return label
    whole = np.zeros(scan.array.shape, label.array.dtype)
    whole[tuple(map(slice, start, stop))] = label.array
    affine = label.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ start
    return Scan(whole, affine)


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
