"""What happens to a scan before a network sees it, as a record that a run carries along, and the way back.

A prepared data folder holds the record in `preprocessing.json`; training copies it into the checkpoint, so that a run
folder alone suffices to segment a new scan.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scans.files import Scan, apply_turn, orientation_of, reorient, turn_to, undo_turn
from scans.region import Box, moved
from utils.errors import InputError
from utils.labels import label_map, one_hot
from utils.resample import Size, resample
from utils.words import counted

RECORD = "preprocessing.json"  # in a prepared data folder
NORMALISATIONS = ("zscore", "percentile", "none")
LETTERS = ("LR", "PA", "IS")  # one of each makes an orientation
FLOAT32_MAX = float(np.finfo(np.float32).max)
BYTES = 20  # per voxel that normalising and resampling take, in double precision


@dataclass(frozen=True)
class Preprocessing:
    """Normalise a scan, then turn its axes, then resample it. The defaults are the rule of the published LA files.

    spacing_mm: voxel size to resample to, along the axes after turning; None keeps the grid. The number of voxels is
        rounded and the extent kept, so that the true voxel size may differ by up to half a voxel over the extent.
    normalise: `zscore` with mean and standard deviation of the whole scan, zeros included; `percentile` clips at
        `percentiles` (in percent, of the whole scan) and maps them to 0 and 1; `none`.
    orientation: directions that the axes run to, e.g. "RAS", to the nearest (no voxel changes); None keeps the axes.
    fill_nan: value that replaces NaN and infinite voxels before anything else; None refuses them.
    """

    spacing_mm: tuple[float, float, float] | None = None
    normalise: str = "zscore"
    percentiles: tuple[float, float] = (0.5, 99.5)
    orientation: str | None = None
    fill_nan: float | None = None

    def __post_init__(self):
        spacing, low_high = self.spacing_mm, self.percentiles
        if spacing is not None and not (len(spacing) == 3 and all(0 < mm < np.inf for mm in spacing)):
            raise InputError(f"the spacing must be three positive numbers of mm; it is {spacing}")
        if self.normalise not in NORMALISATIONS:
            raise InputError(f"the normalisation must be among {', '.join(NORMALISATIONS)}; it is {self.normalise}")
        if len(low_high) != 2 or not 0 <= low_high[0] < low_high[1] <= 100:
            raise InputError(f"the percentiles must rise and lie in 0..100; they are {low_high}")
        code = self.orientation
        if code is not None and sorted(code) != sorted(_letter(code, pair) for pair in LETTERS):
            raise InputError(f"the orientation must have one letter each of L/R, P/A and I/S, as RAS; it is {code}")

    def apply(self, scan: Scan) -> tuple[np.ndarray, "Placement"]:
        """What the network sees, (W, H, D) float32, contiguous; and where it lies in the scan, for the way back.

        A constant scan, or one with voxels that are not finite, is an `InputError` without the scan's name.
        """
        place = self.place(scan)
        return resample(apply_turn(self._normalised(scan.array), place.turn), place.shape), place

    def memory(self, scan: Scan) -> int:
        """Estimate of the bytes that `apply` takes beside the scan."""
        return BYTES * max(scan.array.size, math.prod(self.place(scan).shape))

    def place(self, scan: Scan) -> "Placement":
        """Where the processed image will lie in the scan; the values of its voxels do not matter."""
        code = self.orientation or orientation_of(scan.affine)
        turned = reorient(scan, code)
        shape = turned.array.shape
        if self.spacing_mm is not None:
            pairs = zip(shape, turned.spacing_mm, self.spacing_mm, strict=True)
            shape = tuple(max(1, round(n * mm / target)) for n, mm, target in pairs)
        return Placement(scan, turned, turn_to(scan.affine, code), shape)

    def filled(self, array: np.ndarray) -> np.ndarray:
        """The array with `fill_nan` where it is not finite."""
        return array if self.fill_nan is None else np.where(np.isfinite(array), array, self.fill_nan)

    def _normalised(self, array: np.ndarray) -> np.ndarray:
        """(W, H, D) float32."""
        array = self.filled(array)
        if bad := int(np.count_nonzero(~np.isfinite(array))):
            raise InputError(
                f"the scan is NaN or infinite in {counted(bad, 'voxel')}; --fill_nan 0 of prepare_scans.py and "
                "predict.py replaces these"
            )
        low, high = float(array.min()), float(array.max())
        if (most := max(abs(low), abs(high))) > FLOAT32_MAX:
            raise InputError(f"the scan has values up to {most:g}, beyond float32; export it again")
        if self.normalise == "none":
            return array.astype(np.float32)
        if self.normalise == "zscore":
            shift, width = array.mean(dtype=np.float64), array.std(dtype=np.float64)
        else:
            shift, top = np.percentile(array, self.percentiles)
            array, width = np.clip(array, shift, top), top - shift
        if low == high or not width > 0:  # a standard deviation of equal numbers may miss 0 by rounding
            raise InputError(f"the scan is constant: its {self.normalise} width is {width:g}; leave it out")
        return ((array - shift) / width).astype(np.float32)

    # --- the record

    def as_record(self) -> dict[str, Any]:
        """Plain data for JSON and checkpoints."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any] | None) -> "Preprocessing":
        """Inverse of `as_record`; None, for the published LA files and runs on them, gives their rule."""
        record = dict(record or {})
        if foreign := sorted(set(record) - {field.name for field in dataclasses.fields(cls)}):
            raise InputError(f"the preprocessing record has an unknown entry {foreign[0]}; update this code")
        try:
            return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in record.items()})
        except TypeError as error:
            raise InputError(f"the preprocessing record is invalid ({error}); prepare the data again") from error


