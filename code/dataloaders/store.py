"""Images of all cases and labels of the labeled ones, in memory or read from their files at each use."""

import math
from argparse import Namespace
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import nibabel as nib
import numpy as np

from dataloaders import case_files
from dataloaders.augment import transposed
from utils.errors import InputError
from utils.files import repository_path
from utils.labels import one_hot
from utils.machine import available_cores, available_memory
from utils.nifti import affine_ras
from utils.resample import Size, resample, scaled_shape


class CaseStore:
    """Images of all cases and labels of the labeled ones, decoded once (`ram`) or read at each use (`none`)."""

    def __init__(self, options: Namespace, labeled: list[str], unlabeled: list[str], processes: int = 1):
        """`processes` of this machine share its memory, each with a store of its own."""
        self.root, self.scale = repository_path(options.root_path), options.scale
        self.num_classes = options.num_classes or 1
        self.absent = set(range(1, self.num_classes + 1))  # classes that no labeled case holds
        self.labeled = frozenset(labeled)
        names = [*labeled, *unlabeled]
        self.native = {name: case_files.read_shape(self.root, name) for name in names}
        self.shapes = {name: scaled_shape(shape, self.scale) for name, shape in self.native.items()}
        self.in_memory = options.cache == "ram" and self._fits(processes)
        self.notices = [] if self.in_memory or options.cache == "none" else [_no_room_notice()]
        self.notices += self._small_volumes_notice(tuple(options.patch_size))
        self._images: dict[str, np.ndarray] = {}
        self._labels: dict[str, np.ndarray] = {}
        with ThreadPoolExecutor(min(8, available_cores())) as pool:
            if self.in_memory:
                self._images = dict(zip(names, pool.map(self._decode_image, names), strict=True))
                self._labels = dict(zip(labeled, pool.map(self._decode_label, labeled), strict=True))
            else:  # a crop does not show all faults of a label: look for them once
                for _ in pool.map(self._read_label, labeled):
                    pass

    def typical_scan(self) -> dict[str, Any]:
        """What new scans are measured by: medians of `shape` (voxels, native) and `spacing_mm` along W, H, D, the most
        frequent `orientation` of these axes, e.g. "LPS", and the median `mean` of the images.

        The mean is 0 for scans that were z-scored as they are, another for parts of such scans; None without a cache.
        Geometry is that of at most `TYPICAL_CASES` cases.
        """
        some = [*self.native][:: 1 + len(self.native) // TYPICAL_CASES]
        geometries = [case_files.read_geometry(self.root, name) for name in some]
        orientations = ["".join(nib.aff2axcodes(affine_ras(*geometry))) for geometry in geometries]
        means = [image.mean(dtype=np.float64) for image in self._images.values()]
        return {
            "shape": np.median([*self.native.values()], axis=0).tolist(),
            "spacing_mm": np.median([spacing for spacing, _, _ in geometries], axis=0).tolist(),
            "orientation": Counter(orientations).most_common(1)[0][0],
            "mean": float(np.median(means)) if means else None,
        }

    def _fits(self, processes: int) -> bool:
        voxels = {name: math.prod(shape) for name, shape in self.shapes.items()}
        of_label = np.dtype(np.uint8).itemsize if self.scale == 1 else self.num_classes * np.dtype(np.float32).itemsize
        images = sum(voxels.values()) * np.dtype(np.float32).itemsize
        labels = sum(voxels[name] for name in self.labeled) * of_label
        return images + labels < MEMORY_SHARE * available_memory() / processes

    def _small_volumes_notice(self, patch: Size) -> list[str]:
        """One notice if any volume is smaller than the patch, upright or turned by 90 degrees; else none."""
        widest = np.maximum(patch, transposed(patch))
        small = sum(any(np.less(shape, widest)) for shape in self.shapes.values())
        if not small:
            return []
        return [
            f"{small} of {len(self.shapes)} volumes are smaller than the patch {patch} along some axis; "
            "they are padded with their minimum"
        ]

    def _decode_image(self, name: str) -> np.ndarray:
        return resample(case_files.read_image(self.root, name), self.shapes[name])

    def _decode_label(self, name: str) -> np.ndarray:
        """The numbers of the classes, (W, H, D) uint8; at another scale the share of each, (C, W, H, D) float32."""
        label = self._read_label(name)
        if self.scale == 1:
            return label
        return np.stack([resample(mask, self.shapes[name]) for mask in one_hot(label, self.num_classes)])

    def _read_label(self, name: str) -> np.ndarray:
        label = case_files.read_label(self.root, name, self.num_classes)
        self.absent.difference_update([number for number in tuple(self.absent) if number in label])
        return label

    def image(self, name: str, start: Size, size: Size) -> np.ndarray:
        """A region of an image; outside the volume lies the image's minimum."""
        if name not in self._images and self.scale == 1:
            return self._read_crop(name, case_files.IMAGE_KEY, start, size)
        volume = self._images[name] if name in self._images else self._decode_image(name)
        return read_region(volume, start, size, fill=volume.min() if any(np.less(volume.shape, size)) else 0)

    def label(self, name: str, start: Size, size: Size) -> np.ndarray:
        """A region of a label, (C, W, H, D), 0 to 1; outside the volume lies background. Unlabeled cases have none."""
        if name not in self.labeled:
            raise ValueError(f"case {name} is unlabeled: its label must not be read")
        if name not in self._labels and self.scale == 1:
            region = self._read_crop(name, case_files.LABEL_KEY, start, size)
        else:
            volume = self._labels[name] if name in self._labels else self._decode_label(name)
            region = read_region(volume, start, size, fill=0)
        return one_hot(region, self.num_classes) if self.scale == 1 else region

    def _read_crop(self, name: str, key: str, start: Size, size: Size) -> np.ndarray:
        """Only the voxels that are needed, from the file; the fill value costs a whole read where it is needed."""
        low = tuple(max(s, 0) for s in start)
        high = tuple(min(s + n, length) for s, n, length in zip(start, size, self.native[name], strict=True))
        inside = case_files.read_crop(self.root, name, key, low, tuple(np.subtract(high, low)))
        if not np.isfinite(inside).all():
            raise InputError(
                f"{case_files.case_path(self.root, name)}: '{key}' has voxels that are NaN or infinite; "
                "write finite values"
            )
        if inside.shape == tuple(size):
            return inside
        fill = case_files.read_image(self.root, name).min() if key == case_files.IMAGE_KEY else 0
        return read_region(inside, tuple(np.subtract(start, low)), size, fill)


def read_region(volume: np.ndarray, start: Size, size: Size, fill: float) -> np.ndarray:
    """A region of (..., W, H, D) that may exceed the volume; what lies outside is `fill`."""
    low = [max(s, 0) for s in start]
    high = [min(s + n, length) for s, n, length in zip(start, size, volume.shape[-3:], strict=True)]
    inside = volume[..., *(slice(a, b) for a, b in zip(low, high, strict=True))]
    if inside.shape[-3:] == tuple(size):
        return inside
    region = np.full((*volume.shape[:-3], *size), fill, dtype=inside.dtype)
    region[..., *(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))] = inside
    return region


def _no_room_notice() -> str:
    return "the decoded cases do not fit into the free memory: reading from the files as with --cache none"


TYPICAL_CASES = 100  # of thousands: opening each of them three times would delay the start


MEMORY_SHARE = 0.6  # of the free memory that decoded cases may take before --cache ram falls back to none
