"""The `__metadata__` of the output's files: what the sources' headers say of the tensors that are taken from them.

torchao describes how to unpack each weight there, under its name, and lists the names; nothing else in a file says so.
Of weights that are not quantized, what names no tensor is text for people: the post-trained side's is kept.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.pair import ModelPair, Side
from slrmerge.errors import Problem
from slrmerge.io.sizes import shorten
from slrmerge.io.strict_json import InvalidJsonError, parse_json
from slrmerge.io.text import to_json
from slrmerge.merging.plan.model import PlannedTensor

_NOT_CARRIED = ("format", "total_size", "total_parameters")
"""True of the source's files only."""

_BOOKKEEPING = (
    "version", "timestamp", "date", "time", "author", "title", "description", "license", "url", "commit", "hash",
)  # fmt: skip
"""Words in keys of which the post-trained value is kept where the two differ."""

_REMEDY = "the two cannot be in one checkpoint: merge models that were saved in the same way"


class PlannedMetadata(NamedTuple):
    """The metadata of every output file, whether it is the post-trained side's, and what contradicts itself."""

    metadata: dict[str, str]
    is_posttrained: bool
    problems: list[Problem]


def plan_metadata(pair: ModelPair, tensors: Iterable[PlannedTensor]) -> PlannedMetadata:
    """What the headers of both sides say of `tensors`; of quantized ones also what names no tensor."""
    if not any(key not in _NOT_CARRIED for _, side in pair.items() for file in side.metadata for key in file):
        return PlannedMetadata({}, True, [])
    tensors = list(tensors)
    is_quantized = any(pair.quantization)
    metadata, problems = _merged(pair, tensors, is_quantized=is_quantized)
    kept = (tensor._replace(pretrained=None, posttrained=tensor.name) for tensor in tensors)
    return PlannedMetadata(metadata, metadata == _merged(pair, kept, is_quantized=is_quantized)[0], problems)


def _merged(
    pair: ModelPair, tensors: Iterable[PlannedTensor], *, is_quantized: bool
) -> tuple[dict[str, str], list[Problem]]:
    renamed: dict[Side, dict[str, str]] = {"posttrained": {}, "pretrained": {}}
    for tensor in tensors:
        for side, name in (("posttrained", tensor.posttrained), ("pretrained", tensor.pretrained)):
            if name is not None:
                renamed[side][name] = tensor.name  # type: ignore[index]
    found: dict[str, list[str]] = {}  # the values of each key, the post-trained side's first
    texts: set[str] = set()
    for side, used in renamed.items():
        for key, value, names_tensors in _used_metadata(pair[side], used) if used or not is_quantized else ():
            if not (names_tensors or is_quantized):
                texts.add(key)
                if side == "pretrained":
                    continue
            values = found.setdefault(key, [])
            if value not in values:
                values.append(value)
    metadata: dict[str, str] = {}
    problems: list[Problem] = []
    for key, values in found.items():
        lists = [_as_names(value) for value in values]
        if len(values) > 1 and all(each is not None for each in lists):
            metadata[key] = to_json(list(dict.fromkeys(name for each in lists for name in each or ())))
        elif len(values) == 1 or key in texts or any(word in key.lower() for word in _BOOKKEEPING):
            metadata[key] = values[0]
        else:
            what = f"the files' metadata say different things: {shorten(values[0])} and {shorten(values[1])}"
            problems.append(Problem("different-metadata", key, what, _REMEDY))
    return metadata, problems


def _used_metadata(checkpoint: Checkpoint, used: Mapping[str, str]) -> Iterator[tuple[str, str, bool]]:
    """The metadata of one side about the tensors in `used`, which maps their names to the output's, and about none.

    Yields key, value, and whether either names a tensor or a module.
    """
    owners = {owner for name in checkpoint for owner in _owners(name)}
    kept = {own: new for name, out in used.items() for own, new in zip(_owners(name), _owners(out), strict=True)}

    def owner_of(name: str) -> str | None:
        return next((each for each in _owners(name.partition(":")[0]) if each in owners), None)

    def rename(name: str) -> str | None:
        """A key's name in the output; None where it belongs to a tensor of the other side."""
        owner = owner_of(name)
        if owner is None:
            return name
        return kept[owner] + name[len(owner) :] if owner in kept else None

    for file in checkpoint.metadata:
        for key, value in file.items():
            new = rename(key)
            if new is None or key in _NOT_CARRIED:
                continue
            names = _as_names(value) or []
            if names:
                renamed = [found for name in names if (found := rename(name)) is not None]
                value = value if renamed == names else to_json(renamed)
            yield new, value, any(map(owner_of, (key, *names)))


def _owners(name: str) -> tuple[str, str]:
    """A tensor and its module: what metadata about it may name."""
    return name, name.rpartition(".")[0] or name


def _as_names(value: str) -> list[str] | None:
    """The strings of a JSON list of strings; None for anything else."""
    if not value.startswith("["):
        return None
    try:
        names = parse_json(value)
    except InvalidJsonError:
        return None
    return names if all(isinstance(name, str) for name in names) else None
