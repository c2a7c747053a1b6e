"""Write the shards of a plan, several pieces at a time, each recorded in the journal when it is finished.

Where the file system can, a piece of a kept shard is first cloned from the post-trained file and then overwritten in
part. A piece is cloned again by the run that finishes it: nothing depends on what an earlier run cloned.
"""

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryFile
from threading import Event, Lock
from typing import NamedTuple, TypeVar

from slrmerge.io.pieces import Chunk, pieces, reserve, translate_os_errors, write_piece
from slrmerge.io.progress import Progress
from slrmerge.io.threads import ThreadPool
from slrmerge.merging.blend import one_core_per_chunk
from slrmerge.merging.journal import Journal, Piece, pieces_of
from slrmerge.merging.plan.model import MergePlan, PlannedShard
from slrmerge.merging.stream import HybridReader, ShardStream

T = TypeVar("T")

_PIECES_PER_SYNC = 8
"""How much of a shard is flushed to the disk at a time, while more of it is written: 128 MiB."""

_LEAST_KEPT = 16
"""A piece is cloned where at least one byte in so many is kept."""

_BLOCK_BYTES = 4096
"""The usual block of a file system: what is overwritten in part is copied whole."""


class Job(NamedTuple):
    """A piece to write: bytes `start` to `stop` of its shard, of which `written_bytes` are not cloned."""

    piece: Piece
    start: int
    stop: int
    written_bytes: int

    @property
    def is_cloned(self) -> bool:
        return self.written_bytes < self.stop - self.start


class ShardJobs(NamedTuple):
    """A shard and its missing pieces; `is_cloned` where any of the shard is, whose space is then not reserved."""

    stream: ShardStream
    jobs: list[Job]
    is_cloned: bool


def missing_pieces(
    plan: MergePlan, reader: HybridReader, folder: Path, finished: Container[Piece] = ()
) -> list[ShardJobs]:
    """The pieces that are not finished, by shard, as they are to be written to `folder` or one on the same disk."""
    missing: list[ShardJobs] = []
    for shard in plan.shards:
        left = [job for job in pieces_of(shard) if job[0] not in finished]
        if left:
            stream = ShardStream(plan, shard, reader)
            is_cloned = _can_clone(shard, reader, folder)
            jobs = [
                Job(piece, start, stop, _written_bytes(stream, start, stop) if is_cloned else stop - start)
                for piece, start, stop in left
            ]
            missing.append(ShardJobs(stream, jobs, is_cloned))
    return missing


def needed_bytes(missing: Iterable[ShardJobs], allocated_bytes: Callable[[PlannedShard], int] = lambda _: 0) -> int:
    """The disk space that the missing pieces need, beyond what their shards occupy already."""
    needed = 0
    for stream, jobs, is_cloned in missing:
        if is_cloned:
            needed += sum(job.written_bytes for job in jobs)
        else:
            needed += stream.shard.file_bytes - allocated_bytes(stream.shard)
    return needed


def _can_clone(shard: PlannedShard, reader: HybridReader, folder: Path) -> bool:
    """Whether a file in `folder` can share the disk space of what is unchanged in a kept shard."""
    if not shard.kept or not any(tensor.is_unchanged for tensor in shard.tensors):
        return False
    _, stop = next(pieces(shard.file_bytes))
    with translate_os_errors(folder), TemporaryFile(dir=folder) as probe:
        return reader.pair.posttrained.clone_file(shard.name, probe.fileno(), 0, stop)


def _written_bytes(stream: ShardStream, start: int, stop: int) -> int:
    """The bytes of a piece to write, in whole blocks; all where hardly any of them could be cloned instead."""
    changed = [(begin, end) for tensor, begin, end in stream.parts(start, stop) if tensor is not None]
    if (stop - start) - sum(end - begin for begin, end in changed) < (stop - start) // _LEAST_KEPT:
        return stop - start
    return min(sum(end - begin + 2 * _BLOCK_BYTES for begin, end in changed), stop - start - 1)


def write_shards(
    missing: Sequence[ShardJobs],
    plan: MergePlan,
    reader: HybridReader,
    journal: Journal,
    threads: int,
    progress: Progress,
) -> None:
    """Write the missing pieces, `threads` of them at a time."""
    total = sum(job.stop - job.start for shard in missing for job in shard.jobs)
    one_core = one_core_per_chunk(progress) if plan.needs_arithmetic else nullcontext()
    with one_core, _ShardWriter(reader, journal, threads, progress) as writer:
        progress.start("downloading and merging" if plan.download_bytes else "merging", total)
        writer.run(missing)


