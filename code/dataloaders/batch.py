"""From cases to batches: each batch is a pure function of (seed, iteration), whatever the number of workers.

Labeled cases come first in a batch; labels of unlabeled cases are never opened.
"""

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataloaders.augment import apply_intensity, apply_transform, draw_transform
from dataloaders.store import CaseStore
from runtime.distributed import ALONE, Ranks
from runtime.workers import begin_loader, end_loaders
from utils.errors import InputError
from utils.sdm import signed_distance_batch

LABELED, UNLABELED = 0, 1  # names of the two streams in the random keys
ORDER, CROP = 0, 1  # what a random key is for; without it, an order and a crop would share their random numbers


@dataclass(frozen=True)
class Batch:
    """`image` (B, 1, W, H, D) float32, labeled cases first; `label` (L, C, W, H, D) float32 in [0, 1].

    `sdm` holds the signed distance maps of the labels, of their shape, for a method that asks for them.
    """

    image: Tensor
    label: Tensor
    cases: tuple[str, ...]
    sdm: Tensor | None = None

    @property
    def num_labeled(self) -> int:
        return self.label.shape[0]

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> "Batch":
        """The batch on a device; the image in the memory format that the networks use."""
        batch = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(batch, image=batch.image.contiguous(memory_format=memory_format))

    def pin_memory(self) -> "Batch":
        """Called by the loader, for transfers that overlap with computation."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        sdm = None if self.sdm is None else change(self.sdm)
        return replace(self, image=change(self.image), label=change(self.label), sdm=sdm)


def stream_case(names: list[str], seed: int, stream: int, position: int) -> str:
    """The case at a position of an endless stream of full permutations, without carrying any state."""
    epoch, index = divmod(position, len(names))
    return names[np.random.default_rng([seed, ORDER, stream, epoch]).permutation(len(names))[index]]


class BatchStream(Dataset):
    """`stream[iteration]` is the batch of that iteration, for one of the ranks.

    The batches of all ranks, end to end, are that of a single process with --batch_size and --labeled_bs times the
    number of ranks: consecutive positions of both streams, so no two ranks share a crop. With `sdm_empty`, the rule
    for crops without foreground, a batch also holds the distance maps of its labels: workers compute them while the
    device computes the step before.
    """

    def __init__(
        self,
        options: Namespace,
        store: CaseStore,
        labeled: list[str],
        unlabeled: list[str],
        ranks: Ranks = ALONE,
        sdm_empty: str | None = None,
    ):
        self.sdm_empty = sdm_empty
        self.options, self.store, self.rank, self.size = options, store, ranks.rank, ranks.size
        self.streams = [(labeled, LABELED, options.labeled_bs)]
        if options.batch_size > options.labeled_bs:
            self.streams.append((unlabeled, UNLABELED, options.batch_size - options.labeled_bs))

    def __len__(self) -> int:
        return self.options.max_iterations

    @property
    def batch_bytes(self) -> int:
        """Of one batch: images, labels and distance maps, float32."""
        of_labels = self.store.num_classes * (1 if self.sdm_empty is None else 2)
        crops = self.options.batch_size + self.options.labeled_bs * of_labels
        return crops * math.prod(self.options.patch_size) * np.dtype(np.float32).itemsize

    def __getitem__(self, iteration: int) -> Batch:
        images, labels, cases = [], [], []
        for names, stream, count in self.streams:
            for slot in range(self.rank * count, (self.rank + 1) * count):
                case = stream_case(names, self.options.seed, stream, iteration * self.size * count + slot)
                rng = np.random.default_rng([self.options.seed, CROP, stream, iteration, slot])
                transform = draw_transform(rng, self.store.shapes[case], tuple(self.options.patch_size), self.options)
                region = transform.start, transform.size
                crop = apply_transform(transform, self.store.image(case, *region))
                images.append(apply_intensity(crop, transform.intensity)[None])
                if stream == LABELED:
                    labels.append(apply_transform(transform, self.store.label(case, *region)))
                cases.append(case)
        label = _stack(labels)
        sdm = None if self.sdm_empty is None else signed_distance_batch(label, self.sdm_empty)
        return Batch(_stack(images), label, tuple(cases), sdm)


def _stack(crops: list[np.ndarray]) -> Tensor:
    """(N, C, W, H, D) float32: the only copy of crops that were neither padded nor resampled."""
    return torch.from_numpy(np.stack(crops, dtype=np.float32))


def make_loader(stream: BatchStream, start: int, num_workers: int, pin_memory: bool) -> DataLoader:
    """Batches from iteration `start` on, in order.

    An item may be an `InputError`: see `delivered`.
    The loader has a generator of its own: otherwise starting it would draw from the global one, and a resumed run
    would not continue with the random numbers of the checkpoint. On Linux workers are forked, whatever Python's
    default: they share the decoded cases with this process, and started in another way each would get a copy.
    """
    return DataLoader(
        _Carrier(stream),
        None,
        sampler=range(start, len(stream)),
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        pin_memory=pin_memory,
        worker_init_fn=begin_loader,
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
    batches = iter(loader)
    try:
        for item in batches:
            if isinstance(item, InputError):
                raise item
            yield item
    finally:
        end_loaders(batches)
