"""Folders that appear complete or not at all, one run at a time, never over a source."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from slrmerge.errors import BusyError, OutputError
from slrmerge.io import files
from slrmerge.io.output_folder import OutputFolder, resolve_target, set_aside_folder, staging_folder
from slrmerge.io.progress import Progress
from tests.io.output_folders import NEW, OLD, Content, both_ways, fail, fill, names, without_exchange
from tests.merging.faults import Recorder, snapshot, write_files
from tests.problems import refused

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
