"""Prove that a written checkpoint is what was meant: every bit against its digest, and against its sources.

Without the sources a file's digest says that it changed; with them the tensor that did is named.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slrmerge.blend import one_core_per_chunk
from slrmerge.checkpoint import CheckpointReader, open_pair
from slrmerge.errors import CheckpointError, PlanError, Problem, VerificationError, raise_all
from slrmerge.manifest import read_manifest, source_files
from slrmerge.merge import available_cores
from slrmerge.plan import RECIPE_NAME, MergePlan, PlannedShard, plan_merge
from slrmerge.progress import Progress, Silent, one_at_a_time
from slrmerge.recipe import load_recipe
from slrmerge.stream import Sources, shard_chunks
from slrmerge.writer import Written, digest_file


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was proven: `files` as their digests say, and, where `against_sources`, every tensor as its sources give it.

    `sources` says so in words, or why the sources were not compared with.
    """

    folder: Path
    files: int
    checked_bytes: int
    against_sources: bool
    sources: str


def verify_checkpoint(
    folder: Path,
    *,
    pretrained: Path | None = None,
    posttrained: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check every file in `folder` against the manifest, and bit by bit against the sources where they are at hand.

    Sources are looked for where the recipe in `folder` says, or at `pretrained` and `posttrained`. Raises
    VerificationError with every file and tensor that is not as it was written, is missing, or was added.
    """
    progress = progress or Silent()
    threads = threads or available_cores()
    manifest = read_manifest(folder)
    expected = {name: Written(entry["bytes"], entry["digest"]) for name, entry in manifest["files"].items()}
    missing = [name for name in expected if not (folder / name).is_file()]
    present = [name for name in expected if name not in missing]
    advance = one_at_a_time(progress.advance)
    progress.start("checking digests", sum(expected[name].file_bytes for name in present))
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda name: digest_file(folder / name, on_bytes=advance), present)
        altered = {name for name, written in zip(present, found, strict=True) if written != expected[name]}
    where_altered: dict[str, str] = {}
    plan, sources = None, "not compared: the recipe itself was altered"
    if RECIPE_NAME in present and RECIPE_NAME not in altered:
        plan, sources = _replan(folder, manifest, pretrained, posttrained)
    if plan is not None:
        shards = [shard for shard in plan.shards if shard.name in present]
        progress.start("comparing with the sources", sum(shard.file_bytes for shard in shards))
        with CheckpointReader(plan.pretrained) as pre, CheckpointReader(plan.posttrained) as post:
            where_altered = _compare(plan, shards, folder, Sources(pre, post), threads, progress)
    problems = [
        *(Problem(str(folder / name), "is missing", "merge again") for name in missing),
        *(
            Problem(str(folder / name), "was not written by slrmerge", "move it away")
            for name in _strays(folder, expected)
        ),
        *_alterations(folder, altered, where_altered),
    ]
    raise_all(problems, VerificationError)
    checked_bytes = sum(file.file_bytes for file in expected.values())
    return VerifyReport(folder, len(expected) + 1, checked_bytes, plan is not None, sources)


def _strays(folder: Path, expected: Mapping[str, Written]) -> Iterator[str]:
    """Weights and indices that the manifest does not know, which a loader might take instead."""
    for path in sorted(folder.iterdir()):
        loadable = path.name.endswith((".safetensors", ".index.json", ".bin"))
        if loadable and path.name not in expected:
            yield path.name


def _alterations(folder: Path, altered: set[str], where: Mapping[str, str]) -> Iterator[Problem]:
    for name in sorted(altered | where.keys()):
        place = f" ({where[name]})" if name in where else ""
        if name in altered:
            yield Problem(str(folder / name), f"was altered after it was written{place}", "merge again")
        else:
            yield Problem(
                str(folder / name),
                f"is as it was written, but not what its sources give now{place}",
                "the sources have changed since, or were changing then: merge again",
            )


def _replan(
    folder: Path, manifest: Mapping[str, Any], pretrained: Path | None, posttrained: Path | None
) -> tuple[MergePlan | None, str]:
    """The plan that made `folder`, worked out anew; or None and why the sources cannot be compared with."""
    overrides = {
        side: str(given.absolute())
        for side, given in (("pretrained", pretrained), ("posttrained", posttrained))
        if given
    }
    recipe = load_recipe(folder / RECIPE_NAME, **overrides)
    folders = recipe.source_folders()
    absent = [source for source in folders if not source.exists()]
    if absent and not overrides:
        return None, f"not compared: {absent[0]} is not at hand"
    try:
        sides = open_pair(*folders)
        changed = [
            checkpoint.folder
            for side, checkpoint in zip(("pretrained", "posttrained"), sides, strict=True)
            if source_files(checkpoint) != manifest["sources"][side]["files"]
        ]
        if not changed:
            return plan_merge(recipe, sides, allow_code=manifest["allow_code"]), "equal bit by bit"
    except (CheckpointError, PlanError) as error:
        if overrides:
            raise
        changed = [source for source in folders if str(source) in str(error)] or [folders[1]]
    return None, f"not compared: {changed[0]} is not the checkpoint that was merged"


def _compare(
    plan: MergePlan, shards: list[PlannedShard], folder: Path, sources: Sources, threads: int, progress: Progress
) -> dict[str, str]:
    """For every shard that is not what the sources give: the first place that differs."""

    advance = one_at_a_time(progress.advance)

    def first_difference(shard: PlannedShard) -> str:
        position = 0
        with open(folder / shard.name, "rb", buffering=0) as file:
            for chunk in shard_chunks(plan, shard, sources):
                actual = file.read(len(chunk))
                if actual != bytes(chunk):
                    return _place(shard, position + _common_prefix(actual, bytes(chunk)))
                position += len(chunk)
                advance(len(chunk))
            return "bytes past its end" if file.read(1) else ""

    with one_core_per_chunk() if plan.needs_arithmetic else nullcontext(), ThreadPoolExecutor(threads) as pool:
        places = dict(zip((shard.name for shard in shards), pool.map(first_difference, shards), strict=True))
    return {name: place for name, place in places.items() if place}


def _common_prefix(first: bytes, second: bytes) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _place(shard: PlannedShard, position: int) -> str:
    offset = position - len(shard.header)
    if offset < 0:
        return "in its header"
    for tensor in shard.tensors:
        if offset < tensor.info.data_offsets[1]:
            return f"in {tensor.name}"
    return "past its end"
