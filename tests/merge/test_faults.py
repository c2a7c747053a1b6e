"""Killed, interrupted, out of disk: the target is whole or absent, and the next run completes."""

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slrmerge import execute, files
from slrmerge.errors import NoSpaceError, SlrmergeError
from slrmerge.merge import shards
from tests.cli import run
from tests.conftest import Pair
from tests.merge.faults import OLD, ROOT, Recorder, Row, leftovers, snapshot, write_files

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def driver(*arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.merge.faults", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


def kills(pair: Pair, mode: str) -> list[Row]:
    recipe = pair.recipe_file(restore=[2, 3], max_shard_size="2KB")
    done = driver(mode, recipe, pair.out, check=True)
    rows: list[Row] = json.loads(done.stdout)
    return rows


@needs_fork
@pytest.mark.parametrize(
    ("mode", "pieces", "states", "brought_back"),
    [
        ("fresh", 3, {"absent", "new"}, 0),
        ("fresh-pieces", 9, {"absent", "new"}, 0),  # of which each shard has several
        ("overwrite-swap", 3, {"old", "new"}, 0),
        ("overwrite", 3, {"old", "absent", "new"}, 1),  # where two names cannot be exchanged in one step
    ],
)
def test_a_merge_killed_before_any_step_leaves_the_target_whole_and_the_next_run_completes(
    pair: Pair, mode: str, pieces: int, states: set[str], brought_back: int
) -> None:
    rows = kills(pair, mode)
    assert len(rows) > 40
    assert {row["left"] for row in rows} == states
    assert [row for row in rows if row["then"] != "new" or row["leftovers"]] == []
    assert [row for row in rows if row["resumed"] != row["journaled"]] == []
    assert {row["resumed"] for row in rows} == {*range(pieces + 1)}
    mended = f"brought back {pair.out}, which an interrupted swap had set aside"
    assert [mended in row["said"] for row in rows].count(True) == brought_back


def test_the_run_after_a_kill_between_the_renames_brings_the_old_back_even_when_it_may_not_overwrite(
    pair: Pair,
) -> None:
    write_files(files.set_aside_folder(pair.out), OLD)
    with pytest.raises(SlrmergeError) as caught:
        execute(pair.plan(restore=[2, 3]), pair.out)
    assert str(caught.value) == (
        f"{pair.out}: exists and is not empty; choose another --out, or replace it: --overwrite"
    )
    assert snapshot(pair.out) == OLD
    assert leftovers(pair.out) == []


def test_a_swap_that_the_system_refuses_half_way_leaves_the_old_in_place(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(pair.out, OLD)
    replace = os.replace

    def refusing(source: Path, target: Path) -> None:
        if source == files.staging_folder(pair.out):
            raise PermissionError(errno.EPERM, "Operation not permitted", str(source))
        replace(source, target)

    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    monkeypatch.setattr(os, "replace", refusing)
    with pytest.raises(SlrmergeError):
        execute(pair.plan(restore=[2, 3]), pair.out, overwrite=True)
    assert snapshot(pair.out) == OLD


@pytest.mark.parametrize(("chunk", "finished"), [(1, 0), (8, 2)])
def test_ctrl_c_stops_at_once_and_says_what_is_kept(pair: Pair, chunk: int, finished: int) -> None:
    recipe = pair.recipe_file(restore=[2, 3], max_shard_size="2KB")
    done = driver("interrupt", chunk, recipe, "--out", pair.out, "--threads", 1)
    kept = (
        f"{finished} of 3 pieces are finished and kept in {files.staging_folder(pair.out)}; "
        "the same command takes up from there"
    )
    assert done.stderr == f"\nstopped: {kept if finished else 'nothing was written'}\n"
    assert (done.returncode, done.stdout) == (130, "")
    assert not pair.out.exists()
    assert leftovers(pair.out) == ([files.staging_folder(pair.out).name] if finished else [])
    assert execute(pair.plan(restore=[2, 3], max_shard_size="2KB"), pair.out).resumed_pieces == finished


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.EPERM, "Operation not permitted")])
def test_a_merge_that_could_not_take_its_name_is_not_done_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    def failing(staging: Path, target: Path) -> None:
        raise fault

    plan = pair.plan(restore=[2, 3], max_shard_size="2KB")
    with monkeypatch.context() as patch:
        patch.setattr(files, "publish", failing)
        with pytest.raises((KeyboardInterrupt, SlrmergeError)):
            execute(plan, pair.out)
    assert execute(plan, pair.out).resumed_pieces == 3


