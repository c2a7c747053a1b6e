"""Write the shards of a plan, several pieces at a time, each noted in the journal when it is finished."""

from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path
from threading import Event, Lock, local

from slrmerge.blend import Blender, one_core_per_chunk
from slrmerge.merge.journal import Journal, Piece, pieces_of
from slrmerge.plan import MergePlan
from slrmerge.progress import Progress, one_at_a_time
from slrmerge.stream import ShardStream, Sources
from slrmerge.writer import reserve, write_piece

_PIECES_PER_SYNC = 8
"""How much of a shard goes to the disk at a time, while more of it is copied: 128 MiB."""


def write_shards(
    plan: MergePlan, sources: Sources, journal: Journal, threads: int, *, fsync: bool, progress: Progress
) -> None:
    """Write the pieces that the journal lacks, `threads` of them at a time."""
    missing = ((shard, [job for job in pieces_of(shard) if job[0] not in journal.finished]) for shard in plan.shards)
    waiting = [(shard, jobs) for shard, jobs in missing if jobs]
    total = sum(stop - start for _, jobs in waiting for _, start, stop in jobs)
    progress.start("downloading and merging" if plan.download_bytes else "merging", total)
    advance = one_at_a_time(progress.advance)
    # Nothing starts before all is queued: a thread that Ctrl-C catches being born is one that no pool waits for.
    go, stop = Event(), Event()
    own = _PerThread()

    def write(shard: _OpenShard, piece: Piece, start: int, end: int) -> None:
        go.wait()
        if stop.is_set():
            return
        chunks = _until(stop, shard.stream.chunks(start, end, own.blender))
        digest = write_piece(shard.path, start, chunks, on_bytes=advance)
        if stop.is_set():
            return
        journal.record(piece, digest)
        if fsync and piece[1] % _PIECES_PER_SYNC == _PIECES_PER_SYNC - 1:
            shard.early_syncs.append(syncing.submit(journal.sync, shard.path.name))
        if shard.is_last():
            if fsync:
                for sync in shard.early_syncs:
                    sync.result()  # the system tells of a failed write once only, perhaps to this one
                journal.sync(shard.path.name)
            sources.check_unchanged()

    one_core = one_core_per_chunk() if plan.needs_arithmetic else nullcontext()
    with one_core, ThreadPoolExecutor(1) as syncing, ThreadPoolExecutor(threads) as pool:
        pending: list[Future[None]] = []
        failed: list[Future[None]] = []
        try:
            # Neighbouring pieces in the queue belong to different files: threads that share one wait for its lock.
            # So there are never fewer files at a time than threads, unless there are no more.
            groups = max(len(waiting) // threads, 1)
            for group in (waiting[first::groups] for first in range(groups)):
                opened = [
                    _OpenShard(ShardStream(plan, shard, sources), journal.folder / shard.name, len(jobs))
                    for shard, jobs in group
                ]
                for row in zip_longest(*(jobs for _, jobs in group)):
                    pending += [pool.submit(write, shard, *job) for shard, job in zip(opened, row, strict=True) if job]
            go.set()
            done, _ = wait(pending, return_when=FIRST_EXCEPTION)
            failed = [future for future in pending if future in done and future.exception()]
        finally:
            if failed or not go.is_set() or not all(future.done() for future in pending):
                stop.set()
                go.set()
                sources.give_up()
                pool.shutdown(cancel_futures=True)
    for future in failed:  # what others raised after that came of their being stopped
        future.result()


class _PerThread(local):
    """What each thread has of its own."""

    def __init__(self) -> None:
        self.blender = Blender()


class _OpenShard:
    """A shard while the `missing` ones of its pieces are written."""

    def __init__(self, stream: ShardStream, path: Path, missing: int) -> None:
        self.stream = stream
        self.path = path
        self.early_syncs: list[Future[None]] = []
        self._lock = Lock()
        self._missing = missing
        reserve(path, stream.shard.file_bytes)

    def is_last(self) -> bool:
        """Count a piece that was written; whether it was the last one missing."""
        with self._lock:
            self._missing -= 1
            return self._missing == 0


def _until(stop: Event, chunks: Iterator[memoryview]) -> Iterator[memoryview]:
    for chunk in chunks:
        if stop.is_set():
            return
        yield chunk
