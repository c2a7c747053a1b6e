"""Searches in little space: states in files, full disks."""

from typing import Any

import pytest

from slrmerge.errors import NoSpaceError
from slrmerge.io.output_folder import staging_folder
from slrmerge.searching.scorer import LocalScorer
from slrmerge.searching.sweep.cost import Cost
from tests.merging.faults import leftovers, snapshot, tree
from tests.problems import refused
from tests.searching.pairs import STAGES, SmallPair, Watcher, hurried, results


@hurried
def test_missing_space_is_reported_before_anything_is_written(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slrmerge.io.output_folder.files.free_bytes", lambda target: 2_000_000)
    cost = Cost(flop=1.0, states_bytes=3_210_000_000, states=1)
    monkeypatch.setattr(LocalScorer, "cost", lambda self, request: cost)
    ready = small.search()
    before = tree(small.folder)
    with refused(NoSpaceError, "no-space") as caught:
        ready.run(small.out)
    assert caught.value.problems[0].where == str(small.out)
    assert "3.21 GB" in caught.value.problems[0].what
    assert tree(small.folder) == before


@hurried
@pytest.mark.parametrize(
    ("options", "is_refused", "may_skip_states"),
    [
        ({}, True, True),
        ({"max_memory": 1}, True, False),
        ({"max_memory": 1, "resume": False}, True, False),
        ({"resume": False}, False, False),
    ],
)
def test_states_in_files_need_space(
    small: SmallPair,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    is_refused: bool,
    may_skip_states: bool,
) -> None:
    monkeypatch.setattr("slrmerge.io.output_folder.files.free_bytes", lambda target: 10)
    ready = small.search(**options)
    if not is_refused:
        assert ready.output_folder(small.out, overwrite=False).path == small.out
        return
    with refused(NoSpaceError, "no-space") as caught:
        ready.output_folder(small.out, overwrite=False)
    assert ("resume=False" in caught.value.problems[0].remedy) == may_skip_states


@hurried
@pytest.mark.parametrize("resume", [True, False])
def test_states_that_exceed_the_memory_are_kept_in_files_and_the_results_are_the_same(
    small: SmallPair, plain: dict[str, bytes], resume: bool
) -> None:
    staging = staging_folder(small.out)
    seen: set[str] = set()

    class Looking(Watcher):
        def on_advance(self, count: int) -> None:
            seen.update(path.name.partition("-")[0] for path in staging.glob("first/*"))

    small.run(progress=Looking(), max_memory=1, resume=resume)
    assert seen == {"progress.json", "states", "states.new", "log_probs.npz"}
    assert results(small.out) == plain
    assert leftovers(small.out) == []


@hurried
def test_without_resume_nothing_is_written_while_searching(small: SmallPair) -> None:
    seen: list[dict[str, bytes]] = []
    watcher = Watcher(STAGES, lambda: seen.append(snapshot(staging_folder(small.out)) or {}))
    small.run(progress=watcher, resume=False)
    assert seen == [{}]


@hurried
@pytest.mark.parametrize(
    "place", ["numpy.savez", "slrmerge.searching.plots.draw_result", "slrmerge.io.output_folder.os.replace"]
)
def test_a_full_disk_is_reported(small: SmallPair, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with refused(NoSpaceError, "no-space"):
            small.run(spaces=())
    assert not small.out.exists()
