"""Which tensor goes into which output file: the post-trained side's files where they fit, otherwise new ones.

New files follow the ecosystem's rule (huggingface_hub, `split_state_dict_into_shards_factory`): fill a file until the
next tensor would not fit; a tensor that is larger than a file gets one of its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from slrmerge.checkpoint.header import DTYPE_BITS, Shard
from slrmerge.checkpoint.side_files import SINGLE_NAME
from slrmerge.io.sizes import format_bytes
from slrmerge.merging.plan.model import KeptFrame, PlannedShard, PlannedTensor


class Layout(NamedTuple):
    """The output's shards, and why they are not the post-trained side's, empty where they are."""

    shards: tuple[PlannedShard, ...]
    resharded: str


def lay_out(
    tensors: Iterable[PlannedTensor],
    posttrained: Mapping[str, Shard],
    *,
    limit_bytes: int,
    metadata: Mapping[str, str] = MappingProxyType({}),
    keeps_metadata: bool = True,
) -> Layout:
    """Assign tensors to files: to the `posttrained` side's shards, unless one is too large or a tensor changes.

    `metadata` is for the headers of new files; `keeps_metadata` where the post-trained side's own say the same.
    """
    tensors = list(tensors)
    resharded = _why_not_kept(tensors, posttrained, limit_bytes)
    if not keeps_metadata:
        resharded = resharded or "the metadata in the headers changes"
    if resharded:
        return Layout(_new_shards(tensors, limit_bytes, dict(metadata)), resharded)
    planned = {tensor.name: tensor for tensor in tensors}
    return Layout(
        tuple(
            PlannedShard(name, tuple(planned[tensor] for tensor in shard.tensors), KeptFrame.of(shard))
            for name, shard in posttrained.items()
        ),
        "",
    )


def _why_not_kept(tensors: Sequence[PlannedTensor], posttrained: Mapping[str, Shard], limit_bytes: int) -> str:
    """Why the post-trained side's shards cannot be kept, or an empty string."""
    if len(posttrained) > 1 and SINGLE_NAME in posttrained:
        return f"{SINGLE_NAME} is one of several files, and loaders would read it alone"
    for name, shard in posttrained.items():
        data_bytes = shard.file.file_bytes - shard.data_start
        if data_bytes > limit_bytes and len(shard.tensors) > 1:
            return f"{name} has {format_bytes(data_bytes)}, max_shard_size is {format_bytes(limit_bytes)}"
    infos = {name: info for shard in posttrained.values() for name, info in shard.tensors.items()}
    for tensor in tensors:
        if tensor.info != infos.get(tensor.name):
            return f"{tensor.name} changes its dtype or shape"
    return "" if len(infos) == len(tensors) else "some tensors are left out"


def split_by_size(sizes: Iterable[int], *, limit_bytes: int) -> list[list[int]]:
    """Positions of `sizes`, in order, grouped so that no group of two or more exceeds `limit_bytes`."""
    groups: list[list[int]] = []
    filling: list[int] = []
    filled = 0
    for position, size in enumerate(sizes):
        if size > limit_bytes:
            groups.append([position])
            continue
        if filled + size > limit_bytes:
            groups.append(filling)
            filling, filled = [], 0
        filling.append(position)
        filled += size
    if filling:
        groups.append(filling)
    return groups


def _new_shards(
    tensors: Sequence[PlannedTensor], limit_bytes: int, metadata: Mapping[str, str]
) -> tuple[PlannedShard, ...]:
    """New files, with their tensors in an order that aligns all of them: wide dtypes first."""
    groups = split_by_size((tensor.info.nbytes for tensor in tensors), limit_bytes=limit_bytes)
    return tuple(
        PlannedShard(
            _shard_name(number, len(groups)), _widest_first(tensors[position] for position in group), metadata=metadata
        )
        for number, group in enumerate(groups, start=1)
    )


def _shard_name(number: int, count: int) -> str:
    return SINGLE_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _widest_first(tensors: Iterable[PlannedTensor]) -> tuple[PlannedTensor, ...]:
    return tuple(sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.info.dtype]))
