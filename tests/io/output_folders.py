"""Folders to write, and ways to write or fail."""

from pathlib import Path

import pytest

from slrmerge.io import files
from slrmerge.io.output_folder import OutputFolder
from slrmerge.io.progress import Progress
from tests.merging.faults import write_files

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
