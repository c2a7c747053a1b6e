"""The two checkpoints of a merge as one value, and their readers."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from slrmerge.checkpoint.adapter import AdapterCheckpoint
from slrmerge.checkpoint.base import Checkpoint, TensorReader
from slrmerge.checkpoint.correspondence import Correspondence, correspond
from slrmerge.checkpoint.files import LocalFile
from slrmerge.checkpoint.layers import LayerStack
from slrmerge.checkpoint.quantized import Quantization, QuantizedPair
from slrmerge.checkpoint.vocabulary import SharedVocabulary, compare_vocabularies
from slrmerge.errors import PlanError, Problem, require_type
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
    def quantization(self) -> QuantizedPair:
        """How each side is quantized. Raises as `Quantization.of` does."""
        return QuantizedPair(Quantization.of(self.pretrained), Quantization.of(self.posttrained))

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


def require_pair(pair: object) -> None:
    """Raise OptionError for a value that is not a pair, such as a path."""
    require_type("pair", pair, ModelPair, "pass what slrmerge.open_pair returns")


def require_not_replaced(pair: ModelPair) -> None:
    """Raise SourceChangedError where another file has the name of one that was read: a merge would read that one."""
    for _, checkpoint in pair.items():
        for file in checkpoint.weight_files.values():
            if isinstance(file, LocalFile) and file.path.exists():
                file.open().close()


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
