"""Verify a merge: every file against its digest, and every bit against the sources.

Without the sources a digest shows that a file changed; with them the tensor that changed is named.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType

from slrmerge._version import __version__
from slrmerge.checkpoint.files import LocalFile
from slrmerge.checkpoint.gguf_header import read_gguf
from slrmerge.checkpoint.location import Source, parse_source
from slrmerge.checkpoint.opening import open_pair
from slrmerge.checkpoint.pair import Side
from slrmerge.checkpoint.side_files import LOADED_SUFFIXES, MANIFEST_NAME, RECIPE_NAME
from slrmerge.errors import CheckpointError, HubError, PlanError, Problem, VerificationError, raise_all, require_type
from slrmerge.io.files import as_path, open_no_wait
from slrmerge.io.options import checks_types
from slrmerge.io.pieces import FileDigest, combine, digest_piece, pieces, translate_os_errors
from slrmerge.io.progress import Progress
from slrmerge.io.threads import ThreadPool, available_cores, thread_count
from slrmerge.merging.blend import one_core_per_chunk
from slrmerge.merging.manifest import Manifest, read_manifest
from slrmerge.merging.plan.model import MergePlan, PlannedShard
from slrmerge.merging.plan.planner import plan_merge
from slrmerge.merging.stream import HybridReader, ShardStream, file_chunks
from slrmerge.recipe.load import load_recipe


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What was verified: `files` against their digests and, where `against_sources`, every tensor against its sources.

    `sources` says so in words, or why the sources were not compared.
    """

    folder: Path
    files: int
    checked_bytes: int
    against_sources: bool
    sources: str

    def __repr__(self) -> str:
        return f"<VerifyResult {self.folder}: {self.files} files intact; sources: {self.sources}>"


@dataclass(frozen=True, slots=True)
class _NotComparable:
    """Why the sources cannot be compared."""

    reason: str


