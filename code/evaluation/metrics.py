"""Dice, Jaccard, ASD and 95HD of one case, as medpy 0.5 computes them, and their summary over cases.

Distances are exact and in float64, but sought only from surface voxels that the two masks do not share and only
inside the box around both, so a case takes a small part of medpy's time. Empty masks are never flattering: a
missed case has no distance (NaN), and a summary says how many were missed.
"""

import itertools
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from utils.errors import InputError

METRICS = ("dice", "jaccard", "asd_vox", "hd95_vox", "asd_mm", "hd95_mm")  # in the order of the papers' tables
EMPTY_RULES = ("nan", "zeros")
MEDPY_TOLERANCE = 1e-6
MM3_PER_ML = 1000
# Measured: a nearest-neighbour search takes 1 to 10 us per point, a distance transform 0.1 us per voxel.
VOXELS_PER_POINT = 40
SHELL_REACH = 4.0  # in smallest spacings: most points lie nearer, and further shells grow faster than what they find


def evaluate(
    prediction: np.ndarray,
    label: np.ndarray,
    spacing_mm: Sequence[float] | None = None,
    empty: str = "nan",
) -> dict[str, float]:
    """Overlap and surface distances of one case.

    The surface of a mask is its voxels with a 6-neighbour outside it; those on the volume border always count.
    ASD is one-directional (prediction surface to label surface), so the order of the masks matters; 95HD is the
    95th percentile of both directed distance sets pooled.

    Args:
        prediction, label: (W, H, D), any type, values 0 and 1.
        spacing_mm: voxel size along the three axes; without it there are no `_mm` and `_ml` entries.
        empty: "nan": two empty masks agree perfectly (1, 1, 0, 0); if one is empty, Dice and Jaccard are 0 and
            the distances NaN. "zeros", the public implementation: an empty prediction scores 0 in everything, which for
            a distance is perfect.
    Returns: `dice`, `jaccard` in [0, 1]; `asd_vox`, `hd95_vox` in voxels; `asd_mm`, `hd95_mm` in mm; beside them
        `diagonal_vox` and `diagonal_mm`, the distances that `summarise` charges for a missed case, and `volume_ml`
        and `label_ml`, the volumes of prediction and label.
    """
    prediction, label = _as_mask(prediction, "prediction"), _as_mask(label, "label")
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {prediction.shape} and label {label.shape} must have the same shape")
    if empty not in EMPTY_RULES:
        raise ValueError(f"empty must be one of {EMPTY_RULES}, not {empty!r}")
    spacing = None if spacing_mm is None else _as_spacing(spacing_mm)

    row = overlap(prediction, label)
    surfaces = _surfaces(prediction, label)
    row["asd_vox"], row["hd95_vox"] = in_voxels = _asd_and_hd95(*surfaces, (1.0, 1.0, 1.0))
    if spacing is not None:
        cubic = len(set(spacing)) == 1  # then the distances need no second search
        in_mm = [spacing[0] * d for d in in_voxels] if cubic else _asd_and_hd95(*surfaces, spacing)
        row["asd_mm"], row["hd95_mm"] = in_mm
    if empty == "zeros" and not prediction.any():
        row = dict.fromkeys(row, 0.0)

    row["diagonal_vox"] = volume_diagonal(label.shape)
    if spacing is not None:
        row["diagonal_mm"] = volume_diagonal(label.shape, spacing)
        for name, mask in (("volume_ml", prediction), ("label_ml", label)):
            row[name] = float(np.count_nonzero(mask) * np.prod(spacing) / MM3_PER_ML)
    return row


def class_mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over classes of the results of `evaluate` for one case.

    A class without a distance is left out of that mean; `missed_classes` counts those, of `num_classes`.
    """
    missed = sum(np.isnan(row["asd_vox"]) for row in rows)
    values = {key: [row[key] for row in rows if not np.isnan(row[key])] for key in rows[0]}
    mean = {key: float(np.mean(found)) if found else np.nan for key, found in values.items()}
    return {**mean, "missed_classes": int(missed), "num_classes": len(rows)}


def largest_components(label: np.ndarray) -> np.ndarray:
    """The largest component of each class. Args: label, (W, H, D), integers 0..C. Returns: the same, a new array."""
    kept = np.zeros_like(label)
    for number in range(1, int(label.max()) + 1):
        kept[largest_component(label == number)] = number
    return kept


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest 26-connected component of a mask; of equally large ones, the first in array order.

    Args: mask, (W, H, D), any type, values 0 and 1.
    Returns: (W, H, D), boolean, a new array; an empty mask stays empty.
    """
    mask = _as_mask(mask, "mask")
    kept = np.zeros(mask.shape, dtype=bool)
    if mask.any():
        box = _bounding_box(mask)
        components, _ = ndimage.label(mask[box], structure=np.ones((3, 3, 3)))
        sizes = np.bincount(components.ravel())
        sizes[0] = 0  # the background is no component
        kept[box] = components == sizes.argmax()
    return kept


