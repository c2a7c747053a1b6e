"""Carry out a plan: stream every shard into a sibling folder, then swap that in. It takes no decision of its own.

Killed at any moment, the target is absent or as it was; the next run takes up from the shards that were finished.
"""

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from threading import Event, Lock, local

from slrmerge import files
from slrmerge.blend import Blender, one_core_per_chunk
from slrmerge.card import model_card, recipe_as_run
from slrmerge.checkpoint import CheckpointReader, Extent, open_pair
from slrmerge.errors import CheckpointError, OutputError, Problem, raise_all
from slrmerge.manifest import build_manifest
from slrmerge.merge.journal import Journal, keep_finished
from slrmerge.merge.target import require_space, resolve_target, target_problems
from slrmerge.plan import CARD_NAME, MANIFEST_NAME, RECIPE_NAME, MergePlan, plan_merge
from slrmerge.progress import Progress, Silent, one_at_a_time
from slrmerge.recipe import Recipe
from slrmerge.stream import ShardStream, Sources, file_chunks
from slrmerge.writer import Written, combine, os_errors_at, pieces, write_content, write_piece

_PIECES_PER_SYNC = 8
"""How much of a shard goes to the disk at a time, while more of it is copied: 128 MiB."""


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A finished merge: the folder, its files with their digests, and how many shards an earlier run had finished."""

    folder: Path
    files: dict[str, Written]
    output_bytes: int
    resumed_shards: int
    elapsed_s: float


def merge_checkpoints(
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool = False,
    allow_code: bool = False,
    threads: int | None = None,
    fsync: bool = True,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge the recipe's two checkpoints into the folder `out`, which appears complete or not at all.

    `overwrite` lets the result take the place of an older checkpoint; `threads` defaults to the cores at hand; without
    `fsync` a power cut may lose the result. Raises SlrmergeError: RecipeError, CheckpointError, PlanError and
    OutputError before the first byte is written, NoSpaceError, SourceChangedError and BlendError while it is.
    """
    plan = plan_merge(recipe, open_pair(*recipe.source_folders()), allow_code=allow_code)
    return execute(plan, out, overwrite=overwrite, threads=threads, fsync=fsync, progress=progress)


def execute(
    plan: MergePlan,
    out: Path,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    fsync: bool = True,
    progress: Progress | None = None,
) -> MergeResult:
    """Write what `plan` says to the folder `out`; see `merge_checkpoints`."""
    started = time.monotonic()
    progress = progress or Silent()
    target = resolve_target(out)
    raise_all(target_problems(plan, target, overwrite=overwrite), OutputError)
    with os_errors_at(target):
        files.create_folder(target.parent, fsync=fsync)
        with files.exclusive(target):
            if files.recover(target):
                progress.say(f"brought back {target}, which an interrupted swap had set aside")
            raise_all(target_problems(plan, target, overwrite=overwrite), OutputError)
            written, resumed = _make(plan, target, threads or available_cores(), fsync=fsync, progress=progress)
    output_bytes = sum(file.file_bytes for file in written.values())
    return MergeResult(target, written, output_bytes, resumed, time.monotonic() - started)


def _make(
    plan: MergePlan, target: Path, threads: int, *, fsync: bool, progress: Progress
) -> tuple[dict[str, Written], int]:
    """Fill the staging folder and give it the target's name; what it holds, and how many shards were there already."""
    with CheckpointReader(plan.pretrained) as pre, CheckpointReader(plan.posttrained) as post:
        sources = Sources(pre, post)
        require_sound_bools(plan, sources)
        journal = Journal.open(files.staging_folder(target), plan.fingerprint(), fsync=fsync)
        with keep_finished(journal, len(plan.shards)):
            resumed = journal.resume(progress)
            require_space(plan, target, finished_bytes=sum(file.file_bytes for file in journal.finished.values()))
            written = _write_files(plan, journal, target, fsync=fsync)
            _write_shards(plan, sources, journal, threads, fsync=fsync, progress=progress)
            written = _write_manifest(plan, journal, written, fsync=fsync)
            with journal.set_aside():
                if fsync:
                    files.sync_folder(journal.folder)
                leftover = files.publish(journal.folder, target)
                journal.published = True
                if fsync:
                    files.sync_folder(target.parent)
            if leftover is not None:
                _remove(leftover, progress)
    return written, resumed


def _remove(leftover: Path, progress: Progress) -> None:
    """Remove the checkpoint that was replaced; the merge is complete whether or not that works."""
    try:
        shutil.rmtree(leftover)
    except OSError as error:
        progress.say(f"the checkpoint that was replaced is still in {leftover} ({error.strerror}): remove it by hand")


def available_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_sound_bools(plan: MergePlan, sources: Sources) -> None:
    """Raise CheckpointError where a BOOL tensor holds bytes that are neither 0 nor 1; no header can tell."""
    problems: list[Problem] = []
    for tensor in plan.tensors():
        if tensor.info.dtype == "BOOL":
            reader = sources.posttrained if tensor.pretrained is None else sources.pretrained
            data = bytearray(tensor.info.nbytes)
            reader.read_into(tensor.pretrained or tensor.name, 0, memoryview(data))
            if max(data, default=0) > 1:
                folder = reader.checkpoint.folder
                problems.append(Problem(str(folder), f"{tensor.name} is BOOL and holds bytes other than 0 and 1"))
    raise_all(problems, CheckpointError)