@checks_types
def verify(
    folder: str | os.PathLike[str],
    *,
    pretrained: str | os.PathLike[str] | None = None,
    posttrained: str | os.PathLike[str] | None = None,
    full: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Verify every file in `folder` against the manifest, and bit by bit against the sources where they are available.

    Sources are where the recipe in `folder` says, or at `pretrained` and `posttrained`. Those on the Hub are available
    where its cache has them; with `full` they are downloaded and compared with the Hub's own digests. Raises
    VerificationError with every file that was altered, is missing, or was added.
    """
    folder, progress = as_path("folder", folder), progress or Progress()
    overrides: dict[Side, str | os.PathLike[str] | None] = {"pretrained": pretrained, "posttrained": posttrained}
    for side, named in overrides.items():
        require_type(side, named, (str, os.PathLike, NoneType), "pass a folder or a repository's name")
    threads = thread_count(threads, available_cores())
    manifest = read_manifest(folder)
    with translate_os_errors(folder):  # such as that of a file that is removed meanwhile
        return _verify(folder, manifest, overrides, full=full, threads=threads, progress=progress)


def _verify(
    folder: Path,
    manifest: Manifest,
    overrides: Mapping[Side, str | os.PathLike[str] | None],
    *,
    full: bool,
    threads: int,
    progress: Progress,
) -> VerifyResult:
    expected = {name: FileDigest(entry.bytes, entry.digest) for name, entry in manifest.files.items()}
    present = [name for name in expected if (folder / name).is_file()]
    altered = _altered_files(folder, expected, present, threads, progress)
    sources: MergePlan | _NotComparable = _NotComparable("the recipe in the folder was altered")
    if RECIPE_NAME in present and RECIPE_NAME not in altered:
        sources = _plan_again(folder, manifest, overrides, local_files_only=not full)
    if full:
        sources = _with_checked_sources(folder, sources, progress)
    copies: list[str] = []
    if isinstance(sources, MergePlan):
        places = dict(_altered_side_files(sources, folder, present)) if full else {}
        places |= _differing_shards(sources, folder, present, threads, progress)
    else:
        copies = [name for name in present if manifest.files[name].sha256 and name not in altered]
        places = dict(_differing_copies(folder, manifest, copies, progress))
    missing = (name for name in expected if name not in present)
    problems = [
        *(Problem("file-missing", str(folder / name), "is missing", "merge again") for name in missing),
        *(
            Problem("file-added", str(folder / name), "was added after the merge", "move it away")
            for name in _added_files(folder, expected)
        ),
        *_alterations(folder, altered, places),
    ]
    raise_all(problems or _unreadable(folder, manifest), VerificationError)
    checked_bytes = sum(file.file_bytes for file in expected.values())
    described = _describe_sources(sources, copies)
    return VerifyResult(folder, len(expected) + 1, checked_bytes, isinstance(sources, MergePlan), described)


def _describe_sources(sources: MergePlan | _NotComparable, copies: list[str]) -> str:
    if isinstance(sources, _NotComparable):
        matching = f"; {len(copies)} unchanged shards match the Hub's digests" if copies else ""
        return f"not compared: {sources.reason}{matching}"
    checked = sum(len(checkpoint.verified) for _, checkpoint in sources.pair.items())
    return "the weights are equal bit by bit" + (f"; {checked} source files match the Hub's digests" if checked else "")


def _unreadable(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """Shards that a reader of their format does not read as the manifest describes them."""
    names: dict[str, set[str]] = {}
    for name, origin in manifest.tensors.items():
        names.setdefault(origin["file"], set()).add(name)
    for file, expected in names.items():
        is_valid = False
        if file in manifest.files:
            is_valid = _tensor_names(folder / file) == expected
        if not is_valid:
            what = "is not read as it was written"
            yield Problem("unreadable-shard", str(folder / file), what, "please report this")


def _tensor_names(path: Path) -> set[str]:
    """The tensors of a shard, as the safetensors library reads them; none where it cannot be read."""
    if path.suffix == ".gguf":
        with suppress(CheckpointError):
            return set(read_gguf(LocalFile.at(path)).tensors)
        return set()
    from safetensors import SafetensorError, safe_open

    with suppress(SafetensorError), safe_open(path, framework="numpy") as opened:
        return set(opened.keys())
    return set()


def _added_files(folder: Path, expected: Mapping[str, FileDigest]) -> Iterator[str]:
    """Files that are not in the manifest and that a loader might read; hidden ones belong to other tools."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_loadable = path.suffix in LOADED_SUFFIXES and not name.startswith(".")
        if is_loadable and name not in expected and name != MANIFEST_NAME:
            yield name


def _alterations(folder: Path, altered: set[str], places: Mapping[str, str]) -> Iterator[Problem]:
    for name in sorted(altered | places.keys()):
        place = f" ({places[name]})" if name in places else ""
        if name in altered:
            what, remedy = f"was altered after it was written{place}", "merge again"
            yield Problem("file-altered", str(folder / name), what, remedy)
        else:
            what = f"is as it was written, but differs from what its sources give now{place}"
            yield Problem("sources-differ", str(folder / name), what, "the sources have changed: merge again")


def _plan_again(
    folder: Path, manifest: Manifest, overrides: Mapping[Side, str | os.PathLike[str] | None], *, local_files_only: bool
) -> MergePlan | _NotComparable:
    """Plan the merge in `folder` again. Sources that the caller named must be right; others may be unavailable."""
    recipe = load_recipe(folder / RECIPE_NAME, max_shard_size=manifest.max_shard_size)
    named = {side: parse_source(source) for side, source in overrides.items() if source is not None}
    places: dict[Side, Source] = {
        side: named.get(side) or recipe.source(side) for side in ("pretrained", "posttrained")
    }
    for place in places.values():
        if not named and isinstance(place, Path) and not os.path.exists(place):  # noqa: PTH110 (False where hidden)
            return _NotComparable(f"{place} does not exist")
    try:
        pair = open_pair(**places, local_files_only=local_files_only)
        for side, checkpoint in pair.items():
            if not manifest.sources[side].matches(checkpoint):
                return _NotComparable(f"{checkpoint} is not the checkpoint that was merged")
        plan = plan_merge(recipe, pair, allow_code=manifest.allow_code, output=manifest.output)
    except HubError as error:
        if named or not local_files_only:
            raise
        return _NotComparable(f"{error.problems[0].where} is on the Hub; pass full=True to download and compare it")
    except (CheckpointError, PlanError) as error:
        if named:
            raise
        return _NotComparable(f"{error.problems[0].where}: {error.problems[0].what}")
    if dict(plan.origins()) != manifest.tensors:
        return _NotComparable(f"slrmerge {__version__} plans this merge differently")
    return plan


def _with_checked_sources(folder: Path, plan: MergePlan | _NotComparable, progress: Progress) -> MergePlan:
    """The plan with the files that it reads downloaded and compared with the Hub's digests.

    Raises VerificationError where the sources cannot be compared.
    """
    if isinstance(plan, _NotComparable):
        what, remedy = f"the sources cannot be compared: {plan.reason}", "make both available as they were"
        raise VerificationError(Problem("sources-unavailable", str(folder), what, remedy))
    for _, checkpoint in plan.pair.items():
        checkpoint.require_digests()
    return replace(plan, pair=plan.pair.download(progress, plan.read_files(), recheck=True))


def _differing_copies(
    folder: Path, manifest: Manifest, names: list[str], progress: Progress
) -> Iterator[tuple[str, str]]:
    """Shards that should be the post-trained side's, byte for byte, and have not the SHA-256 that the Hub gave."""
    if names:
        progress.start("comparing with the Hub's digests", sum(manifest.files[name].bytes for name in names))
    for name in names:
        with open(folder / name, "rb", opener=open_no_wait) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != manifest.files[name].sha256:
                yield name, "the Hub has another SHA-256 for the post-trained shard"
        progress.advance(manifest.files[name].bytes)


def _altered_side_files(plan: MergePlan, folder: Path, present: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Copied files beside the weights that differ from their source."""
    for file in plan.files:
        if file.source is not None and file.name in present:
            with open(folder / file.name, "rb", buffering=0, opener=open_no_wait) as copy:
                is_equal = all(copy.read(len(chunk)) == chunk for chunk in file_chunks(file)) and not copy.read(1)
            if not is_equal:
                yield file.name, "the whole file was compared"


def _differing_shards(
    plan: MergePlan, folder: Path, present: Iterable[str], threads: int, progress: Progress
) -> dict[str, str]:
    """For every shard that differs from what the sources give, the first place that does."""
    shards = [shard for shard in plan.shards if shard.name in present]

    def first_difference(stream: ShardStream, begin: int, stop: int) -> str:
        start = begin
        with open(folder / stream.shard.name, "rb", buffering=0, opener=open_no_wait) as file:
            file.seek(start)
            for chunk in stream.chunks(start, stop):
                actual, wanted = file.read(len(chunk.data)), bytes(chunk.data)
                if actual != wanted:
                    return _place_in(stream.shard, start + _common_prefix(actual, wanted))
                start += len(wanted)
            progress.advance(stop - begin)
            return "bytes past its end" if stop == stream.shard.file_bytes and file.read(1) else ""

    found: dict[str, str] = {}
    one_core = one_core_per_chunk(progress) if plan.needs_arithmetic else nullcontext()
    with plan.pair.open() as readers, one_core, ThreadPool(threads) as pool:
        progress.start("comparing with the sources", sum(shard.file_bytes for shard in shards))
        reader = HybridReader(readers)
        streams = [ShardStream(plan, shard, reader) for shard in shards]
        jobs = [(stream, *piece) for stream in streams for piece in pieces(stream.shard.file_bytes)]
        for (stream, _, _), place in zip(jobs, pool.map(lambda job: first_difference(*job), jobs), strict=True):
            if place:
                found.setdefault(stream.shard.name, place)
    return found


def _altered_files(
    folder: Path, expected: Mapping[str, FileDigest], names: list[str], threads: int, progress: Progress
) -> set[str]:
    """The files whose size or digest is not the one in the manifest."""
    progress.start("checking digests", sum(expected[name].file_bytes for name in names))

    def digest(job: tuple[str, int, int]) -> bytes:
        name, start, stop = job
        found = digest_piece(folder / name, start, stop)
        progress.advance(stop - start)
        return found

    same_size = [name for name in names if (folder / name).stat().st_size == expected[name].file_bytes]
    jobs = [(name, *piece) for name in same_size for piece in pieces(expected[name].file_bytes)]
    digests: dict[str, list[bytes]] = {name: [] for name in same_size}
    with ThreadPool(threads) as pool:
        for (name, _, _), piece_digest in zip(jobs, pool.map(digest, jobs), strict=True):
            digests[name].append(piece_digest)
    intact = {name for name, found in digests.items() if combine(found) == expected[name].digest}
    return {*names} - intact


def _common_prefix(first: bytes, second: bytes) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _place_in(shard: PlannedShard, position: int) -> str:
    offset = position - shard.data_start
    if offset < 0:
        return "in its header"
    inside = (f"in {tensor.name}" for tensor, begin, end in shard.spans() if begin <= offset < end)
    return next(inside, "past its end" if position >= shard.file_bytes else "between its tensors")
