"""Opening checkpoints, and the pair of checkpoints that everything here is about."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from slrmerge.checkpoint.adapter import AdapterCheckpoint, put_on_base
from slrmerge.checkpoint.adapter_config import NAME_BASE, AdapterFolder, is_adapter, read_adapter_folder
from slrmerge.checkpoint.base import Checkpoint, TensorReader
from slrmerge.checkpoint.correspondence import Correspondence, correspond
from slrmerge.checkpoint.gguf import open_gguf
from slrmerge.checkpoint.layers import LayerStack
from slrmerge.checkpoint.location import AdapterOnBase, Place, Repository, parse_source, snapshot_of
from slrmerge.checkpoint.safetensors import open_folder
from slrmerge.checkpoint.vocabulary import SharedVocabulary, compare_vocabularies
from slrmerge.errors import CheckpointError, HubError, PlanError, Problem, open_all, require_type
from slrmerge.io.options import checks_types
from slrmerge.io.progress import Progress

Side = Literal["pretrained", "posttrained"]


@dataclass(frozen=True, repr=False)
class ModelPair:
    """A pre-trained checkpoint and a post-trained one that was trained from it."""

    pretrained: Checkpoint
    posttrained: Checkpoint

    def __post_init__(self) -> None:
        for side, checkpoint in self.items():
            require_type(side, checkpoint, Checkpoint, "pass what slrmerge.open_checkpoint returns")

    def __getitem__(self, side: Side) -> Checkpoint:
        return self.pretrained if side == "pretrained" else self.posttrained

    def items(self) -> Iterator[tuple[Side, Checkpoint]]:
        """Both sides with their names, the pre-trained first."""
        yield "pretrained", self.pretrained
        yield "posttrained", self.posttrained

    @property
    def stack(self) -> LayerStack | None:
        """The decoder layers of the post-trained side, whose names and shapes a merge keeps."""
        return self.posttrained.stack

    @cached_property
    def correspondence(self) -> Correspondence:
        """Which pre-trained tensor each post-trained one was trained from."""
        return correspond(self.pretrained, self.posttrained)

    @cached_property
    def vocabulary(self) -> SharedVocabulary:
        """The token ids that both sides have. Raises as `compare_vocabularies` does."""
        return compare_vocabularies(self.pretrained, self.posttrained)

    @property
    def is_remote(self) -> bool:
        """Whether reading all tensors of both would download something."""
        return self.pretrained.is_remote or self.posttrained.is_remote

    def download(
        self, progress: Progress, files: Mapping[Side, Collection[str]] | None = None, *, recheck: bool = False
    ) -> "ModelPair":
        """The pair with weight files, all or those in `files`, on this disk; see `Checkpoint.download`."""
        if not (self.is_remote or recheck):
            return self
        wanted = {
            file
            for side, checkpoint in self.items()
            for name, file in checkpoint.weight_files.items()
            if files is None or name in files[side]
        }
        if missing := sum(file.download_bytes for file in wanted):  # checked for both sides before the first download
            from slrmerge.checkpoint.hub.repository import require_space

            require_space(missing)
        post = self.posttrained
        if isinstance(post, AdapterCheckpoint) and post.is_on(self.pretrained):  # both sides read the same files
            of_base = None if files is None else {*files["pretrained"], *files["posttrained"]}
            base = post.base.download(progress, of_base, recheck=recheck)
            return ModelPair(base, post.on(base))
        return ModelPair(
            **{
                side: checkpoint.download(progress, files and files[side], recheck=recheck)
                for side, checkpoint in self.items()
            }
        )

    @contextmanager
    def open(self) -> "Iterator[PairReader]":
        """Both checkpoints, open for reading."""
        with self.pretrained.open() as pretrained, self.posttrained.open() as posttrained:
            yield PairReader(pretrained, posttrained)

    def __repr__(self) -> str:
        return f"<ModelPair {self.pretrained} → {self.posttrained}>"


@dataclass(frozen=True, slots=True)
class PairReader:
    """The readers of a pair's two checkpoints."""

    pretrained: TensorReader
    posttrained: TensorReader

    def __getitem__(self, side: Side) -> TensorReader:
        return self.pretrained if side == "pretrained" else self.posttrained

    def read_elements(
        self, pretrained: str, posttrained: str, steps: range, buffers: tuple[memoryview, memoryview]
    ) -> Iterator[tuple[int, tuple[str, str]]]:
        """Read elements of a tensor of each side into two buffers; see `TensorReader`. Yields number and dtypes."""
        pre = self.pretrained.read_elements(pretrained, steps, buffers[0])
        post = self.posttrained.read_elements(posttrained, steps, buffers[1])
        for (pre_dtype, count), (post_dtype, _) in zip(pre, post, strict=True):
            yield count, (pre_dtype, post_dtype)

    def check_unchanged(self) -> None:
        """Raise SourceChangedError where a file that was read has changed since it was listed."""
        self.pretrained.check_unchanged()
        self.posttrained.check_unchanged()

    def cancel(self) -> None:
        """Make reads that wait for the network raise HubError."""
        self.pretrained.cancel()
        self.posttrained.cancel()


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


def require_pair(pair: object) -> None:
    """Raise OptionError for a value that is not a pair, such as a path."""
    require_type("pair", pair, ModelPair, "pass what slrmerge.open_pair returns")


def require_same_depth(pair: ModelPair) -> Iterator[Problem]:
    """Two models of different depth have no layers in common, whatever the names say."""
    pre, post = pair.pretrained.stack, pair.posttrained.stack
    if pre and post and pre.count != post.count:
        what = f"has {pre.count} layers, the post-trained model has {post.count}"
        yield Problem("different-depth", str(pair.pretrained), what, "name the model that it was trained from")


def require_layers(pair: ModelPair) -> LayerStack:
    """The decoder layers. Raises PlanError where they cannot be identified."""
    if pair.stack is None:
        raise PlanError(no_stack_problem(str(pair.posttrained)))
    return pair.stack


def no_stack_problem(where: str, remedy: str = "") -> Problem:
    """No prefix has as many numbered layers as the config says, or more than one has."""
    what = "the decoder layers cannot be identified: no prefix, or more than one, has as many as the config says"
    return Problem("no-layers", where, what, remedy)
