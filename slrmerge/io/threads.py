"""Threads: how many, a pool whose work can be cancelled, and a time limit."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, current_thread, main_thread
from types import FrameType

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


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block of Python code that runs longer; no limit outside the main thread, or on Windows.

    An earlier timer of the same signal is paused meanwhile.
    """

    def stop(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 (signal's interface)
        raise TimeoutError(f"not finished within {seconds:g} s")

    if not hasattr(signal, "setitimer") or current_thread() is not main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, stop)
    delay, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, delay, interval)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
