"""The bytes of planned shards, computed without writing them."""

from collections.abc import Iterator

from slrmerge.merging.blend import Blender
from slrmerge.merging.plan.model import MergePlan, PlannedShard
from slrmerge.merging.stream import HybridReader, ShardStream


def shard_chunks(
    plan: MergePlan, shard: PlannedShard, reader: HybridReader, *, stretch: int | None = None
) -> Iterator[bytes]:
    """The chunks of a shard, requested in ranges of `stretch` bytes (a multiple of 8), or all at once."""
    stream, blender = ShardStream(plan, shard, reader), Blender()
    for start in range(0, shard.file_bytes, stretch or shard.file_bytes):
        yield from map(
            bytes, stream.chunks(start, min(start + (stretch or shard.file_bytes), shard.file_bytes), blender)
        )


def shard_bytes(plan: MergePlan, *, stretch: int | None = None) -> list[bytes]:
    """Every shard of a plan, whole."""
    with plan.pair.open() as readers:
        reader = HybridReader(readers)
        return [b"".join(shard_chunks(plan, shard, reader, stretch=stretch)) for shard in plan.shards]


def tensor_bytes(plan: MergePlan) -> dict[str, bytes]:
    """Every output tensor of a plan, by name."""
    data: dict[str, bytes] = {}
    for shard, whole in zip(plan.shards, shard_bytes(plan), strict=True):
        for tensor, begin, end in shard.spans():
            data[tensor.name] = whole[len(shard.header) + begin : len(shard.header) + end]
    return data
