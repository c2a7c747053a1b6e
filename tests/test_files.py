"""Folders that appear at once, files that are durable, one run at a time."""

import os
import stat
from pathlib import Path

import pytest

from slrmerge import files
from slrmerge.errors import BusyError
from tests.merge.faults import OLD, snapshot, write_files

NEW = {"config.json": b"new", "more/weights": b"new too"}

swaps = pytest.mark.parametrize("exchange", [True, False])


@pytest.fixture
def target(tmp_path: Path) -> Path:
    write_files(files.staging_folder(tmp_path / "target"), NEW)
    return tmp_path / "target"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_working_folders_stand_beside_the_target(tmp_path: Path) -> None:
    assert files.staging_folder(tmp_path / "a.b") == tmp_path / ".a.b.slrmerge-partial"
    assert files.set_aside_folder(tmp_path / "a.b") == tmp_path / ".a.b.slrmerge-old"


@swaps
@pytest.mark.parametrize("there", [None, {}, OLD])
def test_publish_gives_the_folder_its_name_and_tells_where_the_old_one_is(
    target: Path, monkeypatch: pytest.MonkeyPatch, there: dict[str, bytes] | None, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    if there is not None:
        target.mkdir()
        write_files(target, there)
    leftover = files.publish(files.staging_folder(target), target)
    assert snapshot(target) == NEW
    assert names(target.parent) == sorted(["target", *([leftover.name] if leftover else [])])
    assert (snapshot(leftover) if leftover else None) == (there or None)


def test_two_names_are_exchanged_in_one_step_where_the_system_can(target: Path) -> None:
    write_files(target, OLD)
    if not files._exchange(files.staging_folder(target), target):
        pytest.skip("this system cannot")
    assert (snapshot(target), snapshot(files.staging_folder(target))) == (NEW, OLD)


def test_an_exchange_with_nothing_is_refused_and_changes_nothing(target: Path) -> None:
    assert not files._exchange(files.staging_folder(target), target)
    assert (snapshot(target), snapshot(files.staging_folder(target))) == (None, NEW)


@pytest.mark.parametrize(
    ("target_holds", "set_aside", "brought_back", "after"),
    [(None, OLD, True, OLD), (NEW, OLD, False, NEW), (NEW, None, False, NEW), (None, None, False, None)],
)
def test_recover_brings_the_old_folder_back_only_where_the_target_is_missing(
    tmp_path: Path,
    target_holds: dict[str, bytes] | None,
    set_aside: dict[str, bytes] | None,
    brought_back: bool,
    after: dict[str, bytes] | None,
) -> None:
    target = tmp_path / "target"
    write_files(target, target_holds or {})
    write_files(files.set_aside_folder(target), set_aside or {})
    assert files.recover(target) is brought_back
    assert snapshot(target) == after
    assert not files.set_aside_folder(target).exists()


def test_one_target_is_held_by_one_run(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with files.exclusive(target):
        with pytest.raises(BusyError) as caught, files.exclusive(target):
            pass
        with files.exclusive(tmp_path / "another"):
            assert ".another.slrmerge-lock" in names(tmp_path)
    assert str(caught.value) == (
        f"{target}: another slrmerge is writing it; wait for that run, or choose another --out"
    )
    assert names(tmp_path) == []


def test_a_lock_file_that_a_kill_left_holds_nobody(tmp_path: Path) -> None:
    (tmp_path / ".target.slrmerge-lock").touch()
    with files.exclusive(tmp_path / "target"):
        assert names(tmp_path) == [".target.slrmerge-lock"]
    assert names(tmp_path) == []


def test_the_lock_is_given_back_when_the_run_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), files.exclusive(tmp_path / "target"):
        raise KeyError
    assert names(tmp_path) == []


@pytest.mark.parametrize("fsync", [True, False])
def test_a_small_file_is_written_whole_and_synced_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: bool
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: sizes.append(os.fstat(fd).st_size))
    files.write_file(tmp_path / "file", b"12345", fsync=fsync)
    assert (tmp_path / "file").read_bytes() == b"12345"
    assert sizes == ([5] if fsync else [])  # everything had left the buffer by then


def test_a_folder_is_made_with_its_parents_and_may_be_there(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.create_folder(tmp_path / "a" / "b", fsync=False)
        files.create_folder(tmp_path / "a" / "b", fsync=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o750


def test_syncing_a_folder_closes_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    monkeypatch.setattr(os, "fsync", opened.append)
    files.sync_folder(tmp_path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])