def volume_diagonal(shape: Sequence[int], spacing_mm: Sequence[float] | None = None) -> float:
    """Length of a volume's diagonal in voxels or, given a spacing, in mm: more than any surface distance in it."""
    spacing = np.ones(len(shape)) if spacing_mm is None else np.asarray(spacing_mm, dtype=float)
    if spacing.shape != (len(shape),):
        raise ValueError(f"spacing {spacing_mm} does not fit a volume of shape {tuple(shape)}")
    return float(np.linalg.norm(np.asarray(shape) * spacing))


def summarise(rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Mean and spread over cases of every metric found in the rows.

    Args: rows, one result of `evaluate` or `class_mean` per case; other entries (say, the name of the case) are
        ignored.
    Returns: per metric `mean` and `sd` (n - 1; 0 for a single case) over the cases where it is defined;
        `missed`, the number of the other cases, or of the classes in all of them; `mean_penalised`, the mean over all
        cases, a missed one charged with the diagonal of its volume. If every case was missed, `mean` and `sd` are NaN.
    """
    if not rows:
        raise ValueError("there must be at least one row to summarise")
    return {metric: _summarise_metric(rows, metric) for metric in METRICS if metric in rows[0]}


def verify_against_medpy(
    row: dict[str, float],
    prediction: np.ndarray,
    label: np.ndarray,
    spacing_mm: Sequence[float] | None = None,
) -> None:
    """Compare a result of `evaluate` with medpy, unless a mask is empty: medpy defines no distance there.

    Raises: RuntimeError naming the metric and both values where they differ by more than 1e-6.
    """
    try:
        from medpy.metric import binary
    except ImportError as error:
        raise InputError("--verify_metrics needs medpy: leave the flag out or pip install medpy") from error
    prediction, label = _as_mask(prediction, "prediction"), _as_mask(label, "label")
    if not (prediction.any() and label.any()):
        return
    expected = {"dice": binary.dc(prediction, label), "jaccard": binary.jc(prediction, label)}
    spacings = {"vox": None} if spacing_mm is None else {"vox": None, "mm": spacing_mm}
    for unit, spacing in spacings.items():
        expected[f"asd_{unit}"] = binary.asd(prediction, label, voxelspacing=spacing)
        expected[f"hd95_{unit}"] = binary.hd95(prediction, label, voxelspacing=spacing)
    for metric, value in expected.items():
        if not abs(row[metric] - value) <= MEDPY_TOLERANCE:  # put this way round, NaN fails too
            raise RuntimeError(f"{metric} differs from medpy: {row[metric]!r} here, {float(value)!r} there")


def _as_mask(array: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim != 3:
        raise ValueError(f"{name} must be a volume (W, H, D), not of shape {array.shape}")
    if array.dtype == bool:
        return array
    mask = array != 0
    if not np.array_equal(mask, array):  # else a map of probabilities would pass for a full mask
        raise ValueError(f"{name} must hold nothing but 0 and 1")
    return mask


def _as_spacing(spacing_mm: Sequence[float]) -> tuple[float, ...]:
    spacing = tuple(float(size) for size in spacing_mm)
    if len(spacing) != 3 or not all(0 < size < np.inf for size in spacing):
        raise ValueError(f"spacing_mm must be three positive numbers, not {spacing}")
    return spacing


def overlap(prediction: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Dice and Jaccard of two boolean masks of one shape; both 1 if both are empty."""
    common = int(np.count_nonzero(prediction & label))
    total = int(np.count_nonzero(prediction) + np.count_nonzero(label))
    if total == 0:
        return {"dice": 1.0, "jaccard": 1.0}
    return {"dice": 2.0 * common / total, "jaccard": common / (total - common)}


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box around a mask; of no size for an empty one."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        occupied = np.flatnonzero(mask.any(axis=others))
        box.append(slice(occupied[0], occupied[-1] + 1) if len(occupied) else slice(0, 0))
    return tuple(box)


def _surfaces(prediction: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The surface of each mask, cut to the box around both.

    Nothing is lost by cutting: beyond the box both masks are 0, and that is what `_surface` takes to be there.
    """
    box = _bounding_box(prediction | label)
    return _surface(prediction[box]), _surface(label[box])


def _surface(mask: np.ndarray) -> np.ndarray:
    """Mask voxels with a 6-neighbour outside the mask; all that lies beyond the array is outside."""
    padded = np.pad(mask, 1)
    interior = mask.copy()
    for axis, size in enumerate(mask.shape):
        for start in (0, 2):  # the neighbour before, the neighbour after
            window = [slice(1, -1)] * mask.ndim
            window[axis] = slice(start, start + size)
            interior &= padded[tuple(window)]
    return mask & ~interior


def _asd_and_hd95(prediction: np.ndarray, label: np.ndarray, spacing: tuple[float, ...]) -> tuple[float, float]:
    """ASD and 95HD of two surfaces: (0, 0) if both are empty, (NaN, NaN) if one is."""
    present = prediction.any(), label.any()
    if not all(present):
        return (np.nan, np.nan) if any(present) else (0.0, 0.0)
    forth = _directed_distances(prediction, label, spacing)
    back = _directed_distances(label, prediction, spacing)
    return float(forth.mean()), float(np.percentile(np.concatenate((forth, back)), 95))


def _directed_distances(source: np.ndarray, target: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Distance from each voxel of `source` to the nearest of `target`, float64, in no particular order.

    Voxels of both have distance 0. Of the others the near ones are found shell by shell, what is left in a k-d tree
    or, where much is left (a very rough prediction), in a distance transform, whose cost does not grow with it.
    """
    apart = source & ~target
    distances = np.zeros(np.count_nonzero(source))
    points = np.flatnonzero(apart)
    found, points = _nearest_in_shells(points, target, spacing)
    distances[: len(found)] = found
    rest = slice(len(found), len(found) + len(points))
    if len(points) * VOXELS_PER_POINT > source.size:
        transform = ndimage.distance_transform_edt(~target, sampling=spacing)
        distances[rest] = transform.ravel()[points]
    elif len(points):
        # Settings of the tree that only matter for its speed, measured on left-atrium surfaces.
        there = _coordinates(np.flatnonzero(target), target.shape) * spacing
        tree = cKDTree(there, leafsize=32, balanced_tree=False, compact_nodes=False)
        distances[rest] = tree.query(_coordinates(points, target.shape) * spacing)[0]
    return distances


def _nearest_in_shells(
    points: np.ndarray, target: np.ndarray, spacing: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Look for the nearest target voxel among the neighbours of each point, nearest neighbours first.

    Args: points, (N,) flat indices into `target`, which is boolean. Returns: the distances of the points that have a
        target voxel within reach, and the points that have none.
    """
    reach, shells = _shells(spacing)
    padded = np.pad(target, [(steps, steps) for steps in reach])
    strides = np.array(padded.strides)  # of booleans: voxels
    occupied, at = padded.ravel(), (_coordinates(points, target.shape) + reach) @ strides
    found = [np.empty(0)]
    for distance, steps in shells:
        if not len(points):
            break
        hit = np.zeros(len(points), dtype=bool)
        for step in steps @ strides:
            hit |= occupied[at + step]
        found.append(np.full(np.count_nonzero(hit), distance))
        points, at = points[~hit], at[~hit]
    return np.concatenate(found), points


@lru_cache
def _shells(spacing: tuple[float, ...]) -> tuple[tuple[int, ...], list[tuple[float, np.ndarray]]]:
    """All steps to neighbours within SHELL_REACH of the smallest spacing, equally long ones together, by length.

    Returns: voxels per axis that a step spans at most; (length, (n, 3) steps in voxels) in ascending order.
    """
    limit = SHELL_REACH * min(spacing)
    reach = tuple(int(limit / size) for size in spacing)
    steps = np.array(list(itertools.product(*(range(-n, n + 1) for n in reach))))
    lengths = np.linalg.norm(steps * spacing, axis=1)
    return reach, [(length, steps[lengths == length]) for length in np.unique(lengths) if 0 < length <= limit]


def _coordinates(flat: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Coordinates (N, 3) of flat indices; np.argwhere takes four times as long."""
    return np.stack(np.unravel_index(flat, shape), axis=1)


def _summarise_metric(rows: Sequence[dict], metric: str) -> dict[str, float]:
    values = np.array([row[metric] for row in rows], dtype=float)
    defined = values[~np.isnan(values)]
    diagonal = f"diagonal_{metric.rpartition('_')[2]}"  # only a distance can be missing; its unit ends its name
    charged = [row[diagonal] for row in rows if np.isnan(row[metric])]
    missed, penalised = len(charged), np.concatenate((defined, charged))
    if diagonal in rows[0] and "missed_classes" in rows[0]:
        missed = sum(row["missed_classes"] for row in rows)
        penalised = np.array([_with_missed_classes(row, metric, diagonal) for row in rows])
    if len(defined) > 1:
        sd = float(defined.std(ddof=1))
    else:
        sd = 0.0 if len(defined) else np.nan
    return {
        "mean": float(defined.mean()) if len(defined) else np.nan,
        "sd": sd,
        "missed": missed,
        "mean_penalised": float(penalised.mean()),
    }


def _with_missed_classes(row: dict, metric: str, diagonal: str) -> float:
    """A distance of `class_mean`, each missed class charged with the diagonal."""
    found = row["num_classes"] - row["missed_classes"]
    total = (found * row[metric] if found else 0.0) + row["missed_classes"] * row[diagonal]
    return total / row["num_classes"]
