"""Folders that appear complete or not at all, one run at a time, never over a source."""

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from slrmerge.errors import BusyError, NoSpaceError, OutputError
from slrmerge.io import files
from slrmerge.io.output_folder import OutputFolder, resolve_target, set_aside_folder, staging_folder
from slrmerge.io.progress import Progress
from tests.merging.faults import Recorder, Stop, snapshot, write_files
from tests.problems import refused

Content = dict[str, bytes]

NEW: Content = {"config.json": b"new", "more/weights": b"new too"}
OLD: Content = {"config.json": b"old"}

both_ways = pytest.mark.parametrize("exchange", [True, False])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "exchange", lambda first, second: False)


def fill(output: OutputFolder, content: Content = NEW, progress: Progress | None = None) -> None:
    """Write and publish `content`."""
    progress = progress or Progress()
    with output.locked(progress), output.staged(lambda _: None) as staging:
        write_files(staging, content)
        output.publish(progress)


def fail(output: OutputFolder, kept: str | None, error: BaseException, *, publish: bool = False) -> None:
    """Stage something, publish it or not, and raise `error`."""
    with output.locked(Progress()), output.staged(lambda _: kept) as staging:
        write_files(staging, NEW)
        if publish:
            output.publish(Progress())
        raise error


# writing


@both_ways
@pytest.mark.parametrize("existing", [None, {}, OLD])
@pytest.mark.parametrize("durable", [True, False])
def test_the_folder_appears_complete_and_nothing_is_left_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: Content | None, exchange: bool, durable: bool
) -> None:
    if not exchange:
        without_exchange(monkeypatch)
    target = tmp_path / "a" / "out"
    if existing is not None:
        target.mkdir(parents=True)
        write_files(target, existing)
    output = OutputFolder(target, overwrite=True, durable=durable)
    fill(output)
    assert output.published
    assert snapshot(target) == NEW
    assert names(target.parent) == ["out"]


def test_nothing_is_at_the_target_before_it_is_published(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "out")
    with output.locked(Progress()), output.staged(lambda _: None) as staging:
        write_files(staging, NEW)
        assert staging == output.staging == tmp_path / ".out.slrmerge-partial"
        assert not output.path.exists()
        output.publish(Progress())


@pytest.mark.parametrize("durable", [True, False])
def test_durable_output_is_synced_before_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    synced: list[tuple[str, bool]] = []
    target = tmp_path / "out"
    monkeypatch.setattr(files, "sync_folder", lambda folder: synced.append((folder.name, target.exists())))
    fill(OutputFolder(target, durable=durable))
    assert synced == ([(".out.slrmerge-partial", False), (tmp_path.name, True)] if durable else [])


def test_a_replaced_folder_that_cannot_be_removed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "out", OLD)
    progress = Recorder()

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    output = OutputFolder(tmp_path / "out", overwrite=True)
    with output.locked(progress), output.staged(lambda _: None) as staging:
        write_files(staging, NEW)
        monkeypatch.setattr(shutil, "rmtree", refuse)
        output.publish(progress)
    assert snapshot(tmp_path / "out") == NEW
    assert len(progress.said) == 1