def _write_shards(
    plan: MergePlan, sources: Sources, journal: Journal, threads: int, *, fsync: bool, progress: Progress
) -> None:
    """Write the shards that the journal lacks, piece by piece, `threads` pieces at a time."""
    waiting = [shard for shard in plan.shards if shard.name not in journal.finished]
    progress.start("merging", sum(shard.file_bytes for shard in waiting))
    advance = one_at_a_time(progress.advance)
    # Nothing starts before all is queued: a thread that Ctrl-C catches being born is one that no pool waits for.
    go, stop = Event(), Event()
    own = _PerThread()

    def write(shard: _OpenShard, number: int, start: int, end: int) -> None:
        go.wait()
        if stop.is_set():
            return
        parts = _until(stop, shard.stream.parts(start, end, own.blender))
        digest = write_piece(shard.path, start, parts, on_bytes=advance)
        if stop.is_set():
            return
        if fsync and (number + 1) % _PIECES_PER_SYNC == 0:
            shard.early_syncs.append(syncing.submit(files.sync_path, shard.path))
        if shard.is_finished_by(number, digest):
            if fsync:
                for sync in shard.early_syncs:
                    sync.result()  # the system tells of a failed write once only, perhaps to this one
                files.sync_path(shard.path)
            sources.check_unchanged()
            journal.record(shard.path.name, shard.written)

    one_core = one_core_per_chunk() if plan.needs_arithmetic else nullcontext()
    with one_core, ThreadPoolExecutor(1) as syncing, ThreadPoolExecutor(threads) as pool:
        pending: list[Future[None]] = []
        try:
            # Neighbouring pieces in the queue belong to different files: threads that share one wait for its lock.
            # So there are never fewer files at a time than threads, unless there are no more.
            groups = max(len(waiting) // threads, 1)
            for group in (waiting[first::groups] for first in range(groups)):
                opened = [_OpenShard(ShardStream(plan, shard, sources), journal.folder / shard.name) for shard in group]
                for row in zip_longest(*(enumerate(pieces(shard.file_bytes)) for shard in group)):
                    for shard, piece in zip(opened, row, strict=True):
                        if piece is not None:
                            pending.append(pool.submit(write, shard, piece[0], *piece[1]))
            go.set()
            wait(pending, return_when=FIRST_EXCEPTION)
        finally:
            if not go.is_set() or not all(future.done() and not future.exception() for future in pending):
                stop.set()
                go.set()
                pool.shutdown(cancel_futures=True)
    for future in pending:
        if not future.cancelled():
            future.result()


class _PerThread(local):
    """What each thread has of its own."""

    def __init__(self) -> None:
        self.blender = Blender()


class _OpenShard:
    """A shard while its pieces are written."""

    def __init__(self, stream: ShardStream, path: Path) -> None:
        self.stream = stream
        self.path = path
        self.early_syncs: list[Future[None]] = []
        self._lock = Lock()
        self._digests: list[bytes | None] = [None for _ in pieces(stream.shard.file_bytes)]
        path.touch()

    def is_finished_by(self, number: int, digest: bytes) -> bool:
        """Note the digest of a piece; whether it was the last one missing."""
        with self._lock:
            self._digests[number] = digest
            return None not in self._digests

    @property
    def written(self) -> Written:
        return Written(self.stream.shard.file_bytes, combine(filter(None, self._digests)))


def _until(stop: Event, parts: Iterator[memoryview | Extent]) -> Iterator[memoryview | Extent]:
    for part in parts:
        if stop.is_set():
            return
        yield part


def _write_files(plan: MergePlan, journal: Journal, target: Path, *, fsync: bool) -> dict[str, Written]:
    """Write everything beside the weights, the manifest excepted."""
    recipe = recipe_as_run(plan, seen_from=target)
    made = {RECIPE_NAME: recipe, CARD_NAME: model_card(plan, recipe)}
    contents = {file.name: b"".join(file_chunks(file)) for file in plan.files} | made
    written: dict[str, Written] = {}
    for name, content in contents.items():
        path = journal.folder / name
        files.create_folder(path.parent, fsync=fsync)
        written[name] = write_content(path, content, fsync=fsync)
    if fsync:
        for folder in {(journal.folder / name).parent for name in written}:
            files.sync_folder(folder)
    return written


def _write_manifest(
    plan: MergePlan, journal: Journal, written: dict[str, Written], *, fsync: bool
) -> dict[str, Written]:
    """Write the manifest of what was `written` and of the shards; returns all that the finished folder holds."""
    written = written | journal.finished
    manifest = build_manifest(plan, written)
    return written | {MANIFEST_NAME: write_content(journal.folder / MANIFEST_NAME, manifest, fsync=fsync)}
