"""Write masks and probability maps as compressed NIfTI that a viewer lays exactly over the scan.

Two conventions meet here. ITK, DICOM and the challenge's NRRD files state positions in LPS: millimetres to
the patient's left, posterior, superior. NIfTI states them in RAS: right, anterior, superior. Callers pass
origin and direction in LPS, as SimpleITK gives them; this file changes the sign of the first two coordinates.
"""

import gzip
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from utils.files import atomic

RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0])
SCANNER_SPACE = 1  # NIfTI's code for "scanner coordinates", for qform and sform
GEOMETRY = (
    "pixdim qform_code sform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z srow_x srow_y srow_z "
    "xyzt_units"
).split()
MOST_VALUE = 65535  # of a label file
VOXEL_MM = (1e-3, 100.0)  # what a voxel of a patient can measure
COMPRESSION_LEVEL = 6  # of gzip: an LA mask is 26 kB in 10 ms (59 kB at level 1, 20 kB in 60 ms at level 9)


def write_nifti(
    path: Path | str,
    array: np.ndarray,
    spacing_mm: Sequence[float],
    origin_mm: Sequence[float] = (0.0, 0.0, 0.0),
    direction: np.ndarray | Sequence[float] | None = None,
) -> None:
    """Write one volume as `.nii.gz`, whole or not at all (temporary file, flush, rename).

    Equal input gives equal bytes: no time stamp is stored.

    Args:
        path: ends in .nii.gz; its folder exists.
        array: (X, Y, Z) in the axis order of the HDF5 files. Boolean and integer arrays (0..65535) are stored
            as uint8 or, with values above 255, as uint16, floating ones as float32; nothing is scaled.
        spacing_mm: voxel size along each array axis, > 0.
        origin_mm: LPS position of the centre of voxel (0, 0, 0).
        direction: (3, 3), or its 9 numbers row by row as SimpleITK gives them: column j is the LPS unit
            vector of array axis j. None is the identity: axes run to the left, posterior, superior, as in LA.
    """
    write_with_affine(path, array, affine_ras(spacing_mm, origin_mm, direction))


def write_with_affine(
    path: Path | str,
    array: np.ndarray,
    affine: np.ndarray,
    like: nib.Nifti1Header | None = None,
    flag: str = "--model_path",
) -> None:
    """As `write_nifti`, but the geometry is the NIfTI affine: (4, 4), voxel index to RAS millimetres.

    Args: like, the header of a scan of this geometry: qform, sform, their codes, voxel size and unit are copied;
        flag, the one that names the folder, for the message where it cannot be written.
    """
    path = Path(path)
    if not path.name.endswith(".nii.gz"):
        raise ValueError(f"a NIfTI file is written as .nii.gz, got {path.name}")
    image = nib.Nifti1Image(stored(array), None if like is not None else affine)
    if like is not None:
        for field in GEOMETRY:
            image.header[field] = like[field]
        image.header["pixdim"][4:] = 1  # a volume has no time
    else:
        image.header.set_xyzt_units("mm")
        image.set_sform(affine, code=SCANNER_SPACE)
        image.set_qform(affine, code=SCANNER_SPACE)  # a quaternion holds no shear: sform is exact, qform the nearest
    with atomic(path, flag) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), COMPRESSION_LEVEL, mtime=0))


def axes_are_lps(direction: Sequence[float]) -> bool:
    """Whether the array's axes run to the patient's left, posterior and superior. Args: direction, as below."""
    return np.array_equal(np.rint(direction), np.eye(3).ravel())


def affine_ras(
    spacing_mm: Sequence[float],
    origin_mm: Sequence[float] = (0.0, 0.0, 0.0),
    direction: np.ndarray | Sequence[float] | None = None,
) -> np.ndarray:
    """NIfTI affine, (4, 4) float64: voxel index to RAS millimetres. Arguments as in `write_nifti`, in LPS."""
    spacing = np.asarray(spacing_mm, dtype=float)
    origin = np.asarray(origin_mm, dtype=float)
    axes = np.eye(3) if direction is None else np.asarray(direction, dtype=float).reshape(3, 3)
    if spacing.shape != (3,) or not np.all(np.isfinite(spacing) & (spacing > 0)):
        raise ValueError(f"spacing_mm must be three positive numbers, got {spacing_mm}")
    if origin.shape != (3,) or not np.all(np.isfinite(origin)):
        raise ValueError(f"origin_mm must be three finite numbers, got {origin_mm}")
    if not np.allclose(np.linalg.norm(axes, axis=0), 1, atol=1e-3) or abs(np.linalg.det(axes)) < 1e-3:
        raise ValueError(f"direction must have three independent unit columns, got {axes.tolist()}")
    affine = np.eye(4)
    affine[:3, :3] = RAS_FROM_LPS @ axes * spacing
    affine[:3, 3] = RAS_FROM_LPS @ origin
    return affine


def stored(array: np.ndarray) -> np.ndarray:
    """The array in the type that goes to disk."""
    if array.ndim != 3:
        raise ValueError(f"a volume has three axes, got shape {array.shape}")
    if np.issubdtype(array.dtype, np.floating):
        return array.astype(np.float32)
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or high > MOST_VALUE:
        raise ValueError(f"label values must lie in 0..{MOST_VALUE}, got {low}..{high}")
    return array.astype(np.uint8 if high <= np.iinfo(np.uint8).max else np.uint16)
