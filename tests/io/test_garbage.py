"""The collector is paused inside, and as it was before afterwards."""

import gc

import pytest

from slrmerge.io.garbage import collector_paused


@collector_paused()
def fail() -> None:
    with collector_paused():
        pass
    raise ValueError("enabled" if gc.isenabled() else "paused")


def test_the_collector_is_paused_until_the_outermost_pause_ends_with_an_error() -> None:
    assert gc.isenabled()
    with pytest.raises(ValueError, match="paused"):
        fail()
    assert gc.isenabled()


def test_a_collector_that_was_disabled_stays_disabled() -> None:
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
