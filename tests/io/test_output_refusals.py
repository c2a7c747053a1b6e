"""Folders that are not written: sources, mounts, what others may have put there, too little space."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from slrmerge.errors import NoSpaceError, OutputError
from slrmerge.io.output_folder import OutputFolder, set_aside_folder, staging_folder
from slrmerge.io.progress import Progress
from tests.io.output_folders import OLD, fill, names
from tests.merging.faults import Stop, snapshot, write_files
from tests.problems import refused


def link(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "source")
    return folder / "link"


def linked_weights(folder: Path) -> Path:
    """A source whose weights are in another folder, as in the Hub's cache; returns that folder."""
    blobs = write_files(folder / "blobs", {"1234": b"weights"})
    (folder / "source" / "weights").symlink_to(blobs / "1234")
    return blobs


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("mine")
    return folder / "file"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a source": (lambda folder: folder / "source", "output-overlaps"),
    "a source by another path": (lambda folder: folder / "source" / ".." / "source", "output-overlaps"),
    "a link to a source": (link, "output-overlaps"),
    "inside a source": (lambda folder: folder / "source" / "out", "output-overlaps"),
    "around a source": (lambda folder: folder, "output-overlaps"),
    "around linked weights": (linked_weights, "output-overlaps"),
    "a file": (a_file, "output-is-a-file"),
    "below a file": (lambda folder: a_file(folder) / "out", "output-not-writable"),
    "a folder that is not empty": (lambda folder: write_files(folder / "out", OLD), "output-exists"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_must_not_be_written_is_refused(tmp_path: Path, case: str) -> None:
    make, code = REFUSED[case]
    source = write_files(tmp_path / "source", {"config.json": b"source"})
    output = OutputFolder(make(tmp_path), sources=[source])
    before = snapshot(tmp_path)
    with refused(OutputError, code):
        output.check()
    with pytest.raises(OutputError), output.locked(Progress()):
        pass
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("out", ["/", "/dev/null", "x" * 300, "a\0b"], ids=["root", "device", "long", "null"])
def test_an_impossible_folder_is_refused(out: str) -> None:
    with pytest.raises(OutputError):
        OutputFolder(out).check()


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "out")
    with pytest.raises(OutputError):
        OutputFolder(tmp_path / "out").check()


def test_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with refused(OutputError, "mount-point"):
        OutputFolder(tmp_path).check()


def test_a_parent_that_is_not_writable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with refused(OutputError, "output-not-writable"):
        OutputFolder(tmp_path / "a" / "out").check()


@pytest.mark.parametrize("workplace", [staging_folder, set_aside_folder])
def test_a_source_where_the_output_would_be_staged_is_refused(
    tmp_path: Path, workplace: Callable[[Path], Path]
) -> None:
    source = write_files(workplace(tmp_path / "out"), {"config.json": b"source"})
    with refused(OutputError, "output-overlaps"):
        OutputFolder(tmp_path / "out", sources=[source]).check()
    assert snapshot(source) == {"config.json": b"source"}


def test_a_source_that_cannot_be_listed_is_an_output_error(tmp_path: Path) -> None:
    with refused(OutputError, "io-error"):
        OutputFolder(tmp_path / "out", sources=[tmp_path / "missing"]).check()


def test_a_folder_is_not_replaced_where_the_caller_objects(tmp_path: Path) -> None:
    write_files(tmp_path / "out", OLD)

    def why_not(folder: Path) -> str | None:
        return None if snapshot(folder) == OLD else "is not a checkpoint"

    output = OutputFolder(tmp_path / "out", overwrite=True, why_not_replaceable=why_not)
    output.check()
    write_files(tmp_path / "out", {"thesis.tex": b"mine"})
    with refused(OutputError, "output-not-replaceable") as caught:
        output.check()
    assert "is not a checkpoint" in str(caught.value)
    with refused(OutputError, "output-exists"):
        OutputFolder(tmp_path / "out", why_not_replaceable=why_not).check()


posix = pytest.mark.skipif("os.name == 'nt'")

UNSAFE: dict[str, Callable[[Path], object]] = {
    "a link": lambda path: path.symlink_to(write_files(path.parent / "elsewhere", OLD)),
    "a broken link": lambda path: path.symlink_to("missing"),
    "a file": lambda path: path.write_text("mine"),
    "a FIFO": os.mkfifo if hasattr(os, "mkfifo") else Path.mkdir,
    "writable by the group": lambda path: made(path, 0o770),
    "writable by everyone": lambda path: made(path, 0o1777),
}


def made(path: Path, mode: int) -> None:
    write_files(path, OLD)
    path.chmod(mode)


def assert_unsafe(output: OutputFolder, path: Path) -> None:
    """Nothing is written, and what is at `path` is neither used nor removed."""
    before = names(path.parent)
    with refused(OutputError, "unsafe-staging") as caught:
        output.check()
    assert caught.value.problems[0].where == str(path)
    with refused(OutputError, "unsafe-staging"):
        fill(output)
    assert names(path.parent) == before
    assert not output.path.exists()


@posix
@pytest.mark.parametrize("workplace", [staging_folder, set_aside_folder])
@pytest.mark.parametrize("case", UNSAFE)
def test_a_staging_folder_that_may_be_someone_elses_is_refused(
    tmp_path: Path, case: str, workplace: Callable[[Path], Path]
) -> None:
    path = workplace(tmp_path / "out")
    UNSAFE[case](path)
    assert_unsafe(OutputFolder(tmp_path / "out", overwrite=True), path)


