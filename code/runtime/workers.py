"""Processes beside the main one: that work on items while the next is being made, and that load batches."""

import contextlib
import multiprocessing
import multiprocessing.queues
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from utils.errors import InputError
from utils.machine import available_cores

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SHARED_MEMORY = Path("/dev/shm")  # through which batches travel; 64 MiB in a Docker container
LARGER = "docker run --shm-size 8g enlarges it"
AHEAD = 2  # batches that PyTorch lets each loader process make in advance
LOST_LOADER = "DataLoader worker"  # in what PyTorch raises where one of them died

Item, Result = TypeVar("Item"), TypeVar("Result")


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int, flag: str) -> Iterator[Result]:
    """`function` of every item, in the order of the items.

    Args:
        function: importable, as are its results and items: they travel between processes.
        items: made one by one, in this process. No more than `workers` + 1 are held at a time.
        workers: processes; 0 for none, one item after the other.
        flag: the one that sets `workers`, for the message if one of them dies.
    """
    if not workers:
        yield from map(function, items)
        return
    # Not forked from here: a fork copies the locks, but not the threads, of a PyTorch at work.
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker)
    pending: deque = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise InputError(
            f"a worker process died, perhaps for lack of memory; lower {flag} (0: no such process)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Leave Ctrl-C, which reaches the whole group of processes, to the first one, and end when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


# --- processes that load batches


def affordable_workers(asked: int, batch_bytes: int, processes: int = 1) -> tuple[int, list[str]]:
    """Loader processes to start: at most one for each core, and those whose batches fit into shared memory; a sentence
    where these are fewer.

    Args: processes, of this machine, that share its memory and load as many batches each.
    """
    workers = min(asked, available_cores())
    if not (workers and SHARED_MEMORY.is_dir()):
        return workers, []
    free = shutil.disk_usage(SHARED_MEMORY).free
    room = max(free // processes // batch_bytes - 1, 0) // AHEAD  # one batch is in use
    if room >= workers:
        return workers, []
    needed = (AHEAD * workers + 1) * batch_bytes * processes
    return room, [
        f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, and {workers} loader processes need {needed / 2**20:.0f}: "
        f"going on as with --num_workers {room} ({LARGER})"
    ]


def begin_loader(worker: int) -> None:
    """What a loader process does first: leave signals to the main process, and end where it cannot hand over a batch.

    Ctrl-C, `timeout` and schedulers signal a whole group of processes. Without shared memory a batch would be lost,
    and the main process would wait for it without end.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end)


def _end(error: Exception, item: Any) -> None:
    os._exit(1)


@contextlib.contextmanager
def watched_loaders() -> Iterator[None]:
    """A loader process that dies becomes an `InputError`; PyTorch raises wherever the main process is."""
    try:
        yield
    except RuntimeError as error:
        if LOST_LOADER not in str(error):
            raise
        raise InputError(
            f"a loader process died, perhaps for lack of memory or of room in {SHARED_MEMORY} ({LARGER}); lower "
            "--num_workers (0: no such process), and continue with --resume"
        ) from error


def end_loaders(batches: Iterator[Any]) -> None:
    """End the processes behind an iterator over a `DataLoader`, also those that do not answer."""
    if processes := getattr(batches, "_workers", []):
        batches._shutdown_workers()  # waits for each, but not for ever
        for process in processes:
            process.kill()