class _ShardWriter:
    """The threads that write the pieces of a merge."""

    def __init__(self, reader: HybridReader, journal: Journal, threads: int, progress: Progress) -> None:
        self._reader, self._journal, self._progress = reader, journal, progress
        self._threads = threads
        self._pool = ThreadPool(threads)
        self._syncing = ThreadPool(1)
        # Nothing starts before everything is queued: Ctrl-C in the middle of starting a thread would leave the pool
        # waiting for it.
        self._started, self._stopped = Event(), Event()

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with self._syncing:  # shut down even where an interrupt ends the wait for the pool
            self._pool.shutdown()

    def run(self, missing: Sequence[ShardJobs]) -> None:
        """Write these pieces. Raises what the first piece that fails raises."""
        pending: list[Future[None]] = []
        failed: list[Future[None]] = []
        try:
            # Threads that write to one file wait for its lock: neighbours in the queue belong to different files, and
            # as many files as threads are written at a time.
            groups = max(len(missing) // self._threads, 1)
            for group in (missing[first::groups] for first in range(groups)):
                opened = [(_OpenShard(shard, self._journal), shard.jobs) for shard in group]
                queue = interleave([[(shard, job) for job in jobs] for shard, jobs in opened])
                pending += [self._pool.submit(self._write, *entry) for entry in queue]
            self._started.set()
            left: Collection[Future[None]] = pending
            while left and not failed:  # again each second: a Ctrl-C just before a wait does not end that wait
                done, left = wait(left, timeout=1, return_when=FIRST_EXCEPTION)
                failed = [future for future in pending if future in done and future.exception()]
        finally:
            if failed or not self._started.is_set() or not all(future.done() for future in pending):
                self._stopped.set()
                self._started.set()
                self._reader.pair.cancel()
                self._pool.shutdown(cancel_futures=True)
        for future in failed:  # the first one: others may only report that they were stopped
            future.result()

    def _write(self, shard: "_OpenShard", job: Job) -> None:
        self._started.wait()
        if self._stopped.is_set():
            return
        try:
            self._write_piece(shard, job)
        except BaseException:
            self._stopped.set()  # here, since this thread may finish the next piece before any other wakes up
            raise

    def _write_piece(self, shard: "_OpenShard", job: Job) -> None:
        def clone(target: int) -> bool:
            source = self._reader.pair.posttrained
            return job.is_cloned and source.clone_file(shard.stream.shard.name, target, job.start, job.stop)

        chunks = self._until_stopped(shard.stream.chunks(job.start, job.stop))
        digest = write_piece(shard.path, job.start, chunks, clone=clone, on_bytes=self._progress.advance)
        if self._stopped.is_set():
            return
        self._journal.note_nans(self._reader.nan_names)
        self._journal.record(job.piece, digest)
        durable = self._journal.durable
        if durable and job.piece[1] % _PIECES_PER_SYNC == _PIECES_PER_SYNC - 1:
            shard.early_syncs.append(self._syncing.submit(self._journal.sync, shard.path.name))
        if shard.is_last():
            if durable:
                for sync in shard.early_syncs:
                    sync.result()  # the system reports a failed write only once, perhaps to this call
                self._journal.sync(shard.path.name)
            self._reader.pair.check_unchanged()

    def _until_stopped(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            if self._stopped.is_set():
                return
            yield chunk


class _OpenShard:
    """A shard of which pieces are being written."""

    def __init__(self, shard: ShardJobs, journal: Journal) -> None:
        self.stream = shard.stream
        self.path = journal.folder / shard.stream.shard.name
        self.early_syncs: list[Future[None]] = []
        self._lock = Lock()
        self._missing = len(shard.jobs)
        reserve(self.path, shard.stream.shard.file_bytes, sparse=shard.is_cloned)

    def is_last(self) -> bool:
        """Count a written piece; whether it was the last one missing."""
        with self._lock:
            self._missing -= 1
            return self._missing == 0


def interleave(queues: Sequence[Sequence[T]]) -> list[T]:
    """The first entries of all queues, then the second ones, and so on."""
    absent = object()
    return [entry for row in zip_longest(*queues, fillvalue=absent) for entry in row if entry is not absent]  # type: ignore[misc]
