"""Threads: how many, and a pool whose work can be cancelled."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

from slrmerge.errors import OptionError, Problem
from slrmerge.io.sizes import shorten


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count(threads: int | None, default: int) -> int:
    """`threads`, or the default where it is None. Raises OptionError for anything but a whole number from 1 on."""
    if threads is None:
        return default
    if type(threads) is not int or threads < 1:
        what = f"{shorten(threads)} is not in range"
        raise OptionError(Problem("out-of-range", "threads", what, "give a whole number, at least 1"))
    return threads


@contextmanager
def cancellable_pool(threads: int) -> Iterator[tuple[ThreadPoolExecutor, Event]]:
    """A thread pool, and an event that is set when the block fails or is interrupted: work should then stop waiting."""
    cancelled = Event()
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield pool, cancelled
        except BaseException:
            cancelled.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
