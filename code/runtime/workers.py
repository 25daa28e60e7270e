"""Work on items in processes of their own while the next item is being made."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from utils.errors import InputError

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
    pool = ProcessPoolExecutor(workers, context, initializer=_leave_interrupts)
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


def _leave_interrupts() -> None:
    """Ctrl-C reaches the whole group of processes; the first one alone answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
