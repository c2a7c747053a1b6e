"""The staging folder of a merge and its journal: which pieces of shards are finished, so that a kill costs no more."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from slrmerge import files
from slrmerge.errors import BlendError, SourceChangedError, VerificationError
from slrmerge.plan import PlannedShard
from slrmerge.progress import Progress
from slrmerge.writer import digest_piece, pieces

JOURNAL_NAME = ".slrmerge-journal"

Piece = tuple[str, int]
"""A shard's name and the number of a piece of it."""

_FOR_GOOD = (SourceChangedError, BlendError, VerificationError)
"""After these the same plan never comes again, so that nothing is worth keeping for it."""


class Journal:
    """A folder that fills with shards; `finished` holds the digests of the pieces that are complete.

    `published` says that the folder has the target's name, so that nothing is to be kept or cleaned here any more.
    """

    def __init__(self, folder: Path, finished: dict[Piece, bytes], fingerprint: str, *, fsync: bool) -> None:
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

    def resume(self, shards: Iterable[PlannedShard], progress: Progress) -> int:
        """Keep the finished pieces whose digests still match, remove everything else; how many were kept."""
        if self.finished:
            progress.say(f"resuming: checking {len(self.finished):,} finished pieces in {self.folder}")
        sound: dict[Piece, bytes] = {}
        for shard in shards:
            path = self.folder / shard.name
            if path.exists() and path.stat().st_size <= shard.file_bytes:
                for piece, start, stop in pieces_of(shard):
                    digest = self.finished.get(piece)
                    if digest is not None and digest_piece(path, start, stop) == digest:
                        sound[piece] = digest
        self.finished = sound
        self.discard_unfinished()
        if self._fsync:
            for name in sorted(self._begun()):
                self.sync(name)
        if self.finished:
            progress.say(f"resuming: {len(self.finished):,} pieces are as they should be")
        return len(self.finished)

    def held_bytes(self, shards: Iterable[PlannedShard]) -> int:
        """The room on the disk that has been set aside for `shards` already."""
        begun = ((self.folder / shard.name, shard.file_bytes) for shard in shards)
        return sum(min(files.held_bytes(path), file_bytes) for path, file_bytes in begun if path.exists())

    def record(self, piece: Piece, digest: bytes) -> None:
        """Add a finished piece."""
        with self._lock, open(self.folder / JOURNAL_NAME, "ab", buffering=0) as file:
            file.write(_line(piece, digest))
            self.finished[piece] = digest

    def sync(self, name: str) -> None:
        """Bring a shard to the disk. Where that fails its pieces are forgotten: the system tells of a lost write once
        only, and goes on showing what it has not written.
        """
        try:
            files.sync_path(self.folder / name)
        except OSError:
            with self._lock:
                self.finished = {piece: digest for piece, digest in self.finished.items() if piece[0] != name}
            raise

    def discard_unfinished(self) -> None:
        """Remove everything but shards with finished pieces and the journal itself."""
        kept = {JOURNAL_NAME, *self._begun()}
        for path in self.folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _begun(self) -> set[str]:
        return {name for name, _ in self.finished}

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
        lines = [f"{self._fingerprint}\n".encode(), *(_line(*entry) for entry in self.finished.items())]
        files.write_file(self.folder / JOURNAL_NAME, b"".join(lines), fsync=self._fsync)


def pieces_of(shard: PlannedShard) -> Iterator[tuple[Piece, int, int]]:
    """Each piece of a shard, with the bytes it goes from and to."""
    for number, (start, stop) in enumerate(pieces(shard.file_bytes)):
        yield (shard.name, number), start, stop


def _line(piece: Piece, digest: bytes) -> bytes:
    return f"{json.dumps([*piece, digest.hex()])}\n".encode()


def _parse(line: bytes) -> tuple[Piece, bytes] | None:
    """A journal's line, or None for one that was cut short by a kill."""
    try:
        name, number, digest = json.loads(line)
        return ((name, number), bytes.fromhex(digest)) if (type(name), type(number)) == (str, int) else None
    except (ValueError, TypeError, RecursionError):
        return None


@contextmanager
def keep_finished(journal: Journal, total: int) -> Iterator[None]:
    """On any failure leave finished pieces for the next run, or nothing where there are none, and say so."""
    try:
        yield
    except BaseException as error:
        if journal.published or not journal.folder.exists():
            error.add_note("the merge is complete: this came after it")
            raise
        if journal.finished and not isinstance(error, _FOR_GOOD):
            journal.discard_unfinished()
            error.add_note(
                f"{len(journal.finished):,} of {total:,} pieces are finished and kept in {journal.folder}; "
                "the same command takes up from there"
            )
        else:
            shutil.rmtree(journal.folder)
        raise
