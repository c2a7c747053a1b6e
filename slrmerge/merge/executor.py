"""Carry out a plan: stream every shard into a sibling folder, then swap that in. It takes no decision of its own.

Killed at any moment, the target is absent or as it was; the next run takes up from the shards that were finished.
"""

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from slrmerge import files
from slrmerge.blend import one_core_per_chunk
from slrmerge.card import model_card, recipe_as_run
from slrmerge.checkpoint import CheckpointReader, open_pair
from slrmerge.errors import CheckpointError, OutputError, Problem, VerificationError, raise_all
from slrmerge.manifest import build_manifest
from slrmerge.merge.journal import Journal, keep_finished
from slrmerge.merge.target import require_space, resolve_target, target_problems
from slrmerge.plan import CARD_NAME, MANIFEST_NAME, RECIPE_NAME, MergePlan, PlannedShard, plan_merge
from slrmerge.progress import Progress, Silent, one_at_a_time
from slrmerge.recipe import Recipe
from slrmerge.stream import Sources, file_chunks, shard_chunks
from slrmerge.writer import Written, output_error, write_chunks


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
    with _os_errors_at(target):
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
            _write_shards(plan, sources, journal, threads, fsync=fsync, progress=progress)
            written = _write_files(plan, journal, target, fsync=fsync)
            _judge(plan, journal.folder)
            with journal.set_aside():
                if fsync:
                    files.sync_folder(journal.folder)
                leftover = files.publish(journal.folder, target, fsync=fsync)
    if leftover is not None:
        shutil.rmtree(leftover)
    return written, resumed


def available_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_sound_bools(plan: MergePlan, sources: Sources) -> None:
    """Raise CheckpointError where a BOOL tensor holds bytes that are neither 0 nor 1; no header can tell."""
    problems: list[Problem] = []
    for shard in plan.shards:
        flags = tuple(tensor for tensor in shard.tensors if tensor.info.dtype == "BOOL")
        for tensor in flags:
            chunks = shard_chunks(plan, PlannedShard(shard.name, (tensor,)), sources)
            next(chunks)  # the header
            if any(max(chunk) > 1 for chunk in chunks):
                side = plan.posttrained if tensor.pretrained is None else plan.pretrained
                problems.append(Problem(str(side.folder), f"{tensor.name} is BOOL and holds bytes other than 0 and 1"))
    raise_all(problems, CheckpointError)


@contextmanager
def _os_errors_at(target: Path) -> Iterator[None]:
    """Refusals of the operating system that nobody closer has put into words."""
    try:
        yield
    except OSError as error:
        raise output_error(Path(error.filename or target), error) from error


def _write_shards(
    plan: MergePlan, sources: Sources, journal: Journal, threads: int, *, fsync: bool, progress: Progress
) -> None:
    """Write the shards that the journal lacks, several at a time."""
    waiting = [shard for shard in plan.shards if shard.name not in journal.finished]
    progress.start("merging", sum(shard.file_bytes for shard in waiting))
    workers = max(1, min(threads, len(waiting)))
    stop = Event()
    advance = one_at_a_time(progress.advance)

    def write(shard: PlannedShard) -> None:
        chunks = _until(stop, shard_chunks(plan, shard, sources, lanes=max(1, threads // workers)))
        written = write_chunks(journal.folder / shard.name, chunks, fsync=fsync, on_bytes=advance)
        sources.check_unchanged()
        if not stop.is_set():
            journal.record(shard.name, written)

    with one_core_per_chunk() if plan.needs_arithmetic else nullcontext(), ThreadPoolExecutor(workers) as pool:
        pending: list[Future[None]] = [pool.submit(write, shard) for shard in waiting]
        try:
            wait(pending, return_when=FIRST_EXCEPTION)
        finally:
            if not all(future.done() and not future.exception() for future in pending):
                stop.set()
                pool.shutdown(cancel_futures=True)
    for future in pending:
        if not future.cancelled():
            future.result()


def _until(stop: Event, chunks: Iterator[memoryview]) -> Iterator[memoryview]:
    for chunk in chunks:
        if stop.is_set():
            return
        yield chunk


def _write_files(plan: MergePlan, journal: Journal, target: Path, *, fsync: bool) -> dict[str, Written]:
    """Write everything beside the shards; returns all that the finished folder holds."""
    recipe = recipe_as_run(plan, seen_from=target)
    written = dict(journal.finished)

    def write(name: str, chunks: Iterable[memoryview]) -> None:
        path = journal.folder / name
        files.create_folder(path.parent, fsync=fsync)
        written[name] = write_chunks(path, chunks, fsync=fsync)

    for file in plan.files:
        write(file.name, file_chunks(file))
    for name, content in ((RECIPE_NAME, recipe), (CARD_NAME, model_card(plan, recipe))):
        write(name, [memoryview(content)])
    write(MANIFEST_NAME, [memoryview(build_manifest(plan, written))])
    if fsync:
        for folder in {(journal.folder / name).parent for name in written}:
            files.sync_folder(folder)
    return written


def _judge(plan: MergePlan, folder: Path) -> None:
    """Have the loaders' own reader open every shard; raises VerificationError where it sees other tensors."""
    from safetensors import SafetensorError, safe_open

    for shard in plan.shards:
        try:
            with safe_open(folder / shard.name, framework="numpy") as opened:
                sound = set(opened.keys()) == {tensor.name for tensor in shard.tensors}
        except SafetensorError:
            sound = False
        if not sound:
            raise VerificationError(
                Problem(str(folder / shard.name), "is not what was planned, says safetensors", "please report this")
            )
