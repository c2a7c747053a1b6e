"""The time limit of a block."""

import signal

import pytest

from slrmerge.io.threads import time_limit


def forever() -> None:
    while True:
        pass


def test_a_block_without_end_is_interrupted_and_the_earlier_timer_is_kept() -> None:
    handler, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    with pytest.raises(TimeoutError), time_limit(0.05):
        forever()
    assert signal.getsignal(signal.SIGALRM) == handler
    assert bool(signal.getitimer(signal.ITIMER_REAL)[0]) == bool(timer[0])


def test_a_short_block_is_not_interrupted() -> None:
    with time_limit(60):
        pass
