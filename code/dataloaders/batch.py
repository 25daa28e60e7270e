"""From cases to batches: each batch is a pure function of (seed, iteration), whatever the number of workers.

Labeled cases come first in a batch; labels of unlabeled cases are never opened.
"""

import math
import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataloaders import la_heart
from dataloaders.augment import Size, apply_intensity, apply_transform, draw_transform, transposed
from reporting.nifti import affine_ras
from utils.distributed import ALONE, Ranks
from utils.errors import InputError
from utils.options import repository_path

LABELED, UNLABELED = 0, 1  # names of the two streams in the random keys
ORDER, CROP = 0, 1  # what a random key is for; without it, an order and a crop would share their random numbers
TYPICAL_CASES = 100  # of thousands: opening each of them three times would delay the start
MEMORY_SHARE = 0.6  # of the free memory that decoded cases may take before --cache ram falls back to none


@dataclass(frozen=True)
class Batch:
    """`image` (B, 1, W, H, D) float32, labeled cases first; `label` (L, 1, W, H, D) float32 in [0, 1]."""

    image: Tensor
    label: Tensor
    cases: tuple[str, ...]

    @property
    def num_labeled(self) -> int:
        return self.label.shape[0]

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> "Batch":
        """The batch on a device; the image in the memory format that the networks use."""
        image = self.image.to(device, non_blocking=True).contiguous(memory_format=memory_format)
        return replace(self, image=image, label=self.label.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by the loader, for transfers that overlap with computation."""
        return replace(self, image=self.image.pin_memory(), label=self.label.pin_memory())


def resample(volume: np.ndarray, size: Size) -> np.ndarray:
    """A volume on another grid over the same extent: exact area averages along axes that shrink, else trilinear.

    Args: volume, (W, H, D). Returns: `size`, float32, contiguous; the array itself where that changes nothing.
    """
    for axis, length in enumerate(size):
        if length < volume.shape[axis]:
            volume = _average(volume, axis, length)
    volume = np.ascontiguousarray(volume, dtype=np.float32)
    if volume.shape == tuple(size):
        return volume
    tensor = torch.from_numpy(volume)[None, None]
    return F.interpolate(tensor, size=tuple(size), mode="trilinear", align_corners=False)[0, 0].numpy()


def _average(volume: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Mean of each of `length` equal parts of an axis, which may begin and end within a voxel; float64.

    The parts of torch's `area` mode are rounded to whole voxels and overlap: from 145 to 72 voxels it adds 0.7 % to
    the foreground of a label.
    """
    volume = np.moveaxis(volume, axis, 0)
    total = np.concatenate([np.zeros((1, *volume.shape[1:])), np.cumsum(volume, axis=0, dtype=np.float64)])
    edges = np.arange(length + 1) * len(volume) / length
    below = np.minimum(edges.astype(int), len(volume) - 1)
    part = (edges - below)[:, None, None]
    at_edges = (1 - part) * total[below] + part * total[below + 1]
    return np.moveaxis(np.diff(at_edges, axis=0) * (length / len(volume)), 0, axis)


def scaled_shape(shape: Size, scale: float) -> Size:
    """Size of a volume at --scale, at least one voxel per axis."""
    return tuple(max(1, round(length * scale)) for length in shape)


def read_region(volume: np.ndarray, start: Size, size: Size, fill: float) -> np.ndarray:
    """A region that may exceed the volume; what lies outside is `fill`."""
    low = [max(s, 0) for s in start]
    high = [min(s + n, length) for s, n, length in zip(start, size, volume.shape, strict=True)]
    inside = volume[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    if inside.shape == tuple(size):
        return inside
    region = np.full(size, fill, dtype=inside.dtype)
    region[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))] = inside
    return region


