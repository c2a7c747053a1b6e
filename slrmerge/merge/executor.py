"""Carry out a plan: stream every shard into a sibling folder, then swap that in. It takes no decision of its own.

Killed at any moment, the target is absent or as it was; the next run takes up from the pieces that were finished.
"""

import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from slrmerge import files
from slrmerge.card import model_card, recipe_as_run
from slrmerge.checkpoint import Checkpoint, CheckpointReader
from slrmerge.errors import CheckpointError, OutputError, Problem, raise_all
from slrmerge.hub import open_pair
from slrmerge.manifest import build_manifest
from slrmerge.merge.journal import Journal, keep_finished, pieces_of
from slrmerge.merge.shards import write_shards
from slrmerge.merge.target import require_space, resolve_target, target_problems
from slrmerge.plan import CARD_NAME, MANIFEST_NAME, RECIPE_NAME, MergePlan, plan_merge
from slrmerge.progress import Progress, Silent
from slrmerge.recipe import Recipe
from slrmerge.stream import Sources, file_chunks
from slrmerge.writer import Written, combine, os_errors_at, write_content

Download = Literal["ranges", "full"]
"""What to fetch of a repository: the ranges that are needed, or the files that they are in."""

_RANGES_AT_A_TIME = 8
"""Pieces that are made at a time when their bytes come from the Hub, where waiting is most of the work."""


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A finished merge: the folder, its files with their digests, and how many pieces an earlier run had finished."""

    folder: Path
    files: dict[str, Written]
    output_bytes: int
    resumed_pieces: int
    elapsed_s: float


def merge_checkpoints(
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool = False,
    allow_code: bool = False,
    download: Download = "ranges",
    threads: int | None = None,
    fsync: bool = True,
    name: str | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge the recipe's two checkpoints into the folder `out`, which appears complete or not at all.

    `overwrite` lets the result take the place of an older checkpoint. Of repositories on the Hub the needed ranges are
    streamed, or with `download` "full" the needed files fetched into the Hub's cache before. `threads` defaults to the
    cores at hand, or to more where bytes come from the Hub; without `fsync` a power cut may lose the result. `name` is
    where the model card says that the model is. Raises SlrmergeError: RecipeError, CheckpointError, PlanError and
    OutputError before the first byte is written, NoSpaceError, SourceChangedError, BlendError and HubError while it is.
    """
    plan = plan_merge(recipe, open_pair(*recipe.sources()), allow_code=allow_code)
    return execute(
        plan, out, overwrite=overwrite, download=download, threads=threads, fsync=fsync, name=name, progress=progress
    )


def execute(
    plan: MergePlan,
    out: Path,
    *,
    overwrite: bool = False,
    download: Download = "ranges",
    threads: int | None = None,
    fsync: bool = True,
    name: str | None = None,
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
            if download == "full":
                require_space(plan, target)
                plan = with_whole_files(plan, progress)
            threads = threads or default_threads(*plan.sides)
            written, resumed = _make(plan, target, threads, fsync=fsync, name=name or target.name, progress=progress)
    output_bytes = sum(file.file_bytes for file in written.values())
    return MergeResult(target, written, output_bytes, resumed, time.monotonic() - started)


def with_whole_files(plan: MergePlan, progress: Progress, *, recheck: bool = False) -> MergePlan:
    """The same plan, with the files that it reads from the Hub fetched into the Hub's cache; with `recheck` those that
    were there are held against the Hub's digests too. Raises HubError.
    """
    if not any(side.snapshot for side in plan.sides):
        return plan
    from slrmerge.hub.snapshots import fetch_shards

    sides = list(zip(plan.sides, plan.read_files(), strict=True))
    pretrained, posttrained = fetch_shards(sides, progress, recheck=recheck)
    return replace(plan, pretrained=pretrained, posttrained=posttrained)


def _make(
    plan: MergePlan, target: Path, threads: int, *, fsync: bool, name: str, progress: Progress
) -> tuple[dict[str, Written], int]:
    """Fill the staging folder and give it the target's name; what it holds, and how many pieces were there already."""
    with CheckpointReader(plan.pretrained) as pre, CheckpointReader(plan.posttrained) as post:
        sources = Sources(pre, post)
        require_sound_bools(plan, sources)
        journal = Journal.open(files.staging_folder(target), plan.fingerprint(), fsync=fsync)
        with keep_finished(journal, sum(1 for shard in plan.shards for _ in pieces_of(shard))):
            resumed = journal.resume(plan.shards, progress)
            require_space(plan, target, held_bytes=journal.held_bytes(plan.shards))
            written = _write_files(plan, journal, target, fsync=fsync, name=name)
            write_shards(plan, sources, journal, threads, fsync=fsync, progress=progress)
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


def default_threads(*sides: Checkpoint) -> int:
    """How many to read `sides` with: a core each, more where they wait for the Hub."""
    return _RANGES_AT_A_TIME if any(side.is_remote for side in sides) else available_cores()


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


def _write_files(plan: MergePlan, journal: Journal, target: Path, *, fsync: bool, name: str) -> dict[str, Written]:
    """Write everything beside the weights, the manifest excepted."""
    recipe = recipe_as_run(plan, seen_from=target)
    made = {RECIPE_NAME: recipe, CARD_NAME: model_card(plan, recipe, name=name)}
    contents = {file.name: b"".join(file_chunks(file)) for file in plan.files} | made
    written: dict[str, Written] = {}
    for file, content in contents.items():
        path = journal.folder / file
        files.create_folder(path.parent, fsync=fsync)
        written[file] = write_content(path, content, fsync=fsync)
    if fsync:
        for folder in {(journal.folder / file).parent for file in written}:
            files.sync_folder(folder)
    return written


def _write_manifest(
    plan: MergePlan, journal: Journal, written: dict[str, Written], *, fsync: bool
) -> dict[str, Written]:
    """Write the manifest of what was `written` and of the shards; returns all that the finished folder holds."""
    written = written | {
        shard.name: Written(shard.file_bytes, combine(journal.finished[piece] for piece, _, _ in pieces_of(shard)))
        for shard in plan.shards
    }
    manifest = build_manifest(plan, written)
    return written | {MANIFEST_NAME: write_content(journal.folder / MANIFEST_NAME, manifest, fsync=fsync)}
