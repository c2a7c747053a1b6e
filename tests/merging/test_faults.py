"""Killed, interrupted, out of disk: the target is whole or absent, and the next run completes."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slrmerge.errors import NoSpaceError, OutputError, SlrmergeError
from slrmerge.io import files
from slrmerge.io.output_folder import OutputFolder, set_aside_folder, staging_folder
from slrmerge.merging import shard_writer
from slrmerge.merging.executor import execute, merge
from slrmerge.merging.journal import JOURNAL_NAME
from slrmerge.merging.options import MergeOptions
from tests.conftest import Pair
from tests.merging.faults import (
    OLD,
    ROOT,
    Outcome,
    Recorder,
    Row,
    kept_pieces,
    leftovers,
    snapshot,
    write_files,
)
from tests.problems import refused

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

OVERWRITE = MergeOptions(overwrite=True)
ONE_THREAD = MergeOptions(threads=1)


def driver(*arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.merging.faults", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


def kills(pair: Pair, mode: str) -> list[Row]:
    recipe = pair.recipe_file(restore=[2, 3], max_shard_size="2KB")
    done = driver(mode, recipe, pair.out, check=True)
    rows: list[Row] = json.loads(done.stdout)
    return rows


@needs_fork
@pytest.mark.parametrize(
    ("mode", "pieces", "states", "restored"),
    [
        ("fresh-pieces", 9, {"absent", "new"}, 0),  # several to each shard, elsewhere one
        ("overwrite-swap", 3, {"old", "new"}, 0),
        ("overwrite", 3, {"old", "absent", "new"}, 1),  # where two names cannot be exchanged in one step
    ],
)
def test_a_merge_killed_before_any_step_leaves_the_target_whole_and_the_next_run_completes(
    pair: Pair, mode: str, pieces: int, states: set[str], restored: int
) -> None:
    rows = kills(pair, mode)
    assert len(rows) > 40
    assert {row["left"] for row in rows} == states
    assert [row for row in rows if row["then"] != "new" or row["leftovers"]] == []
    assert [row for row in rows if row["resumed"] != row["journaled"]] == []
    assert {row["resumed"] for row in rows} == {*range(pieces + 1)}
    others = [[text for text in row["said"] if not text.startswith("resuming")] for row in rows]
    assert [len(texts) for texts in others if texts] == [1] * restored
    assert all(str(pair.out) in text for texts in others for text in texts)


def test_the_run_after_a_kill_between_the_renames_restores_the_old_folder_even_without_overwrite(pair: Pair) -> None:
    write_files(set_aside_folder(pair.out), OLD)
    with refused(OutputError, "output-exists") as caught:
        execute(pair.plan(restore=[2, 3]), pair.out)
    assert caught.value.problems[0].where == str(pair.out)
    assert snapshot(pair.out) == OLD
    assert leftovers(pair.out) == []


def test_a_replacement_that_the_system_refuses_half_way_leaves_the_old_folder_in_place(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(pair.out, OLD)
    replace = os.replace

    def refusing(source: Path, target: Path) -> None:
        if source == staging_folder(pair.out):
            raise PermissionError(errno.EPERM, "Operation not permitted", str(source))
        replace(source, target)

    monkeypatch.setattr(files, "exchange", lambda first, second: False)
    monkeypatch.setattr(os, "replace", refusing)
    with refused(OutputError, "io-error"):
        execute(pair.plan(restore=[2, 3]), pair.out, options=OVERWRITE)
    assert snapshot(pair.out) == OLD
    assert not set_aside_folder(pair.out).exists()


@pytest.mark.parametrize(("chunk", "finished"), [(1, 0), (8, 2)])
def test_ctrl_c_stops_at_once_and_reports_what_is_kept(pair: Pair, chunk: int, finished: int) -> None:
    recipe = pair.recipe_file(restore=[2, 3], max_shard_size="2KB")
    done = driver("interrupt", chunk, recipe, pair.out)
    assert (done.returncode, done.stderr) == (130, "")
    notes = json.loads(done.stdout)["notes"]
    assert len(notes) == (1 if finished else 0)
    for note in notes:
        assert note.startswith(f"{finished} of 3 pieces ")
        assert str(staging_folder(pair.out)) in note
    assert not pair.out.exists()
    assert leftovers(pair.out) == ([staging_folder(pair.out).name] if finished else [])
    assert execute(pair.plan(restore=[2, 3], max_shard_size="2KB"), pair.out).resumed_pieces == finished


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.EPERM, "Operation not permitted")])
def test_a_complete_merge_that_could_not_be_published_is_not_written_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    def failing(self: OutputFolder) -> None:
        raise fault

    plan = pair.plan(restore=[2, 3], max_shard_size="2KB")
    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "_replace", failing)
        with pytest.raises((KeyboardInterrupt, SlrmergeError)) as caught:
            execute(plan, pair.out)
    assert kept_pieces(caught.value) == (3, 3)
    assert execute(plan, pair.out).resumed_pieces == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_ctrl_c_after_the_target_appeared_reports_a_complete_merge(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """The signal arrives between the rename and the next line of Python."""
    plan = pair.plan(restore=[2, 3])
    execute(plan, pair.out)
    new = snapshot(pair.out)
    shutil.rmtree(pair.out)
    if overwrite:
        write_files(pair.out, OLD)
    replace = OutputFolder._replace

    def interrupted(self: OutputFolder) -> Path | None:
        replace(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "_replace", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            execute(plan, pair.out, options=OVERWRITE)
    assert snapshot(pair.out) == new
    (note,) = caught.value.__notes__
    assert str(pair.out) in note
    assert kept_pieces(caught.value) is None
    assert not (staging_folder(pair.out) / JOURNAL_NAME).exists()
    assert (snapshot(staging_folder(pair.out)) == OLD) is overwrite
    execute(plan, pair.out, options=OVERWRITE)
    assert leftovers(pair.out) == []


def fail_write(monkeypatch: pytest.MonkeyPatch, call: int, number: int) -> None:
    """Make the write number `call` fail with errno `number`."""
    write, counter = os.write, iter(range(1, 10**6))

    def failing(fd: int, data: memoryview) -> int:
        if next(counter) == call:
            raise OSError(number, os.strerror(number))
        return write(fd, data)

    monkeypatch.setattr(os, "write", failing)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_finished_pieces_and_the_next_run_resumes(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    plan, staging = pair.plan(restore=[2, 3], max_shard_size="2KB"), staging_folder(pair.out)
    with monkeypatch.context() as patch:
        fail_write(patch, 8, number)
        with refused(NoSpaceError, "no-space") as caught:
            execute(plan, pair.out, options=ONE_THREAD)
    assert caught.value.problems[0].where == f"{staging}/model-00003-of-00003.safetensors"
    assert kept_pieces(caught.value) == (2, 3)
    assert sorted(path.name for path in staging.glob("*.safetensors")) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
    ]
    recorder = Recorder()
    assert execute(plan, pair.out, progress=recorder).resumed_pieces == 2
    assert recorder.counts == [2, 2]


def test_any_other_failed_write_is_an_output_error_at_its_file(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_write(monkeypatch, 1, errno.EIO)
    with refused(OutputError, "io-error") as caught:
        execute(pair.plan(restore=[2, 3], dtype="float32"), pair.out)  # one piece: another might be finished meanwhile
    assert Path(caught.value.problems[0].where).parent == staging_folder(pair.out)
    assert leftovers(pair.out) == []


def test_a_sync_that_fails_while_more_is_written_is_not_forgotten(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals: Iterator[OSError] = iter([OSError(errno.EIO, os.strerror(errno.EIO))])

    def reported_once(path: Path) -> None:  # as the kernel does it
        for refusal in refusals:
            raise refusal

    monkeypatch.setattr(shard_writer, "_PIECES_PER_SYNC", 1)
    monkeypatch.setattr(files, "sync_path", reported_once)
    with refused(OutputError, "io-error"):
        execute(pair.plan(restore=[2, 3], dtype="float32"), pair.out)  # one shard
    assert leftovers(pair.out) == []


def test_a_disk_that_really_fills_up_keeps_what_it_had_space_for(pair: Pair, small_disk: Path) -> None:
    plan, out, ballast = pair.plan(restore=[2, 3], max_shard_size="2KB"), small_disk / "hybrid", small_disk / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass

    with refused(NoSpaceError, "no-space"):
        execute(plan, out, options=ONE_THREAD, progress=Recorder(5, fill))
    assert not out.exists()
    with refused(NoSpaceError, "no-space"):
        execute(plan, out)
    ballast.unlink()
    assert execute(plan, out).resumed_pieces == (3 if sys.platform == "linux" else 2)  # space was reserved for all
    assert leftovers(out) == []


@pytest.mark.skipif(sys.platform != "linux", reason="no space is reserved here")
def test_a_disk_with_less_space_than_it_reports_is_noticed_before_the_first_byte(
    pair: Pair, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = pair.plan(restore=[2, 3]), small_disk / "hybrid"
    (small_disk / "ballast").write_bytes(bytes(116_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    recorder = Recorder()
    with refused(NoSpaceError, "no-space"):
        execute(plan, out, progress=recorder)
    assert recorder.advanced == 0
    assert not out.exists()
    assert leftovers(out) == []


def test_a_limit_on_file_sizes_is_an_output_error(pair: Pair) -> None:
    pytest.importorskip("resource")
    done = driver("limit", 4096, pair.recipe_file(restore=[2, 3]), pair.out)
    outcome: Outcome = json.loads(done.stdout)
    assert outcome == {
        "codes": ["io-error"],
        "where": [f"{staging_folder(pair.out)}/model-00001-of-00002.safetensors"],
        "notes": [],
    }
    assert (done.returncode, done.stderr) == (OutputError.exit_code, "")
    assert leftovers(pair.out) == []


def test_an_output_folder_that_cannot_be_listed_is_an_output_error(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.out.mkdir()
    iterdir = Path.iterdir

    def refusing(self: Path) -> Iterator[Path]:
        if self == pair.out:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return iterdir(self)

    recipe = pair.recipe_file(restore=[2, 3])
    monkeypatch.setattr(Path, "iterdir", refusing)
    with refused(OutputError, "io-error") as caught:
        merge(recipe, pair.out)
    assert caught.value.problems[0].where == str(pair.out)
