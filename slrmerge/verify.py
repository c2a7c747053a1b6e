"""Prove that a written checkpoint is what was meant: every bit against its digest, and against its sources.

Without the sources a file's digest says that it changed; with them the tensor that did is named.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import Any

import slrmerge
from slrmerge.blend import Blender, one_core_per_chunk
from slrmerge.checkpoint import CheckpointReader
from slrmerge.errors import CheckpointError, HubError, PlanError, Problem, VerificationError, raise_all
from slrmerge.hub import open_pair
from slrmerge.manifest import read_manifest, source_state
from slrmerge.merge import available_cores, with_whole_files
from slrmerge.plan import LOADED_SUFFIXES, MANIFEST_NAME, RECIPE_NAME, MergePlan, PlannedShard, plan_merge
from slrmerge.progress import Progress, Silent, one_at_a_time
from slrmerge.recipe import load_recipe
from slrmerge.repository import Source
from slrmerge.stream import ShardStream, Sources, file_chunks
from slrmerge.writer import Written, combine, digest_piece, pieces


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
    pretrained: Source | None = None,
    posttrained: Source | None = None,
    full: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check every file in `folder` against the manifest, and bit by bit against the sources where they are at hand.

    Sources are looked for where the recipe in `folder` says, or at `pretrained` and `posttrained`. Those on the Hub are
    at hand where its cache has them; with `full` they are fetched, and held against the Hub's own digests. Raises
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
        altered = {name for name, same in _same_digests(folder, expected, present, pool, advance) if not same}
    where_altered: dict[str, str] = {}
    plan, sources = None, "not compared: the recipe itself was altered"
    if RECIPE_NAME in present and RECIPE_NAME not in altered:
        plan, sources = _replan(folder, manifest, pretrained, posttrained, here_only=not full)
    if full:
        if plan is None:
            raise VerificationError(Problem(str(folder), sources, "see that both sources can be had as they were"))
        plan, checked = _with_checked_sources(plan, progress)
        sources += checked
        where_altered = dict(_other_files(plan, folder, present))
    if plan is not None:
        shards = [shard for shard in plan.shards if shard.name in present]
        progress.start("comparing with the sources", sum(shard.file_bytes for shard in shards))
        with CheckpointReader(plan.pretrained) as pre, CheckpointReader(plan.posttrained) as post:
            where_altered |= _compare(plan, shards, folder, Sources(pre, post), threads, progress)
    problems = [
        *(Problem(str(folder / name), "is missing", "merge again") for name in missing),
        *(
            Problem(str(folder / name), "was added after the merge", "move it away")
            for name in _strays(folder, expected)
        ),
        *_alterations(folder, altered, where_altered),
    ]
    problems = problems or list(_unreadable(folder, manifest["tensors"]))
    raise_all(problems, VerificationError)
    checked_bytes = sum(file.file_bytes for file in expected.values())
    return VerifyReport(folder, len(expected) + 1, checked_bytes, plan is not None, sources)


def _unreadable(folder: Path, tensors: Mapping[str, Any]) -> Iterator[Problem]:
    """Shards that the loaders' own reader, the safetensors library, does not see as the manifest has them."""
    from safetensors import SafetensorError, safe_open

    names: dict[str, set[str]] = {}
    for name, origin in tensors.items():
        names.setdefault(origin["file"], set()).add(name)
    for file, expected in names.items():
        try:
            with safe_open(folder / file, framework="numpy") as opened:
                sound = set(opened.keys()) == expected
        except SafetensorError:
            sound = False
        if not sound:
            yield Problem(str(folder / file), "is not what safetensors expects to read", "please report this")


