"""The journal of a merge: which pieces of its shards are finished, so that a killed merge resumes."""

import json
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from slrmerge.errors import BlendError, SourceChangedError, VerificationError
from slrmerge.io import files
from slrmerge.io.output_folder import remove
from slrmerge.io.pieces import digest_piece, pieces
from slrmerge.io.progress import Progress
from slrmerge.merging.plan.model import PlannedShard

JOURNAL_NAME = ".slrmerge-journal"

Piece = tuple[str, int]
"""A shard's name and the number of one of its pieces."""

_FINAL = (SourceChangedError, BlendError, VerificationError)
"""After these the same plan cannot be resumed."""


class Journal:
    """A staging folder that fills with shards; `finished` has the digests of complete pieces. Safe to share."""

    def __init__(self, folder: Path, finished: dict[Piece, bytes], fingerprint: str, *, durable: bool) -> None:
        self.folder = folder
        self.finished = finished
        self.nan_names: set[str] = set()
        """The blended tensors with a NaN, also those of earlier runs."""
        self.durable = durable
        self._fingerprint = fingerprint
        self._lock = Lock()

    @classmethod
    def open(cls, folder: Path, fingerprint: str, *, durable: bool) -> "Journal":
        """Continue the journal in `folder` if it belongs to the same plan; otherwise begin one."""
        path = folder / JOURNAL_NAME
        if not _is_own(path):
            remove([path])
        lines = path.read_bytes().splitlines() if path.exists() else []
        finished: dict[Piece, bytes] = {}
        nan_names: set[str] = set()
        if lines and lines[0] == fingerprint.encode():
            entries = list(map(_parse, lines[1:]))
            finished = dict(entry for entry in entries if isinstance(entry, tuple))
            nan_names = {entry for entry in entries if isinstance(entry, str)}
        journal = cls(folder, finished, fingerprint, durable=durable)
        journal.nan_names = nan_names if finished else set()
        if not finished:
            journal.discard_unfinished()
        journal._rewrite()
        return journal

    def resume(self, shards: Iterable[PlannedShard], progress: Progress) -> int:
        """Keep the finished pieces whose digests still match and remove everything else; returns how many were kept."""
        if self.finished:
            progress.message(f"resuming: checking {len(self.finished):,} finished pieces in {self.folder}")
        valid: dict[Piece, bytes] = {}
        for shard in shards:
            path = self.folder / shard.name
            if _is_own(path) and path.stat().st_size <= shard.file_bytes:
                for piece, start, stop in pieces_of(shard):
                    digest = self.finished.get(piece)
                    if digest is not None and digest_piece(path, start, stop) == digest:
                        valid[piece] = digest
        self.finished = valid
        self.discard_unfinished()
        if self.durable:
            for name in sorted(self._begun()):
                self.sync(name)
        if self.finished:
            progress.message(f"resuming: {len(self.finished):,} pieces are intact")
        return len(self.finished)

    def allocated_bytes(self, shard: PlannedShard) -> int:
        """The disk space that a shard occupies already."""
        path = self.folder / shard.name
        return min(files.allocated_bytes(path), shard.file_bytes) if path.exists() else 0

    def record(self, piece: Piece, digest: bytes) -> None:
        """Add a finished piece."""
        with self._lock:
            self._append(_line(piece, digest))
            self.finished[piece] = digest

    def note_nans(self, names: Iterable[str]) -> None:
        """Add blended tensors with a NaN; call this before their pieces are recorded."""
        with self._lock:
            for name in sorted({*names} - self.nan_names):
                self._append(_nan_line(name))
                self.nan_names.add(name)

    def sync(self, name: str) -> None:
        """Flush a shard to the disk. Where that fails its pieces are forgotten: the system reports a lost write only
        once, and goes on showing the data that it has not written.
        """
        try:
            files.sync_path(self.folder / name)
        except OSError:
            with self._lock:
                self.finished = {piece: digest for piece, digest in self.finished.items() if piece[0] != name}
            raise

    def discard_unfinished(self) -> None:
        """Remove everything but the journal and shards with finished pieces."""
        kept = {JOURNAL_NAME, *self._begun()}
        remove(path for path in self.folder.iterdir() if path.name not in kept)

    def what_is_kept(self, error: BaseException, total: int) -> str | None:
        """After a failure: discard unfinished pieces and describe what the next run resumes from; None if nothing."""
        if not self.finished or isinstance(error, _FINAL):
            return None
        self.discard_unfinished()
        kept = f"{len(self.finished):,} of {total:,} pieces are finished and kept in {self.folder}"
        return f"{kept}; run the same command again to resume"

    @contextmanager
    def removed(self, is_published: Callable[[], bool]) -> Iterator[None]:
        """Take the journal out of the complete folder; put it back where the folder cannot be published."""
        (self.folder / JOURNAL_NAME).unlink()
        try:
            yield
        except BaseException:
            if not is_published() and self.folder.exists():
                self._rewrite()
            raise

    def _begun(self) -> set[str]:
        return {name for name, _ in self.finished}

    def _append(self, line: bytes) -> None:
        with open(self.folder / JOURNAL_NAME, "ab", buffering=0, opener=files.open_no_link) as file:
            file.write(line)

    def _rewrite(self) -> None:
        nans = map(_nan_line, sorted(self.nan_names))
        lines = [f"{self._fingerprint}\n".encode(), *nans, *(_line(*entry) for entry in self.finished.items())]
        files.write_file(self.folder / JOURNAL_NAME, b"".join(lines), durable=self.durable)


def _is_own(path: Path) -> bool:
    """Whether there is a regular file without another name, so that what is written to it changes nothing else."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= 1


def pieces_of(shard: PlannedShard) -> Iterator[tuple[Piece, int, int]]:
    """Each piece of a shard, with its first byte and the one after its last."""
    for number, (start, stop) in enumerate(pieces(shard.file_bytes)):
        yield (shard.name, number), start, stop


def _line(piece: Piece, digest: bytes) -> bytes:
    return f"{json.dumps([*piece, digest.hex()])}\n".encode()


def _nan_line(name: str) -> bytes:
    return f"{json.dumps({'nan': name})}\n".encode()


def _parse(line: bytes) -> tuple[Piece, bytes] | str | None:
    """A line of the journal: a piece and its digest, or a tensor with NaN; None for one that a kill cut short."""
    try:
        entry = json.loads(line)
        if isinstance(entry, dict):
            return entry["nan"] if isinstance(entry["nan"], str) else None
        name, number, digest = entry
        return ((name, number), bytes.fromhex(digest)) if (type(name), type(number)) == (str, int) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
