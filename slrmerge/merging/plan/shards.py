"""Which tensor goes into which output file, by sizes alone.

The ecosystem's rule (huggingface_hub, `split_state_dict_into_shards_factory`): fill a file until the next tensor would
not fit; a tensor that is larger than a file gets one of its own.
"""

from collections.abc import Iterable

from slrmerge.checkpoint.header import DTYPE_BITS
from slrmerge.checkpoint.side_files import SINGLE_NAME
from slrmerge.merging.plan.model import PlannedShard, PlannedTensor


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


def lay_out(tensors: Iterable[PlannedTensor], *, limit_bytes: int) -> tuple[PlannedShard, ...]:
    """Assign tensors to files and order them there: wide dtypes first, so that all tensors are aligned."""
    tensors = list(tensors)
    groups = split_by_size((tensor.info.nbytes for tensor in tensors), limit_bytes=limit_bytes)
    return tuple(
        PlannedShard(_shard_name(number, len(groups)), _widest_first(tensors[position] for position in group))
        for number, group in enumerate(groups, start=1)
    )


def _shard_name(number: int, count: int) -> str:
    return SINGLE_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _widest_first(tensors: Iterable[PlannedTensor]) -> tuple[PlannedTensor, ...]:
    return tuple(sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.info.dtype]))
