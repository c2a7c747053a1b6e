"""Execute a plan: stream every shard into a staging folder, then put that in place. All decisions are the plan's.

Killed at any moment, the target is absent or as it was; the next run resumes from the finished pieces.
"""

import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any
from unicodedata import normalize

from slrmerge.checkpoint.layers import group_names
from slrmerge.checkpoint.pair import ModelPair
from slrmerge.checkpoint.side_files import (
    ADAPTER_CONFIG_NAME,
    CARD_NAME,
    CHAT_TEMPLATE_FOLDERS,
    CONFIG_NAME,
    MANIFEST_NAME,
    is_common_file,
    module_folders,
)
from slrmerge.errors import (
    CheckpointError,
    OptionError,
    OutputError,
    Problem,
    VerificationError,
    raise_all,
    require_type,
)
from slrmerge.io import files
from slrmerge.io.options import checks_types, make_options, takes_options
from slrmerge.io.output_folder import OutputFolder
from slrmerge.io.pieces import FileDigest, combine, write_file
from slrmerge.io.progress import Progress
from slrmerge.io.sizes import format_bytes
from slrmerge.io.strict_yaml import write_yaml
from slrmerge.io.threads import available_cores
from slrmerge.merging.card import model_card
from slrmerge.merging.journal import Journal, pieces_of
from slrmerge.merging.manifest import build_manifest, read_manifest
from slrmerge.merging.options import MergeOptions
from slrmerge.merging.plan.model import MergePlan
from slrmerge.merging.plan.planner import plan
from slrmerge.merging.shard_writer import missing_pieces, needed_bytes, write_shards
from slrmerge.merging.stream import HybridReader, file_chunks
from slrmerge.recipe.load import RecipeLike

_REMOTE_THREADS = 8
"""Pieces written at a time when their bytes come from the Hub, where most of the time is spent waiting."""


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A finished merge: its folder, its files with their digests, and the number of pieces from an earlier run."""

    folder: Path
    files: dict[str, FileDigest]
    notes: tuple[str, ...]
    resumed_pieces: int
    elapsed_s: float

    @property
    def output_bytes(self) -> int:
        return sum(file.file_bytes for file in self.files.values())

    def __repr__(self) -> str:
        return f"<MergeResult {self.folder}: {format_bytes(self.output_bytes)} in {self.elapsed_s:.1f} s>"


@checks_types
@takes_options(MergeOptions)
def merge(
    recipe: RecipeLike,
    out: str | os.PathLike[str],
    *,
    pair: ModelPair | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> MergeResult:
    """Merge two checkpoints by `recipe` into the folder `out`, which appears complete or not at all.

    `recipe` is a Recipe, a path, a dict, or what a search selected; `pair` are its two checkpoints where they are open
    already. The options are those of `MergeOptions`. Raises RecipeError, CheckpointError, PlanError and OutputError
    before the first byte is written; NoSpaceError, SourceChangedError, BlendError and HubError while it is.
    """
    chosen = make_options(MergeOptions, options)
    if isinstance(recipe, MergePlan):
        raise OptionError(Problem("wrong-type", "recipe", "MergePlan is not a recipe", "pass it to slrmerge.execute"))
    planned = plan(recipe, pair, allow_code=chosen.allow_code, output=chosen.output)
    return execute(planned, out, options=chosen, progress=progress)


@checks_types
def execute(
    plan: MergePlan,
    out: str | os.PathLike[str],
    *,
    options: MergeOptions | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Write what `plan` says to the folder `out`; see `merge`. `name` is how the model card says to load the model."""
    started = time.monotonic()
    require_type("plan", plan, MergePlan, "pass what slrmerge.plan returns, or merge by the recipe")
    require_type("options", options, (MergeOptions, NoneType), "pass MergeOptions, or merge with options as keywords")
    options, progress = options or MergeOptions(), progress or Progress()
    output = output_folder(plan, out, options)
    output.check()
    with output.locked(progress):
        if options.download == "full":
            output.require_space(plan.changed_bytes)  # where everything else can be cloned
            plan = replace(plan, pair=plan.pair.download(progress, plan.read_files()))
        written, resumed, notes = _write(plan, output, options, name=name or output.path.name, progress=progress)
    return MergeResult(output.path, written, (*notes, *plan.notes), resumed, time.monotonic() - started)


def output_folder(plan: MergePlan, out: str | os.PathLike[str], options: MergeOptions) -> OutputFolder:
    """The folder that a merge by `plan` writes."""
    return OutputFolder(
        out,
        sources=[place for _, checkpoint in plan.pair.items() for place in checkpoint.locations],
        overwrite=options.overwrite,
        why_not_replaceable=why_not_a_checkpoint,
        durable=options.fsync,
    )


def require_space(plan: MergePlan, output: OutputFolder) -> None:
    """Raise NoSpaceError where a merge by `plan` would, without writing anything."""
    place = next(folder for folder in output.path.parents if folder.exists())
    with plan.pair.open() as readers:
        needed = needed_bytes(missing_pieces(plan, HybridReader(readers), place))
    output.require_space(needed + plan.side_bytes)


def why_not_a_checkpoint(folder: Path) -> str | None:
    """Why a folder is not exactly one model: nothing else is replaced by a merge.

    A merge may contain what its manifest names, any other checkpoint what checkpoints commonly do.
    """
    has_config = (folder / CONFIG_NAME).exists() or (folder / ADAPTER_CONFIG_NAME).exists()
    is_checkpoint = has_config and any(folder.glob("*.safetensors"))
    if not is_checkpoint and not any(folder.glob("*.gguf")):
        return "is not a checkpoint"
    try:
        written = {*read_manifest(folder).files, MANIFEST_NAME}
    except VerificationError:
        written = {MANIFEST_NAME}
    try:
        modules = module_folders(folder)
    except CheckpointError:
        modules = ()
    others = sorted(
        name
        for name in _entries(folder, modules)
        if not (name in written or is_common_file(name) or name.startswith(tuple(f"{each}/" for each in modules)))
    )
    shown = ", ".join(others[:5]) + (", …" if len(others) > 5 else "")
    return f"contains more than a checkpoint ({shown})" if others else None


