"""Boxes of voxels: what --roi names, and where a box lies on another grid."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from utils.errors import InputError
from utils.resample import Size

Box = tuple[slice, slice, slice]

FULL, CENTER = "full", "center"
EDGE_ROUNDING = 1e-6  # voxels by which an edge may miss a whole number
AXIS = re.compile(r"(\d*):(\d*)")


def require_roi(text: str) -> None:
    """Refuse a text that --roi cannot mean in any scan."""
    if text not in (FULL, CENTER):
        _axes(text)


def _axes(text: str) -> list[re.Match]:
    axes = [AXIS.fullmatch(axis.strip()) for axis in text.split(",")]
    if len(axes) != 3 or None in axes:
        raise InputError(f"--roi {text} must be {FULL}, {CENTER} or x0:x1,y0:y1,z0:z1, in voxels of the input scan")
    return axes


def parse_roi(text: str, shape: Size) -> Box:
    """The box that `x0:x1,y0:y1,z0:z1` names in a volume: voxels from 0, ends not included, a missing one the border.

    An unreadable text, and a box that is empty or leaves the volume, is an `InputError`.
    """
    bounds = [(int(axis[1] or 0), int(axis[2] or length)) for axis, length in zip(_axes(text), shape, strict=True)]
    if any(not 0 <= a < b <= length for (a, b), length in zip(bounds, shape, strict=True)):
        size = " x ".join(map(str, shape))
        raise InputError(f"--roi {text} must lie in the scan of {size} voxels, each start before its end")
    return tuple(slice(a, b) for a, b in bounds)


def whole(shape: Size) -> Box:
    """All of a volume."""
    return tuple(slice(0, length) for length in shape)


def central(shape: Size, size: Sequence[int]) -> Box:
    """The box of a size about the centre of a volume; where the volume is smaller, all of it."""
    starts = [max(length - wanted, 0) // 2 for length, wanted in zip(shape, size, strict=True)]
    return tuple(slice(a, min(a + wanted, length)) for a, wanted, length in zip(starts, size, shape, strict=True))


def hull(boxes: Iterable[Box]) -> Box:
    """The smallest box around all."""
    return tuple(slice(min(a.start for a in axis), max(a.stop for a in axis)) for axis in zip(*boxes, strict=True))


def size_of(box: Box) -> Size:
    """Voxels along each axis."""
    return tuple(axis.stop - axis.start for axis in box)


def moved(box: Box, matrix: np.ndarray, shape: Size) -> Box:
    """A box on another grid, whose axes run along the same directions; voxel k covers [k - 0.5, k + 0.5]."""
    corners = np.array([[axis.start - 0.5 for axis in box], [axis.stop - 0.5 for axis in box]])
    moved = corners @ matrix[:3, :3].T + matrix[:3, 3] + 0.5
    low = np.floor(moved.min(axis=0) + EDGE_ROUNDING).astype(int)
    high = np.ceil(moved.max(axis=0) - EDGE_ROUNDING).astype(int)
    bounds = zip(np.maximum(low, 0).tolist(), np.minimum(high, shape).tolist(), strict=True)
    return tuple(slice(a, b) for a, b in bounds)
