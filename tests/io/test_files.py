"""Small files, folders and exchanges of names on the disk."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from slrmerge.io import files


def test_two_names_are_exchanged_in_one_step_where_the_system_can(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    if not files.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot")
    assert [(tmp_path / name / "file").read_text() for name in "ab"] == ["b", "a"]


def test_an_exchange_with_a_missing_name_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert not files.exchange(tmp_path / "a", tmp_path / "b")
    assert [*tmp_path.iterdir()] == [tmp_path / "a"]


@pytest.mark.parametrize("durable", [True, False])
def test_a_small_file_is_written_whole_and_synced_when_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: sizes.append(os.fstat(fd).st_size))
    files.write_file(tmp_path / "file", b"12345", durable=durable)
    assert (tmp_path / "file").read_bytes() == b"12345"
    assert sizes == ([5] if durable else [])  # everything had left the buffer by then


def test_a_small_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old and longer")
    files.replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("kind", ["file", "link", "hard link", "FIFO"])
def test_what_is_beside_a_file_that_is_replaced_is_not_written_to(tmp_path: Path, kind: str) -> None:
    mine, beside = tmp_path / "mine", tmp_path / "file.new"
    mine.write_bytes(b"mine")
    {
        "file": lambda: beside.write_bytes(b"unfinished"),
        "link": lambda: beside.symlink_to(mine),
        "hard link": lambda: beside.hardlink_to(mine),
        "FIFO": lambda: os.mkfifo(beside),
    }[kind]()
    files.replace_file(tmp_path / "file", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"new", "mine": b"mine"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_writing_does_not_wait_for_the_reader_of_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    with pytest.raises(OSError, match="No such device"):
        files.write_file(tmp_path / "file", b"", durable=False)


def test_a_folder_is_created_with_its_parents_and_may_exist(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.create_folder(tmp_path / "a" / "b", durable=False)
        files.create_folder(tmp_path / "a" / "b", durable=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o750


def test_every_new_folder_is_synced_when_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    files.create_folder(tmp_path / "a" / "b", durable=True)
    files.create_folder(tmp_path / "a" / "b", durable=True)
    assert sorted(synced) == [tmp_path, tmp_path / "a"]


def test_syncing_a_folder_closes_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    monkeypatch.setattr(os, "fsync", opened.append)
    files.sync_folder(tmp_path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_free_bytes_are_those_of_the_nearest_existing_folder(tmp_path: Path) -> None:
    assert files.free_bytes(tmp_path / "a" / "b" / "c") > 0


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path) -> None:
    def lines() -> Iterator[bytes]:
        yield b"half"
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="No space"):
        files.replace_file(tmp_path / "file", lines())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_a_text_is_written_through_a_link_and_to_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"new", "link": b"new"}
    files.write_text(Path(os.devnull), "new")
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "recipe.yaml"
    path.touch()
    path.chmod(mode)
    files.write_text(path, "new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", mode)
