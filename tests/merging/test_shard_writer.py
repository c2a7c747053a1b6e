"""The threads that write a merge: what happens after a piece fails."""

import time
from typing import Any

import pytest

import slrmerge.merging.shard_writer
from slrmerge.merging.executor import merge
from tests.conftest import Pair


def test_no_piece_begins_after_one_has_failed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def fail(path: Any, *_: Any, **__: Any) -> None:
        begun.append(path.name)
        raise RuntimeError

    def wait_longer(*given: Any, **options: Any) -> Any:
        waited = wait(*given, **options)
        time.sleep(0.1)  # the thread that waits wakes up late
        return waited

    wait = slrmerge.merging.shard_writer.wait
    monkeypatch.setattr(slrmerge.merging.shard_writer, "write_piece", fail)
    monkeypatch.setattr(slrmerge.merging.shard_writer, "wait", wait_longer)
    with pytest.raises(RuntimeError):
        merge(pair.recipe(restore=[2, 3], max_shard_size="20KB"), pair.out, threads=1)
    assert len(begun) == 1