def test_ctrl_c_after_the_target_appeared_does_not_say_that_nothing_was_written(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = files.publish

    def interrupted(staging: Path, target: Path) -> None:
        publish(staging, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "publish", interrupted)
    result = run(pair.recipe_file(restore=[2, 3]), "--out", pair.out)
    assert result.exit_code == 130
    assert (pair.out / "slrmerge.json").exists()
    assert "nothing was written" not in result.stderr


FULL = "the disk is full; free some space and run again"


def full_at(monkeypatch: pytest.MonkeyPatch, call: int, number: int) -> None:
    """Have the write number `call` fail with errno `number`."""
    write, counter = os.write, iter(range(1, 10**6))

    def failing(fd: int, data: memoryview) -> int:
        if next(counter) == call:
            raise OSError(number, os.strerror(number))
        return write(fd, data)

    monkeypatch.setattr(os, "write", failing)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_with_what_is_kept_and_the_next_run_takes_up(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    recipe = pair.recipe_file(restore=[2, 3], max_shard_size="2KB")
    full_at(monkeypatch, 8, number)
    result = run(recipe, "--out", pair.out, "--threads", 1)
    staging = files.staging_folder(pair.out)
    assert result.stderr.splitlines() == [
        "error: not enough disk space",
        f"  {staging}/model-00003-of-00003.safetensors: {FULL}",
        f"  2 of 3 pieces are finished and kept in {staging}; the same command takes up from there",
    ]
    assert (result.exit_code, result.stdout) == (7, "")
    assert sorted(path.name for path in staging.glob("*.safetensors")) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
    ]
    monkeypatch.undo()
    again = run(recipe, "--out", pair.out)
    assert again.exit_code == 0
    assert again.stderr.splitlines() == [
        f"resuming: checking 2 finished pieces in {staging}",
        "resuming: 2 pieces are as they should be",
    ]


def test_any_other_refusal_to_write_keeps_the_systems_words(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    full_at(monkeypatch, 1, errno.EIO)
    result = run(pair.recipe_file(restore=[2, 3]), "--out", pair.out)
    assert result.stderr.splitlines() == [
        "error: the output cannot be written",
        f"  {files.staging_folder(pair.out)}/model.safetensors: cannot be written or read (Input/output error)",
    ]
    assert result.exit_code == 6
    assert leftovers(pair.out) == []


def test_a_write_that_fails_while_more_is_copied_is_not_forgotten(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = iter([OSError(errno.EIO, os.strerror(errno.EIO))])

    def told_once(path: Path) -> None:  # as the kernel does it
        for refusal in refusals:
            raise refusal

    monkeypatch.setattr(shards, "_PIECES_PER_SYNC", 1)
    monkeypatch.setattr(files, "sync_path", told_once)
    result = run(pair.recipe_file(restore=[2, 3]), "--out", pair.out)
    assert result.stderr.splitlines() == [
        "error: the output cannot be written",
        f"  {pair.out}: cannot be written or read (Input/output error)",
    ]
    assert result.exit_code == 6
    assert leftovers(pair.out) == []


def test_a_disk_that_really_fills_up_keeps_what_it_had_room_for(pair: Pair, small_disk: Path) -> None:
    plan, out, ballast = pair.plan(restore=[2, 3], max_shard_size="2KB"), small_disk / "hybrid", small_disk / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass

    with pytest.raises(NoSpaceError) as caught:
        execute(plan, out, threads=1, progress=Recorder(5, fill))
    assert caught.value.problems[0].what == "the disk is full"
    assert not out.exists()
    with pytest.raises(NoSpaceError):
        execute(plan, out)
    ballast.unlink()
    assert execute(plan, out).resumed_pieces == (3 if sys.platform == "linux" else 2)  # room was set aside for all
    assert leftovers(out) == []


@pytest.mark.skipif(sys.platform != "linux", reason="no room is set aside here")
def test_a_disk_that_has_less_room_than_it_says_is_told_before_the_first_byte(
    pair: Pair, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = pair.plan(restore=[2, 3]), small_disk / "hybrid"
    (small_disk / "ballast").write_bytes(bytes(116_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    recorder = Recorder()
    with pytest.raises(NoSpaceError) as caught:
        execute(plan, out, progress=recorder)
    assert caught.value.problems[0].what == "the disk is full"
    assert recorder.advanced == 0
    assert not out.exists()
    assert leftovers(out) == []


def test_a_limit_on_file_sizes_is_a_clear_error(pair: Pair) -> None:
    pytest.importorskip("resource")
    done = driver("limit", 4096, pair.recipe_file(restore=[2, 3]), "--out", pair.out)
    assert done.stderr.splitlines() == [
        "error: the output cannot be written",
        f"  {files.staging_folder(pair.out)}/model.safetensors: cannot be written or read (File too large)",
    ]
    assert done.returncode == 6
    assert leftovers(pair.out) == []
