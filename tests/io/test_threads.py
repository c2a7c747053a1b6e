"""Pools of threads, and the limits of a block: time and memory."""

import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from threading import Thread

import pytest

from slrmerge.errors import LimitError
from slrmerge.io.threads import ThreadPool, memory_limit, time_limit


def forever() -> None:
    while True:
        pass


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_a_block_without_end_is_interrupted(in_a_thread: bool) -> None:
    def run() -> None:
        with pytest.raises(TimeoutError), time_limit(0.05):
            forever()

    with ThreadPoolExecutor(1) if in_a_thread else nullcontext() as pool:
        pool.submit(run).result() if pool else run()


def test_a_block_that_suppresses_exceptions_is_interrupted() -> None:
    with pytest.raises(TimeoutError), time_limit(0.05), suppress(Exception):
        forever()


def test_a_short_block_is_not_interrupted() -> None:
    for seconds in (60.0, *[0.0001] * 200):
        try:
            with time_limit(seconds):
                pass
        except TimeoutError:
            assert seconds < 1  # in the block, never after it


TRACED = """
import sys
from contextlib import suppress
from slrmerge.io.threads import time_limit

def called():
    pass

for seconds in (60, *[0.0001] * 200):
    with suppress(TimeoutError), time_limit(seconds):
        pass
    sys.settrace(lambda *event: None)
    called()
    sys.settrace(None)
"""


def test_a_function_that_is_traced_after_a_block_returns() -> None:
    subprocess.run([sys.executable, "-c", TRACED], check=True, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_block_that_takes_too_much_memory_is_interrupted() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), memory_limit(1 << 28):
        bytearray(1 << 30)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with memory_limit(1 << 28):
        bytearray(1 << 24)


def test_a_system_that_starts_no_thread_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Thread, "start", refuse)
    with pytest.raises(LimitError), ThreadPool(1) as pool:
        pool.submit(int)
    with pytest.raises(LimitError), time_limit(60):
        pass