def _letter(code: str, pair: str) -> str:
    return next((letter for letter in code if letter in pair), "?")


def read_record(root: Path) -> dict[str, Any] | None:
    """The record of a data folder, checked; None where there is none, as with the published LA files."""
    path = Path(root) / RECORD
    try:
        return Preprocessing.from_record(json.loads(path.read_text(encoding="utf-8"))).as_record()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, InputError) as error:
        raise InputError(f"{path} cannot be read ({error}); prepare the data again") from error


@dataclass(frozen=True, eq=False)
class Placement:
    """Where a processed image lies in the scan that it is made from."""

    scan: Scan
    turned: Scan  # the same voxels along the axes of the processed image
    turn: np.ndarray  # of the axes, as `scans.turn_to` gives it
    shape: Size  # of the processed image

    @property
    def affine(self) -> np.ndarray:
        """(4, 4), RAS mm, of the processed grid, which covers the extent of the scan."""
        step = np.divide(self.turned.array.shape, self.shape)  # voxels of the scan per voxel
        scale = np.diag([*step, 1.0])
        scale[:3, 3] = (step - 1) / 2
        return self.turned.affine @ scale

    def box_in_image(self, box: Box) -> Box:
        """The processed voxels that a box of the scan touches."""
        return moved(box, np.linalg.inv(self.affine) @ self.scan.affine, self.shape)

    def box_in_scan(self, box: Box) -> Box:
        """The voxels of the scan that a box of its processed image touches."""
        return moved(box, np.linalg.inv(self.scan.affine) @ self.affine, self.scan.array.shape)

    def place_label(self, label: np.ndarray) -> np.ndarray:
        """A label on the scan's grid -> uint8 on the processed one: what fills most of a voxel, a class or background.

        Each class is resampled by itself, area average where voxels grow, trilinear where they shrink; numbers of
        classes are never interpolated. One class is foreground where it fills more than half of a voxel.
        Args: label, (W, H, D), integers 0..C or boolean.
        """
        turned = apply_turn(label, self.turn)
        if turned.shape == self.shape:
            return np.ascontiguousarray(turned, dtype=np.uint8)
        masks = one_hot(turned, max(1, int(turned.max())))
        return label_map(np.stack([resample(mask, self.shape) for mask in masks]), exclusive=True)

    def restore(self, volume: np.ndarray) -> np.ndarray:
        """A probability or signed map on the processed grid -> float32 on the scan's own, of its shape exactly.

        Trilinear where voxels shrink, area average where they grow; what was not resampled comes back unchanged.
        """
        if volume.shape != self.shape:
            raise ValueError(f"the volume has shape {volume.shape}, the processed image {self.shape}")
        return np.ascontiguousarray(undo_turn(resample(volume, self.turned.array.shape), self.turn))