def test_a_failed_replacement_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_exchange(monkeypatch)
    write_files(tmp_path / "out", OLD)
    replace = os.replace

    def fail_once(source: Path, target: Path) -> None:
        if source == staging_folder(tmp_path / "out"):
            raise OSError(5, "Input/output error", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    with refused(OutputError, "io-error"):
        fill(OutputFolder(tmp_path / "out", overwrite=True))
    assert snapshot(tmp_path / "out") == OLD
    assert names(tmp_path) == ["out"]


# failures


def test_what_was_staged_is_removed_unless_it_is_to_be_kept(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "out")
    with pytest.raises(KeyError) as caught:
        fail(output, None, KeyError())
    assert names(tmp_path) == []
    assert not hasattr(caught.value, "__notes__")


def test_what_was_staged_and_cannot_be_removed_leaves_the_error_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(KeyError) as caught:
        fail(OutputFolder(tmp_path / "out"), None, KeyError())
    assert len(caught.value.__notes__) == 1


def test_what_was_staged_is_kept_with_a_note(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt) as caught:
        fail(output, "kept for the next run", KeyboardInterrupt())
    assert caught.value.__notes__ == ["kept for the next run"]
    assert snapshot(output.staging) == NEW
    assert names(tmp_path) == [".out.slrmerge-partial"]


@pytest.mark.parametrize("existing", [None, OLD])
def test_a_failure_before_anything_is_staged_changes_nothing(tmp_path: Path, existing: Content | None) -> None:
    write_files(tmp_path / "out", existing or {})
    output = OutputFolder(tmp_path / "out", overwrite=True)
    with pytest.raises(KeyError) as caught, output.locked(Progress()), output.staged(lambda _: "kept"):
        raise KeyError
    assert snapshot(tmp_path / "out") == existing
    assert not hasattr(caught.value, "__notes__")  # neither kept nor complete


def test_a_failure_after_publishing_leaves_the_folder_and_notes_that_it_is_complete(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "out")
    with pytest.raises(KeyError) as caught:
        fail(output, "kept", KeyError(), publish=True)
    assert snapshot(tmp_path / "out") == NEW
    (note,) = caught.value.__notes__
    assert str(output.path) in note


def test_an_error_of_the_system_becomes_an_output_error(tmp_path: Path) -> None:
    with refused(OutputError, "io-error"), OutputFolder(tmp_path / "out").locked(Progress()):
        (tmp_path / "missing").read_bytes()


# recovery


@pytest.mark.parametrize(
    ("target_holds", "set_aside", "after"), [(None, OLD, OLD), (NEW, OLD, NEW), (NEW, None, NEW), (None, None, None)]
)
def test_an_old_folder_is_restored_only_where_the_target_is_missing(
    tmp_path: Path, target_holds: Content | None, set_aside: Content | None, after: Content | None
) -> None:
    target, progress = tmp_path / "out", Recorder()
    write_files(target, target_holds or {})
    write_files(set_aside_folder(target), set_aside or {})
    with OutputFolder(target, overwrite=True).locked(progress):
        assert snapshot(target) == after
        assert not set_aside_folder(target).exists()
    assert bool(progress.said) == (target_holds is None and set_aside is not None)


# locks


def test_a_folder_is_locked_by_one_run(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out").locked(Progress()):
        with refused(BusyError, "output-busy"), OutputFolder(tmp_path / "out").locked(Progress()):
            pass
        with OutputFolder(tmp_path / "another").locked(Progress()):
            assert ".another.slrmerge-lock" in names(tmp_path)
    assert names(tmp_path) == []


def test_a_lock_file_that_a_kill_left_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / ".out.slrmerge-lock").touch()
    with OutputFolder(tmp_path / "out").locked(Progress()):
        assert names(tmp_path) == [".out.slrmerge-lock"]
    assert names(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_file_system_that_creates_no_files_is_not_busy() -> None:
    with refused(OutputError, "io-error"), OutputFolder("/proc/out").locked(Progress()):
        pass


def test_the_lock_is_released_when_the_run_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), OutputFolder(tmp_path / "out").locked(Progress()):
        raise KeyError
    assert names(tmp_path) == []


def test_a_folder_that_changed_while_waiting_is_checked_again(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "out")
    output.check()
    write_files(tmp_path / "out", OLD)
    with refused(OutputError, "output-exists"), output.locked(Progress()):
        pass


# what is refused


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


# paths


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_to_a_folder_stays_a_link(tmp_path: Path, exists: bool) -> None:
    real = tmp_path / "disk" / "real"
    (real if exists else real.parent).mkdir(parents=True)
    (tmp_path / "out").symlink_to(real)
    output = OutputFolder(tmp_path / "out")
    fill(output)
    assert output.path == real
    assert (tmp_path / "out").is_symlink()
    assert snapshot(real) == NEW
    assert names(real.parent) == ["real"]


def test_a_relative_path_counts_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = OutputFolder("out")
    assert output.path == resolve_target(Path("out")) == tmp_path / "out"
    assert repr(output) == f"OutputFolder({str(tmp_path / 'out')!r})"


# what other users of the parent folder may have put there

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


# space


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