def _strays(folder: Path, expected: Mapping[str, Written]) -> Iterator[str]:
    """What the manifest does not know and a loader might take; what tools keep in hidden places is theirs."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        loadable = path.suffix in LOADED_SUFFIXES and not name.startswith(".")
        if loadable and name not in expected and name != MANIFEST_NAME:
            yield name


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
    folder: Path,
    manifest: Mapping[str, Any],
    pretrained: Source | None,
    posttrained: Source | None,
    *,
    here_only: bool,
) -> tuple[MergePlan | None, str]:
    """The plan that made `folder`, worked out anew; or None and why the sources cannot be compared with."""
    recipe = load_recipe(folder / RECIPE_NAME)
    overridden = pretrained or posttrained
    sources = (pretrained or recipe.source("pretrained"), posttrained or recipe.source("posttrained"))
    absent = [source for source in sources if isinstance(source, Path) and not os.path.exists(source)]  # noqa: PTH110 (nor where it may not be seen)
    if absent and not overridden:
        return None, f"not compared: {absent[0]} is not at hand"
    try:
        sides = open_pair(*sources, here_only=here_only)
        changed = [
            str(checkpoint)
            for side, checkpoint in zip(("pretrained", "posttrained"), sides, strict=True)
            if {**manifest["sources"][side], **source_state(checkpoint)} != manifest["sources"][side]
        ]
        if not changed:
            plan = plan_merge(recipe, sides, allow_code=manifest["allow_code"])
            if plan.origins() != manifest["tensors"]:
                return None, f"not compared: slrmerge {slrmerge.__version__} plans this merge otherwise"
            return plan, "the weights are equal bit by bit"
    except HubError as error:
        if overridden or not here_only:
            raise
        return None, f"not compared: {error.problems[0].where} is on the Hub; --full fetches it and compares"
    except (CheckpointError, PlanError) as error:
        if overridden:
            raise
        changed = [str(source) for source in sources if str(source) in str(error)] or [str(sources[1])]
    return None, f"not compared: {changed[0]} is not the checkpoint that was merged"


def _with_checked_sources(plan: MergePlan, progress: Progress) -> tuple[MergePlan, str]:
    """The plan with the files that it reads of the Hub here, each what the Hub says of it; and that in words."""
    for side in plan.sides:
        if side.snapshot and not side.snapshot.files:
            what = "is here, but the Hub's digests are not, since HF_HUB_OFFLINE is set"
            raise HubError(Problem(str(side), what, "unset it"))
    plan = with_whole_files(plan, progress, recheck=True)
    checked = sum(len(side.checked) for side in plan.sides)
    return plan, f"; {checked} files of the sources are what the Hub says of them" if checked else ""


def _other_files(plan: MergePlan, folder: Path, present: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Copied files beside the weights that are not what their source has."""
    for file in plan.files:
        copied = file.source is not None and file.name in present
        if copied and b"".join(file_chunks(file)) != (folder / file.name).read_bytes():
            yield file.name, "compared as a whole"


def _compare(
    plan: MergePlan, shards: list[PlannedShard], folder: Path, sources: Sources, threads: int, progress: Progress
) -> dict[str, str]:
    """For every shard that is not what the sources give: the first place that differs."""

    advance = one_at_a_time(progress.advance)
    own = local()

    def first_difference(stream: ShardStream, begin: int, stop: int) -> str:
        start = begin
        own.blender = getattr(own, "blender", None) or Blender()
        with open(folder / stream.shard.name, "rb", buffering=0) as file:
            file.seek(start)
            for chunk in stream.chunks(start, stop, own.blender):
                actual, wanted = file.read(len(chunk)), bytes(chunk)
                if actual != wanted:
                    return _place(stream.shard, start + _common_prefix(actual, wanted))
                start += len(chunk)
            advance(stop - begin)
            return "bytes past its end" if stop == stream.shard.file_bytes and file.read(1) else ""

    with one_core_per_chunk() if plan.needs_arithmetic else nullcontext(), ThreadPoolExecutor(threads) as pool:
        streams = [ShardStream(plan, shard, sources) for shard in shards]
        jobs = [(stream, *piece) for stream in streams for piece in pieces(stream.shard.file_bytes)]
        places = pool.map(lambda job: first_difference(*job), jobs)
        found: dict[str, str] = {}
        for (stream, _, _), place in zip(jobs, places, strict=True):
            if place:
                found.setdefault(stream.shard.name, place)
    return found


def _same_digests(
    folder: Path, expected: Mapping[str, Written], names: list[str], pool: Executor, advance: Callable[[int], None]
) -> Iterator[tuple[str, bool]]:
    """For every file whether it is as long as it was and has the digest it had."""

    def digest(job: tuple[str, int, int]) -> bytes:
        name, start, stop = job
        found = digest_piece(folder / name, start, stop)
        advance(stop - start)
        return found

    jobs = [(name, *piece) for name in names for piece in pieces(expected[name].file_bytes)]
    found: dict[str, list[bytes]] = {name: [] for name in names}
    for (name, _, _), piece_digest in zip(jobs, pool.map(digest, jobs), strict=True):
        found[name].append(piece_digest)
    for name, digests in found.items():
        as_long = (folder / name).stat().st_size == expected[name].file_bytes
        yield name, as_long and combine(digests) == expected[name].digest


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
