"""The staging folder of a merge and its journal: which shards are finished, so that a kill costs one shard."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from slrmerge import files
from slrmerge.errors import BlendError, SourceChangedError, VerificationError
from slrmerge.progress import Progress
from slrmerge.writer import Written, digest_file

JOURNAL_NAME = ".slrmerge-journal"

_FOR_GOOD = (SourceChangedError, BlendError, VerificationError)
"""After these the same plan never comes again, so that nothing is worth keeping for it."""


class Journal:
    """A folder that fills with shards; `finished` holds those that are complete.

    `published` says that the folder has the target's name, so that nothing is to be kept or cleaned here any more.
    """

    def __init__(self, folder: Path, finished: dict[str, Written], fingerprint: str, *, fsync: bool) -> None:
        self.folder = folder
        self.finished = finished
        self.published = False
        self._fingerprint = fingerprint
        self._fsync = fsync
        self._lock = Lock()

    @classmethod
    def open(cls, folder: Path, fingerprint: str, *, fsync: bool) -> "Journal":
        """Take up the journal in `folder` where it belongs to the same plan; otherwise start with an empty folder."""
        path = folder / JOURNAL_NAME
        lines = path.read_bytes().splitlines() if path.exists() else []
        if lines and lines[0] == fingerprint.encode():
            finished = dict(filter(None, map(_parse, lines[1:])))
        else:
            finished = {}
            if folder.exists():
                shutil.rmtree(folder)
            files.create_folder(folder, fsync=fsync)
        journal = cls(folder, finished, fingerprint, fsync=fsync)
        journal._rewrite()
        return journal

    def resume(self, progress: Progress) -> int:
        """Keep the finished shards whose digests still match, remove everything else; how many were kept."""
        if self.finished:
            progress.say(f"resuming: checking {len(self.finished)} finished shards in {self.folder}")
        for name, expected in list(self.finished.items()):
            path = self.folder / name
            if not path.exists() or digest_file(path) != expected:
                del self.finished[name]
        self.discard_unfinished()
        if self.finished:
            progress.say(f"resuming: {len(self.finished)} shards are as they should be")
        return len(self.finished)

    def record(self, name: str, written: Written) -> None:
        """Add a finished shard."""
        with self._lock, open(self.folder / JOURNAL_NAME, "ab", buffering=0) as file:
            file.write(_line(name, written))
            if self._fsync:
                files.sync_file(file.fileno())
            self.finished[name] = written

    def discard_unfinished(self) -> None:
        """Remove everything but finished shards and the journal itself."""
        for path in self.folder.iterdir():
            if path.name != JOURNAL_NAME and path.name not in self.finished:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Take the journal out of the folder, which is complete; back where the folder cannot take its name."""
        (self.folder / JOURNAL_NAME).unlink()
        try:
            yield
        except BaseException:
            if not self.published and self.folder.exists():
                self._rewrite()
            raise

    def _rewrite(self) -> None:
        lines = [f"{self._fingerprint}\n".encode(), *(_line(name, file) for name, file in self.finished.items())]
        files.write_file(self.folder / JOURNAL_NAME, b"".join(lines), fsync=self._fsync)


def _line(name: str, written: Written) -> bytes:
    return f"{json.dumps([name, *written])}\n".encode()


def _parse(line: bytes) -> tuple[str, Written] | None:
    """A journal's line, or None for one that was cut short by a kill."""
    try:
        name, file_bytes, digest = json.loads(line)
    except (ValueError, TypeError):
        return None
    return (name, Written(file_bytes, digest)) if isinstance(name, str) else None


@contextmanager
def keep_finished(journal: Journal, total: int) -> Iterator[None]:
    """On any failure leave finished shards for the next run, or nothing where there are none, and say so."""
    try:
        yield
    except BaseException as error:
        if journal.published or not journal.folder.exists():
            error.add_note("the merge is complete: this came after it")
            raise
        if journal.finished and not isinstance(error, _FOR_GOOD):
            journal.discard_unfinished()
            error.add_note(
                f"{len(journal.finished)} of {total} shards are finished and kept in {journal.folder}; "
                "the same command takes up from there"
            )
        else:
            shutil.rmtree(journal.folder)
        raise
