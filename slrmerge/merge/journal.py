"""The staging folder of a merge and its journal: which shards are finished, so that a kill costs one shard."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from slrmerge import files
from slrmerge.progress import Progress
from slrmerge.writer import Written, digest_file

JOURNAL_NAME = ".slrmerge-journal"


class Journal:
    """A folder that fills with shards; `finished` holds those that are complete."""

    def __init__(self, folder: Path, finished: dict[str, Written], *, fsync: bool) -> None:
        self.folder = folder
        self.finished = finished
        self._fsync = fsync
        self._lock = Lock()

    @classmethod
    def open(cls, folder: Path, fingerprint: str, *, fsync: bool) -> "Journal":
        """Take up the journal in `folder` where it belongs to the same plan; otherwise start with an empty folder."""
        finished: dict[str, Written] = {}
        path = folder / JOURNAL_NAME
        lines: list[str] = path.read_text().splitlines() if path.exists() else []
        if lines and lines[0] == fingerprint:
            for line in lines[1:]:
                with suppress(ValueError):  # a last line cut short by the kill
                    name, file_bytes, digest = json.loads(line)
                    finished[name] = Written(file_bytes, digest)
        else:
            if folder.exists():
                shutil.rmtree(folder)
            files.create_folder(folder)
            files.write_file(path, f"{fingerprint}\n".encode(), fsync=fsync)
        return cls(folder, finished, fsync=fsync)

    def resume(self, progress: Progress) -> int:
        """Keep the finished shards whose digests still match, remove everything else; how many were kept."""
        if self.finished:
            progress.say(f"resuming: checking {len(self.finished)} finished shards in {self.folder}")
        for name, expected in list(self.finished.items()):
            path = self.folder / name
            if not path.exists() or digest_file(path) != expected:
                del self.finished[name]
        for path in self.folder.iterdir():
            if path.name != JOURNAL_NAME and path.name not in self.finished:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.finished:
            progress.say(f"resuming: {len(self.finished)} shards are as they should be")
        return len(self.finished)

    def record(self, name: str, written: Written) -> None:
        with self._lock, open(self.folder / JOURNAL_NAME, "ab") as file:
            self.finished[name] = written
            file.write(f"{json.dumps([name, *written])}\n".encode())
            if self._fsync:
                file.flush()
                files.sync_file(file.fileno())

    def close(self) -> None:
        (self.folder / JOURNAL_NAME).unlink()


@contextmanager
def keep_finished(journal: Journal, total: int) -> Iterator[None]:
    """On any failure leave finished shards for the next run, or nothing where there are none, and say so."""
    try:
        yield
    except BaseException as error:
        if journal.finished:
            for path in journal.folder.iterdir():
                if path.name != JOURNAL_NAME and path.name not in journal.finished:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            error.add_note(
                f"{len(journal.finished)} of {total} shards are finished and kept in {journal.folder}; "
                "the same command takes up from there"
            )
        else:
            shutil.rmtree(journal.folder)
        raise
