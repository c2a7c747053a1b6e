"""Opening checkpoints, and the pair of checkpoints that everything here is about."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from slrmerge.checkpoint.base import Checkpoint, TensorReader
from slrmerge.checkpoint.gguf import open_gguf
from slrmerge.checkpoint.layers import LayerStack
from slrmerge.checkpoint.location import Repository, parse_source
from slrmerge.checkpoint.safetensors import open_folder
from slrmerge.errors import CheckpointError, HubError, OptionError, PlanError, Problem, open_all
from slrmerge.io.progress import Progress

Side = Literal["pretrained", "posttrained"]


@dataclass(frozen=True, repr=False)
class ModelPair:
    """A pre-trained checkpoint and a post-trained one that was trained from it."""

    pretrained: Checkpoint
    posttrained: Checkpoint

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
        missing = sum(
            file.download_bytes
            for side, checkpoint in self.items()
            for name, file in checkpoint.weight_files.items()
            if files is None or name in files[side]
        )
        if missing:  # checked for both sides before the first download
            from slrmerge.checkpoint.hub.repository import require_space

            require_space(missing)
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


CheckpointLike = str | os.PathLike[str] | Repository | Checkpoint
"""What names a checkpoint: a folder, a GGUF file, `organisation/name@revision`, or an open checkpoint."""


def open_checkpoint(source: CheckpointLike, *, local_files_only: bool = False) -> Checkpoint:
    """Open a checkpoint in a folder, a GGUF file, or a repository on the Hub as `organisation/name@revision`.

    Reads the config, the index and every header; weights stay where they are. With `local_files_only`, or where
    HF_HUB_OFFLINE is set, a repository is opened from the Hub's cache. Raises CheckpointError and HubError.
    """
    if isinstance(source, Checkpoint):
        return source
    where = source if isinstance(source, Repository) else parse_source(source)
    if isinstance(where, Path):
        gguf = open_gguf(where)
        return open_folder(where) if gguf is None else gguf
    from slrmerge.checkpoint.hub.repository import open_cached, open_repository

    return open_cached(where) if local_files_only else open_repository(where)


def open_pair(pretrained: CheckpointLike, posttrained: CheckpointLike, *, local_files_only: bool = False) -> ModelPair:
    """Open both checkpoints of a pair; see `open_checkpoint`. Raises the problems of both together."""
    open_one = partial(open_checkpoint, local_files_only=local_files_only)
    pair = ModelPair(*open_all(open_one, (pretrained, posttrained), CheckpointError, HubError))
    pre, post = pair.pretrained, pair.posttrained
    if pre.format != post.format:
        gguf, other = (pre, post) if pre.format == "gguf" else (post, pre)
        what, remedy = f"is in GGUF, {other} is not", "convert that one in the same way, or name both originals"
        raise CheckpointError(Problem("different-formats", str(gguf), what, remedy))
    if pre.reference == post.reference or pre.identity == post.identity:
        what = f"has the same weights as the pre-trained side, {pre}"
        raise CheckpointError(
            Problem("same-checkpoint", str(post), what, "name the checkpoint that it was trained from")
        )
    return pair


def require_pair(pair: object) -> None:
    """Raise OptionError for a value that is not a pair, such as a path."""
    if not isinstance(pair, ModelPair):
        what = f"{type(pair).__name__} is not a pair of checkpoints"
        raise OptionError(Problem("wrong-type", "pair", what, "pass what slrmerge.open_pair returns"))


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
