"""Opening checkpoints and pairs: a folder, a GGUF file, a repository on the Hub, an adapter on its base."""

import os
from contextlib import suppress
from functools import partial
from pathlib import Path

from slrmerge.checkpoint.adapter import AdapterCheckpoint, put_on_base
from slrmerge.checkpoint.adapter_config import NAME_BASE, AdapterFolder, is_adapter, read_adapter_folder
from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.gguf import open_gguf
from slrmerge.checkpoint.location import AdapterOnBase, Place, Repository, parse_source, snapshot_of
from slrmerge.checkpoint.pair import ModelPair
from slrmerge.checkpoint.safetensors import open_folder
from slrmerge.errors import CheckpointError, HubError, Problem, open_all, require_type
from slrmerge.io.options import checks_types

CheckpointLike = str | os.PathLike[str] | Repository | AdapterOnBase | Checkpoint
"""What names a checkpoint: a folder or GGUF file, `organisation/name@revision`, `base+adapter`, an open checkpoint."""


@checks_types
def open_checkpoint(source: CheckpointLike, *, local_files_only: bool = False) -> Checkpoint:
    """Open a checkpoint in a folder, a GGUF file, or a repository on the Hub as `organisation/name@revision`.

    Reads the config, the index and every header; weights stay where they are. A LoRA adapter is opened on the base that
    its config names, or on another as `base+adapter`. With `local_files_only`, or where HF_HUB_OFFLINE is set, a
    repository is opened from the Hub's cache. Raises CheckpointError, HubError and OptionError.
    """
    found = _find(source, local_files_only=local_files_only)
    return _on_base(found, None, local_files_only=local_files_only) if isinstance(found, AdapterFolder) else found


@checks_types
def open_pair(
    pretrained: CheckpointLike | None, posttrained: CheckpointLike, *, local_files_only: bool = False
) -> ModelPair:
    """Open both checkpoints of a pair; see `open_checkpoint`. Raises the problems of both together.

    With None the pre-trained side is the base of `posttrained`, which is then an adapter.
    """
    find = partial(_find, local_files_only=local_files_only)
    sources = (posttrained,) if pretrained is None else (pretrained, posttrained)
    *below, post = open_all(find, sources, *_REFUSALS)
    pre = below[0] if below else None
    if isinstance(pre, AdapterFolder) or (pre and pre.computed):
        what, remedy = "is an adapter", "name its base as the pre-trained side, and the adapter as the post-trained one"
        raise CheckpointError(Problem("adapter-pretrained", str(pre), what, remedy))
    if isinstance(post, AdapterFolder):
        post = _on_base(post, pre, local_files_only=local_files_only)
    if pre is None:
        if not isinstance(post, AdapterCheckpoint):
            what, remedy = "is not an adapter, so its base is unknown", "name the pre-trained side too"
            raise CheckpointError(Problem("no-pretrained", str(post), what, remedy))
        pre = post.base
    if pre.format != post.format:
        gguf, other = (pre, post) if pre.format == "gguf" else (post, pre)
        what, remedy = f"is in GGUF, {other} is not", "convert that one in the same way, or name both originals"
        raise CheckpointError(Problem("different-formats", str(gguf), what, remedy))
    if pre.reference == post.reference or pre.identity == post.identity:
        what = f"has the same weights as the pre-trained side, {pre}"
        raise CheckpointError(
            Problem("same-checkpoint", str(post), what, "name the checkpoint that it was trained from")
        )
    return ModelPair(pre, post)


_REFUSALS = (CheckpointError, HubError)


