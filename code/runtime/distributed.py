"""Several processes, one per device, as torchrun starts them: who is who, and what they tell each other.

Gradients are averaged after the backward pass of a turn. `DistributedDataParallel` would hook into the one forward
and the one backward of one module; a step here may run several networks, one network several times, a teacher without
gradients, and it closes the gradients of the player whose turn it is not. The average is the same number, knows
nothing of methods, and gives away only that sending could overlap with the backward pass.

Everything that is no tensor of a GPU goes through gloo, whose connections break at once when a process dies.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime import runs
from utils.errors import BAD_INPUT, InputError

T = TypeVar("T")

# After so long a process that is alive but silent counts as lost; one that died is noticed at once. Longer than all
# that rank 0 does while the others wait: reading the scans, a validation, a checkpoint.
TIMEOUT = timedelta(hours=1)
BUCKET = 2**23  # numbers in one message, 32 MiB: enough for full bandwidth, little beside a training step
LOST = "another process of the run failed, died or does not answer"


class PeerLost(InputError):
    """Another process of the run failed, died or does not answer. One that failed says why itself."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. Each method is called by all of them, at the same point.

    `rank` of `size` processes on all machines, `local_rank` of `local_size` on this one. Alone, every method does
    nothing and costs nothing. Raises `PeerLost` where another process does not take part.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone writes and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all are here."""
        self.largest(0)

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """Rank 0 runs a `with` block, then all others: what is wrong for all is said once."""
        if not self.leads:
            self.barrier()
        yield
        if self.leads:
            self.barrier()

    def from_leader(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank: plain data and tensors of the CPU. The others do not call `make`."""
        box = [make() if self.leads else None]
        if self.size > 1:
            with self._answered():
                dist.broadcast_object_list(box)
        return box[0]

    def to_leader(self, value: T) -> list[T] | None:
        """The values of all ranks in their order, on rank 0; None elsewhere."""
        values = [value] * self.size if self.leads else None
        if self.size > 1:
            with self._answered():
                dist.gather_object(value, values)
        return values

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers: with it they agree to stop."""
        numbers = torch.tensor(number)
        if self.size > 1:
            with self._answered():
                dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def mean(self, values: Mapping[str, float | Tensor]) -> Mapping[str, float | Tensor]:
        """The mean over ranks of numbers by name, the same names on all."""
        if self.size == 1:
            return values
        numbers = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
        with self._answered():
            dist.all_reduce(numbers)
        return dict(zip(values, (numbers / self.size).tolist(), strict=True))

    def average_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """The mean over ranks of the gradients that an optimizer is about to use.

        That is the gradient of the mean of the ranks' losses. Which parameters have one must not depend on the rank.
        In fp16 the gradients are still scaled, by the same factor on all; one that overflowed makes the mean
        overflow, so all ranks skip the same steps.
        """
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        self._in_buckets((p.grad for p in parameters if p.grad is not None), self._average)

    @torch.no_grad()
    def share_weights(self, module: nn.Module) -> None:
        """Parameters and buffers of rank 0 for all."""
        self._in_buckets(module.parameters(), self._copy_leader)
        self.share_buffers(module)

    @torch.no_grad()
    def share_buffers(self, module: nn.Module) -> None:
        """Buffers (the running statistics of batch norm) of rank 0 for all, for they are what a checkpoint holds."""
        self._in_buckets(filter(torch.is_floating_point, module.buffers()), self._copy_leader)

    def draw_anew(self, seed: int, iteration: int) -> None:
        """Give ranks above 0 random numbers (dropout, noise) of their own: a function of (seed, rank, iteration).

        Rank 0 goes on with the generators that a single process uses, and whose state a checkpoint holds.
        """
        if not self.leads:
            runs.seed_everything(int(np.random.SeedSequence([seed, self.rank, iteration]).generate_state(1)[0]))

    def _average(self, numbers: Tensor) -> None:
        dist.all_reduce(numbers)
        numbers /= self.size

    def _copy_leader(self, numbers: Tensor) -> None:
        dist.broadcast(numbers, src=0)

    def _in_buckets(self, tensors: Iterable[Tensor], exchange: Callable[[Tensor], Any]) -> None:
        """Lay tensors of one type end to end, exchange them with the other ranks, and put them back."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            numbers = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with self._answered():
                exchange(numbers)
            for tensor, part in zip(bucket, numbers.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what gloo and NCCL raise for a broken connection or a timeout
            raise PeerLost(LOST) from error


ALONE = Ranks()


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of at most `BUCKET` numbers together; a larger one goes alone."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(map(Tensor.numel, bucket)) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes of torchrun for a `with` block; without torchrun, or with one process, `ALONE`.

    All leave together at the end. The rank that fails says why, and rank 0 that another one failed or died.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        yield ALONE
        return
    ranks = _join()
    try:
        yield ranks
        ranks.barrier()
    except PeerLost:
        if ranks.leads:
            raise
        sys.exit(BAD_INPUT)
    except InputError as error:
        if ranks.leads:
            raise
        raise InputError(f"rank {ranks.rank}: {error}") from error
    dist.destroy_process_group()  # not after an error: it would wait for operations that nobody completes


def _join() -> Ranks:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the {os.environ['WORLD_SIZE']} processes that WORLD_SIZE promises did not come together "
            f"({str(error).splitlines()[0]}); start them with torchrun, or unset WORLD_SIZE"
        ) from error
    local = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    return Ranks(dist.get_rank(), dist.get_world_size(), *local)