def _entries(folder: Path, modules: Collection[str]) -> Iterator[str]:
    """What a folder contains: its files, those in the folders that a checkpoint has, and other folders as `name/`."""
    for path in folder.iterdir():
        if not path.is_dir() or path.is_symlink():
            yield path.name
        elif path.name in (*CHAT_TEMPLATE_FOLDERS, ".cache"):
            yield from (f"{path.name}/{inner.name}" for inner in path.iterdir())
        elif path.name in modules:
            yield from (inner.relative_to(folder).as_posix() for inner in path.rglob("*") if not inner.is_dir())
        else:
            yield f"{path.name}/"


def default_threads(pair: ModelPair) -> int:
    """One thread per core, more where checkpoints are read from the Hub."""
    return _REMOTE_THREADS if pair.is_remote else available_cores()


def _write(
    plan: MergePlan, output: OutputFolder, options: MergeOptions, *, name: str, progress: Progress
) -> tuple[dict[str, FileDigest], int, list[str]]:
    """Fill the staging folder and publish it; returns its files, how many pieces were there already, and notes."""
    with plan.pair.open() as readers:
        reader = HybridReader(readers)
        _check_bools(plan, reader)
        output.create_staging()
        journal = Journal.open(output.staging, plan.fingerprint(), durable=output.durable)
        total = sum(1 for shard in plan.shards for _ in pieces_of(shard))
        with output.staged(lambda error: journal.what_is_kept(error, total)):
            _require_distinct_names(plan, output.staging)
            resumed = journal.resume(plan.shards, progress)
            missing = missing_pieces(plan, reader, output.staging, journal.finished)
            output.require_space(needed_bytes(missing, journal.allocated_bytes) + plan.side_bytes)
            written = dict(_write_side_files(plan, output, name=name))
            if options.ray:
                from slrmerge.merging.cluster import write_shards_on_cluster

                write_shards_on_cluster(missing, plan, journal, options.ray, options.threads, progress)
            else:
                threads = options.threads or default_threads(plan.pair)
                write_shards(missing, plan, reader, journal, threads, progress)
            written |= {
                shard.name: FileDigest(
                    shard.file_bytes, combine(journal.finished[piece] for piece, _, _ in pieces_of(shard))
                )
                for shard in plan.shards
            }
            manifest = build_manifest(plan, written)
            written[MANIFEST_NAME] = write_file(output.staging / MANIFEST_NAME, manifest, durable=output.durable)
            output.check_target()
            with journal.removed(lambda: output.published):
                output.publish(progress)
    return written, resumed, list(_nan_notes(journal.nan_names))


def _require_distinct_names(plan: MergePlan, staging: Path) -> None:
    """Raise OutputError where two files of the merge would be one, as on disks that ignore case."""
    if not staging.with_name(staging.name.swapcase()).exists():
        return
    copied, shards = (file.name for file in plan.files), (shard.name for shard in plan.shards)
    seen: dict[str, str] = {}
    for name in (*copied, *shards, *plan.recipe.written_as, CARD_NAME, MANIFEST_NAME):
        other = seen.setdefault(normalize("NFC", name).casefold(), name)
        if other != name:
            what, remedy = f"{other} and {name} would be one file there", "choose an output folder on another disk"
            raise OutputError(Problem("names-collide", str(staging.parent), what, remedy))


def _nan_notes(names: Collection[str]) -> Iterator[str]:
    if names:
        shown = "; ".join(group_names(sorted(names)))
        yield (
            "NaN in blended tensors, from a NaN in one side or from inf − inf; the model will not work. Look for the "
            f"damaged source with `slrmerge diff`, or restore or keep these tensors whole: {shown}"
        )


def _write_side_files(plan: MergePlan, output: OutputFolder, *, name: str) -> Iterator[tuple[str, FileDigest]]:
    """Write everything beside the weights except the manifest."""
    recipe = write_yaml(plan.recipe.as_run(plan.pair, output.path)).encode()
    contents = dict.fromkeys(plan.recipe.written_as, recipe)
    contents[CARD_NAME] = model_card(plan, recipe, name=name)
    folders = {output.staging}
    for file in plan.files:
        path = output.staging / file.name
        files.create_folder(path.parent, durable=output.durable)
        folders.add(path.parent)
        yield file.name, write_file(path, file_chunks(file), durable=output.durable)
    for file_name, content in contents.items():
        yield file_name, write_file(output.staging / file_name, [content], durable=output.durable)
    for folder in folders if output.durable else ():
        files.sync_folder(folder)


def _check_bools(plan: MergePlan, reader: HybridReader) -> None:
    """Raise CheckpointError where a BOOL tensor has bytes other than 0 and 1, which no header reveals."""
    problems: list[Problem] = []
    for tensor in plan.tensors():
        if tensor.info.dtype == "BOOL":
            ((side, _),) = tensor.sources
            data = bytearray(tensor.info.nbytes)
            reader.read_into(tensor, 0, memoryview(data))
            if max(data, default=0) > 1:
                what = f"{tensor.name} is BOOL and has bytes other than 0 and 1"
                problems.append(Problem("invalid-bool", str(plan.pair[side].folder), what))
    raise_all(problems, CheckpointError)