def _find(source: CheckpointLike, *, local_files_only: bool) -> Checkpoint | AdapterFolder:
    """A checkpoint, open; or an adapter whose base is not open yet."""
    if isinstance(source, Checkpoint):
        return source
    kinds = (str, os.PathLike, Repository, AdapterOnBase)
    require_type("checkpoint", source, kinds, "pass a folder, a repository's name, or an open checkpoint")
    where = parse_source(source) if isinstance(source, str | os.PathLike) else source
    if isinstance(where, AdapterOnBase):
        find = partial(_find, local_files_only=local_files_only)
        base, adapter = open_all(find, (where.base, where.adapter), *_REFUSALS)
        if not isinstance(adapter, AdapterFolder) or isinstance(base, AdapterFolder):
            wrong, kind = (adapter, "not an adapter") if isinstance(base, Checkpoint) else (base, "an adapter")
            remedy = "write BASE+ADAPTER, a whole model and a LoRA adapter on it"
            raise CheckpointError(Problem("not-an-adapter", str(wrong), f"is {kind}", remedy))
        return put_on_base(adapter, base)
    if isinstance(where, Path):
        with suppress(OSError, ValueError):  # `open_folder` reports it
            where = snapshot_of(where)
        if _is_adapter_folder(where):
            return read_adapter_folder(where)
        gguf = open_gguf(where)
        return open_folder(where) if gguf is None else gguf
    from slrmerge.checkpoint.hub.repository import open_cached, open_repository

    return open_cached(where) if local_files_only else open_repository(where)


def _is_adapter_folder(folder: Path) -> bool:
    try:
        return is_adapter({path.name for path in folder.iterdir()})
    except (OSError, ValueError):
        return False  # `open_folder` reports it; a ValueError: a name that no folder can have


def _on_base(adapter: AdapterFolder, pretrained: Checkpoint | None, *, local_files_only: bool) -> AdapterCheckpoint:
    """An adapter on the base that its config names; that may be the pre-trained side."""
    named = adapter.config.base_model_name_or_path
    if not named:
        if pretrained is None:
            what = "does not name its base (base_model_name_or_path)"
            raise CheckpointError(Problem("adapter-base", str(adapter), what, NAME_BASE))
        return put_on_base(adapter, pretrained, f"the adapter does not name its base; {pretrained} is used")
    place = _base_place(adapter, named)
    if pretrained is not None and _is_named(pretrained, place):
        return put_on_base(adapter, pretrained)
    if pretrained is not None and _is_copy(pretrained, place, named):
        note = f"the adapter's base is {named}; {pretrained}, which has the same name, is used instead"
        return put_on_base(adapter, pretrained, note)
    try:
        base = _find(place, local_files_only=local_files_only)
    except (CheckpointError, HubError) as error:
        unopened = Problem("adapter-base", str(adapter), f"its base {named} cannot be opened", NAME_BASE)
        raise type(error)(unopened, *error.problems) from error
    if isinstance(base, AdapterFolder):
        what = f"is an adapter on {base}, which is an adapter too"
        raise CheckpointError(Problem("unsupported-adapter", str(adapter), what, "merge that one into its base first"))
    if pretrained is None or base.identity == pretrained.identity:
        return put_on_base(adapter, pretrained or base)
    note = f"the adapter's base is {base}, which is not the pre-trained side, {pretrained}"
    return put_on_base(adapter, base, note)


def _base_place(adapter: AdapterFolder, named: str) -> Place:
    """Where an adapter's base is: a folder from here, from the adapter's folder or beside it; or a repository."""
    for folder in (Path(), adapter.folder, adapter.folder.parent):
        if os.path.isdir(folder / named):  # noqa: PTH112 (False for a name that is too long)
            return folder / named
    found = Repository.parse(named)
    return Repository(found.name, found.revision or adapter.config.revision) if found else Path(named)


def _is_named(checkpoint: Checkpoint, place: Place) -> bool:
    """Whether a place is where a checkpoint is."""
    if isinstance(place, Path):
        return os.path.realpath(place) == os.path.realpath(checkpoint.folder)
    name, _, commit = checkpoint.reference.rpartition("@")
    return (name or checkpoint.model_name) == place.name and place.revision in (None, "main", commit)


def _is_copy(checkpoint: Checkpoint, place: Place, named: str) -> bool:
    """Whether a folder on this disk has the name of a base that is elsewhere."""
    is_elsewhere = not isinstance(place, Path) or not os.path.exists(place)  # noqa: PTH110 (False where hidden)
    name, own = (text.rstrip("/").rpartition("/")[2].casefold() for text in (named, checkpoint.model_name))
    return is_elsewhere and os.path.isabs(checkpoint.reference) and name == own  # noqa: PTH117 (a repository is not)
