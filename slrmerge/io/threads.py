"""Threads: how many, pools of them, one whose work can be cancelled; limits on time and memory."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from ctypes import c_ulong, py_object, pythonapi
from pathlib import Path
from threading import Event, Lock, Timer, get_ident
from time import sleep
from typing import ParamSpec, TypeVar

from slrmerge.errors import LimitError, OptionError, Problem

P = ParamSpec("P")
T = TypeVar("T")


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count(threads: int | None, default: int) -> int:
    """`threads`, or the default where it is None. Raises OptionError for less than one."""
    if threads is None:
        return default
    if threads < 1:
        what = f"{threads} is not in range"
        raise OptionError(Problem("out-of-range", "threads", what, "give a whole number, at least 1"))
    return threads


@contextmanager
def _translate_thread_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        what, remedy = "the system cannot start more threads", "raise the limit (ulimit -u), or use fewer"
        raise LimitError(Problem("no-more-threads", "threads", what, remedy)) from error


class ThreadPool(ThreadPoolExecutor):
    """A thread pool; `submit` and `map` raise LimitError where the system does not start a thread."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See `Executor`."""
        with _translate_thread_errors():
            return super().submit(fn, *args, **kwargs)


def require_thread() -> None:
    """Raise LimitError where the system cannot start a thread; libraries such as numpy report that in other ways."""
    with ThreadPool(1) as pool:
        pool.submit(int)


@contextmanager
def cancellable_pool(threads: int) -> Iterator[tuple[ThreadPool, Event]]:
    """A thread pool, and an event that is set when the block fails or is interrupted: work should then stop waiting."""
    cancelled = Event()
    with ThreadPool(threads) as pool:
        try:
            yield pool, cancelled
        except BaseException:
            cancelled.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class TimeLimitError(BaseException):
    """What `time_limit` raises in its block, and instead of TimeoutError where it comes while the block is left.

    Not an Exception, which Jinja suppresses while it folds constants.
    """


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block of Python code that runs longer, in whatever thread.

    Raises LimitError where the system does not start the thread that looks at the clock.
    """
    thread, lock, is_over, is_late = c_ulong(get_ident()), Lock(), False, False

    def stop() -> None:
        nonlocal is_late
        with lock:
            if not is_over:
                is_late = True
                pythonapi.PyThreadState_SetAsyncExc(thread, py_object(TimeLimitError))

    timer = Timer(seconds, stop)
    timer.daemon = True
    try:
        try:
            with _translate_thread_errors():
                timer.start()
            yield
        finally:
            timer.cancel()
            with lock:
                is_over = True
            # Where the block ended at that moment, the exception arrives here. Taking it back instead would leave the
            # interpreter waiting for one: every call would be slower, and one that is traced would never return.
            for _ in range(100 if is_late else 0):
                sleep(0)
    except TimeLimitError:
        raise TimeoutError(f"not finished within {seconds:g} s") from None


@contextmanager
def memory_limit(more_bytes: int) -> Iterator[None]:
    """Raise MemoryError in a block for which this process needs `more_bytes` more than now; no limit but on Linux.

    The limit is the process's: it applies to other threads too.
    """
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(statm.read_text().split()[0]) * resource.getpagesize() + more_bytes
    limits = [each for each in (limit, soft, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