class CaseStore:
    """Images of all cases and labels of the labeled ones, decoded once (`ram`) or read at each use (`none`)."""

    def __init__(self, options: Namespace, labeled: list[str], unlabeled: list[str], processes: int = 1):
        """`processes` of this machine share its memory, each with a store of its own."""
        self.root, self.scale = repository_path(options.root_path), options.scale
        self.labeled = frozenset(labeled)
        names = [*labeled, *unlabeled]
        self.native = {name: la_heart.read_shape(self.root, name) for name in names}
        self.shapes = {name: scaled_shape(shape, self.scale) for name, shape in self.native.items()}
        self.in_memory = options.cache == "ram" and self._fits(processes)
        self.notices = [] if self.in_memory or options.cache == "none" else [_no_room_notice()]
        self.notices += self._small_volumes_notice(tuple(options.patch_size))
        self._images: dict[str, np.ndarray] = {}
        self._labels: dict[str, np.ndarray] = {}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            if self.in_memory:
                self._images = dict(zip(names, pool.map(self._decode_image, names), strict=True))
                self._labels = dict(zip(labeled, pool.map(self._decode_label, labeled), strict=True))
            else:  # a crop does not show all faults of a label: look for them once
                for _ in pool.map(partial(la_heart.read_label, self.root), labeled):
                    pass

    def typical_scan(self) -> dict[str, Any]:
        """What new scans are measured by: medians of `shape` (voxels, native) and `spacing_mm` along W, H, D, the most
        frequent `orientation` of these axes, e.g. "LPS", and the median `mean` of the images.

        The mean is 0 for scans that were z-scored as they are, another for parts of such scans; None without a cache.
        Geometry is that of at most `TYPICAL_CASES` cases.
        """
        some = [*self.native][:: 1 + len(self.native) // TYPICAL_CASES]
        geometries = [la_heart.read_geometry(self.root, name) for name in some]
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
        label_type = np.uint8 if self.scale == 1 else np.float32
        images = sum(voxels.values()) * np.dtype(np.float32).itemsize
        labels = sum(voxels[name] for name in self.labeled) * np.dtype(label_type).itemsize
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
        return resample(la_heart.read_image(self.root, name), self.shapes[name])

    def _decode_label(self, name: str) -> np.ndarray:
        label = la_heart.read_label(self.root, name)
        return label if self.scale == 1 else resample(label, self.shapes[name])

    def image(self, name: str, start: Size, size: Size) -> np.ndarray:
        """A region of an image; outside the volume lies the image's minimum."""
        if name not in self._images and self.scale == 1:
            return self._read_crop(name, la_heart.IMAGE_KEY, start, size)
        volume = self._images[name] if name in self._images else self._decode_image(name)
        return read_region(volume, start, size, fill=volume.min() if any(np.less(volume.shape, size)) else 0)

    def label(self, name: str, start: Size, size: Size) -> np.ndarray:
        """A region of a label; outside the volume lies background. Unlabeled cases have none."""
        if name not in self.labeled:
            raise ValueError(f"case {name} is unlabeled: its label must not be read")
        if name not in self._labels and self.scale == 1:
            return self._read_crop(name, la_heart.LABEL_KEY, start, size)
        volume = self._labels[name] if name in self._labels else self._decode_label(name)
        return read_region(volume, start, size, fill=0)

    def _read_crop(self, name: str, key: str, start: Size, size: Size) -> np.ndarray:
        """Only the voxels that are needed, from the file; the fill value costs a whole read where it is needed."""
        low = tuple(max(s, 0) for s in start)
        high = tuple(min(s + n, length) for s, n, length in zip(start, size, self.native[name], strict=True))
        inside = la_heart.read_crop(self.root, name, key, low, tuple(np.subtract(high, low)))
        if not np.isfinite(inside).all():
            raise InputError(
                f"{la_heart.case_path(self.root, name)}: '{key}' has voxels that are NaN or infinite; "
                "write finite values"
            )
        if inside.shape == tuple(size):
            return inside
        fill = la_heart.read_image(self.root, name).min() if key == la_heart.IMAGE_KEY else 0
        return read_region(inside, tuple(np.subtract(start, low)), size, fill)


def stream_case(names: list[str], seed: int, stream: int, position: int) -> str:
    """The case at a position of an endless stream of full permutations, without carrying any state."""
    epoch, index = divmod(position, len(names))
    return names[np.random.default_rng([seed, ORDER, stream, epoch]).permutation(len(names))[index]]


class BatchStream(Dataset):
    """`stream[iteration]` is the batch of that iteration, for one of the ranks.

    The batches of all ranks, end to end, are that of a single process with so many times --batch_size and
    --labeled_bs: consecutive positions of both streams, so no two ranks share a crop.
    """

    def __init__(
        self,
        options: Namespace,
        store: CaseStore,
        labeled: list[str],
        unlabeled: list[str],
        ranks: Ranks = ALONE,
    ):
        self.options, self.store, self.rank, self.size = options, store, ranks.rank, ranks.size
        self.streams = [(labeled, LABELED, options.labeled_bs)]
        if options.batch_size > options.labeled_bs:
            self.streams.append((unlabeled, UNLABELED, options.batch_size - options.labeled_bs))

    def __len__(self) -> int:
        return self.options.max_iterations

    def __getitem__(self, iteration: int) -> Batch:
        images, labels, cases = [], [], []
        for names, stream, count in self.streams:
            for slot in range(self.rank * count, (self.rank + 1) * count):
                case = stream_case(names, self.options.seed, stream, iteration * self.size * count + slot)
                rng = np.random.default_rng([self.options.seed, CROP, stream, iteration, slot])
                transform = draw_transform(rng, self.store.shapes[case], tuple(self.options.patch_size), self.options)
                crop = apply_transform(transform, lambda *region, case=case: self.store.image(case, *region))
                images.append(apply_intensity(crop, transform.intensity))
                if stream == LABELED:
                    labels.append(
                        apply_transform(transform, lambda *region, case=case: self.store.label(case, *region))
                    )
                cases.append(case)
        return Batch(_stack(images), _stack(labels), tuple(cases))


def _stack(crops: list[np.ndarray]) -> Tensor:
    """(N, 1, W, H, D) float32: the only copy of crops that were neither padded nor resampled."""
    return torch.from_numpy(np.stack(crops, dtype=np.float32)[:, None])


def make_loader(stream: BatchStream, start: int, num_workers: int, pin_memory: bool) -> DataLoader:
    """Batches from iteration `start` on, in order; more workers than cores are not started.

    An item may be an `InputError`: see `delivered`.
    The loader has a generator of its own: otherwise starting it would draw from the global one, and a resumed run
    would not continue with the random numbers of the checkpoint. On Linux workers are forked, whatever Python's
    default: they share the decoded cases with this process, and started in another way each would get a copy.
    """
    workers = min(num_workers, os.cpu_count() or 1)
    return DataLoader(
        _Carrier(stream),
        None,
        sampler=range(start, len(stream)),
        num_workers=workers,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )


class _Carrier(Dataset):
    """Hands an `InputError` on as an item: raised in a worker process, it would arrive wrapped in a traceback."""

    def __init__(self, stream: BatchStream):
        self.stream = stream

    def __getitem__(self, iteration: int) -> Batch | InputError:
        try:
            return self.stream[iteration]
        except InputError as error:
            return error


def delivered(loader: DataLoader) -> Iterator[Batch]:
    """The batches of a loader; an `InputError` on the way is raised here, in the main process."""
    for item in loader:
        if isinstance(item, InputError):
            raise item
        yield item


def available_memory() -> int:
    """Bytes that can be used without swapping; files kept in the page cache count as free."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024  # given in kB
    except (OSError, KeyError):  # not Linux: all that is installed
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _no_room_notice() -> str:
    return "the decoded cases do not fit into the free memory: reading from the files as with --cache none"
