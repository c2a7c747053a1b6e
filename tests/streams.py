"""The bytes of planned shards, computed without writing them."""

from collections.abc import Iterator

from slrmerge.merging.plan.model import MergePlan, PlannedShard
from slrmerge.merging.stream import HybridReader, ShardStream


def shard_chunks(
    plan: MergePlan, shard: PlannedShard, reader: HybridReader, *, stretch: int | None = None
) -> Iterator[bytes]:
    """The chunks of a shard, requested in ranges of `stretch` bytes or all at once."""
    stream = ShardStream(plan, shard, reader)
    for start in range(0, shard.file_bytes, stretch or shard.file_bytes):
        stop = min(start + (stretch or shard.file_bytes), shard.file_bytes)
        yield from (bytes(chunk.data) for chunk in stream.chunks(start, stop))


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
            data[tensor.name] = whole[shard.data_start + begin : shard.data_start + end]
    return data
