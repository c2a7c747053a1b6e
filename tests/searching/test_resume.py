"""Searches that were stopped or killed resume, unless something has changed."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slrmerge.io.output_folder import staging_folder
from tests.merging.faults import Stop, age, leftovers, snapshot, stop
from tests.searching.pairs import ALL, ALL_STAGES, ROOT, STAGES, SmallPair, Watcher, hurried, results


@hurried
@pytest.mark.parametrize("at", [1, 3, STAGES])
def test_a_stopped_search_resumes_after_the_last_finished_layer(
    small: SmallPair, plain: dict[str, bytes], at: int
) -> None:
    with pytest.raises(Stop) as caught:
        small.run(progress=Watcher(at, stop))
    assert len(getattr(caught.value, "__notes__", ())) == 1
    assert not small.out.exists()
    again = Watcher()
    small.run(progress=again)
    assert len(again.messages) == 1
    assert len(again.stages) == ALL_STAGES - (at - 1)
    assert sum(again.totals) == again.advanced
    assert results(small.out) == plain
    assert leftovers(small.out) == []


@hurried
def test_a_killed_search_resumes(small: SmallPair, plain: dict[str, bytes]) -> None:
    small.recipe_file()
    command = [sys.executable, "-m", "tests.searching.pairs", "3", str(small.folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    assert not small.out.exists()
    again = Watcher()
    small.run(progress=again)
    assert len(again.stages) == ALL_STAGES - 2
    assert results(small.out) == plain
    assert leftovers(small.out) == []


@hurried
def test_a_search_that_stopped_while_writing_its_results_is_not_computed_again(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("slrmerge.searching.plots.draw_result", failing)
        with pytest.raises(Stop):
            small.run()
    assert not small.out.exists()
    again = Watcher()
    small.run(progress=again)
    assert again.stages == []
    assert sorted(snapshot(small.out) or {}) == ALL


@hurried
def test_without_resume_a_search_starts_again(small: SmallPair) -> None:
    with pytest.raises(Stop) as caught:
        small.run(progress=Watcher(3, stop), resume=False)
    assert not hasattr(caught.value, "__notes__")
    assert leftovers(small.out) == []
    again = Watcher()
    small.run(progress=again)
    assert again.messages == []
    assert len(again.stages) == ALL_STAGES


OTHERS: dict[str, Callable[[SmallPair], dict[str, Any]]] = {
    "other candidates": lambda pair: {"spaces": ("intervals",)},
    "another dtype": lambda pair: {"dtype": "bfloat16"},
    "fewer prompts": lambda pair: {"quick": True},
    "a source that was touched": lambda pair: age(pair.folder / "pre") or {},  # type: ignore[func-returns-value]
}


@hurried
@pytest.mark.parametrize("case", OTHERS)
def test_states_of_another_search_are_not_resumed(small: SmallPair, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr("slrmerge.searching.prepare.QUICK_PROMPTS", 2)
    with pytest.raises(Stop):
        small.run(progress=Watcher(3, stop))
    options, again = OTHERS[case](small), Watcher()
    small.run(progress=again, **options)
    small.run(small.folder / "plain", **options)
    assert len(again.messages) == 1
    assert len(again.stages) >= STAGES
    assert results(small.out) == results(small.folder / "plain")
    assert leftovers(small.out) == []


def spoil_states(folder: Path) -> None:
    (states,) = folder.glob("states-*")
    states.write_bytes(bytes(states.stat().st_size))


SPOILED: dict[str, Callable[[Path], object]] = {
    "altered states": spoil_states,
    "missing states": lambda folder: [path.unlink() for path in folder.glob("states-*")],
    "an empty progress file": lambda folder: (folder / "progress.json").write_bytes(b""),
    "a progress file with a list": lambda folder: (folder / "progress.json").write_bytes(b"[]"),
}


@hurried
@pytest.mark.parametrize("case", SPOILED)
def test_damaged_states_are_not_resumed(small: SmallPair, plain: dict[str, bytes], case: str) -> None:
    with pytest.raises(Stop):
        small.run(progress=Watcher(3, stop))
    SPOILED[case](staging_folder(small.out) / "first")
    again = Watcher()
    small.run(progress=again)
    assert len(again.messages) == 1
    assert len(again.stages) == ALL_STAGES
    assert results(small.out) == plain


@hurried
def test_a_search_that_stopped_among_its_finalists_resumes_there(small: SmallPair) -> None:
    small.run(small.folder / "plain", dtype="bfloat16")
    with pytest.raises(Stop):
        small.run(progress=Watcher(STAGES + 3, stop), dtype="bfloat16")
    again = Watcher()
    small.run(progress=again, dtype="bfloat16")
    assert len(again.stages) == ALL_STAGES - 2
    assert results(small.out) == results(small.folder / "plain")