@posix
@pytest.mark.parametrize("workplace", [staging_folder, set_aside_folder])
def test_a_staging_folder_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workplace: Callable[[Path], Path]
) -> None:
    path = workplace(tmp_path / "out")
    made(path, 0o755)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert_unsafe(OutputFolder(tmp_path / "out"), path)


@posix
@pytest.mark.parametrize("case", ["a link", "writable by the group", "another user's"])
def test_a_lock_file_that_may_be_someone_elses_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    path, private = tmp_path / ".out.slrmerge-lock", tmp_path / "private"
    private.write_text("mine")
    if case == "a link":
        path.symlink_to(private)
    else:
        path.write_text("")
        path.chmod(0o664 if "group" in case else 0o644)
    if "user" in case:
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with refused(OutputError, "unsafe-staging"):
        fill(OutputFolder(tmp_path / "out"))
    assert private.read_text() == "mine"


@posix
@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o775), (0o027, 0o750), (0o077, 0o700)])
def test_only_this_user_can_enter_the_staging_folder_and_the_target_has_the_usual_mode(
    tmp_path: Path, umask: int, mode: int
) -> None:
    output, before = OutputFolder(tmp_path / "out"), os.umask(umask)
    try:
        with output.locked(Progress()):
            output.create_staging()
        with output.locked(Progress()), output.staged(lambda _: None):
            output.create_staging()  # it is there already
            assert stat.S_IMODE(output.staging.stat().st_mode) == 0o700
            output.publish(Progress())
    finally:
        os.umask(before)
    assert stat.S_IMODE(output.path.stat().st_mode) == mode
    assert names(output.path) == []


@posix
@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_kill_at_publishing_leaves_nothing_that_the_next_run_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_replaced: bool
) -> None:
    output, replace = OutputFolder(tmp_path / "out", overwrite=True), OutputFolder._replace
    made(output.path, 0o775)

    def killed(self: OutputFolder) -> None:
        if is_replaced:
            replace(self)
        raise Stop

    before = os.umask(0o002)
    try:
        with output.locked(Progress()):
            output.create_staging()
            monkeypatch.setattr(OutputFolder, "_replace", killed)
            with pytest.raises(Stop):
                output.publish(Progress())
        output.check()
    finally:
        os.umask(before)


@posix
def test_a_staging_folder_that_was_replaced_is_not_published(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "out")
    with (
        refused(OutputError, "unsafe-staging"),
        output.locked(Progress()),
        output.staged(lambda _: "kept") as staging,
    ):
        output.create_staging()
        staging.rename(tmp_path / "before")
        write_files(staging, OLD)
        output.publish(Progress())
    assert not output.path.exists()


@posix
def test_a_staging_folder_that_appears_after_the_check_is_refused(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "out")
    with refused(OutputError, "unsafe-staging"), output.locked(Progress()):
        output.staging.symlink_to(tmp_path)
        output.create_staging()


@posix
@pytest.mark.parametrize("length", [238, 255])
@pytest.mark.parametrize("parents", ["", "a/b/"])
def test_a_name_that_is_too_long_to_be_staged_is_refused_by_the_check(
    tmp_path: Path, length: int, parents: str
) -> None:
    with refused(OutputError, "invalid-output"):
        OutputFolder(tmp_path / f"{parents}{length * 'x'}").check()
    OutputFolder(tmp_path / f"{parents}{237 * 'x'}").check()


@posix
def test_a_path_that_is_too_long_for_the_files_in_it_is_refused_by_the_check(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*(200 * "x" for _ in range(19)))
    with refused(OutputError, "invalid-output"):
        OutputFolder(deep).check()


def test_too_little_space_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    output = OutputFolder(tmp_path / "a" / "out")
    output.require_space(1000)
    with refused(NoSpaceError, "no-space") as caught:
        output.require_space(1001, what="the merge", remedy="use a larger disk")
    (problem,) = caught.value.problems
    assert problem.where == str(output.path)
    assert problem.remedy.endswith(", or use a larger disk")


@pytest.mark.skipif("not hasattr(os, 'sync')")
def test_space_that_the_disk_has_not_freed_yet_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [1000]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    monkeypatch.setattr(os, "sync", lambda: free.__setitem__(0, 2000))
    OutputFolder(tmp_path / "out").require_space(2000)
    with refused(NoSpaceError, "no-space"):
        OutputFolder(tmp_path / "out").require_space(2001)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs users")
@pytest.mark.parametrize("content", [{}, OLD])
@pytest.mark.parametrize(("mode", "user", "is_refused"), [(0o1777, 1, True), (0o777, 1, False), (0o1777, 0, False)])
def test_a_folder_that_only_its_owner_may_rename_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, bytes], mode: int, user: int, is_refused: bool
) -> None:
    owner = tmp_path.stat().st_uid
    write_files(tmp_path / "out", content).mkdir(exist_ok=True)
    tmp_path.chmod(mode)
    monkeypatch.setattr(os, "geteuid", lambda: owner + user)
    output = OutputFolder(tmp_path / "out", overwrite=True)
    assert [problem.code for problem in output.problems()] == ["output-not-replaceable"] * is_refused
