"""The bytes of planned shards, for tests that look at them without writing."""

from collections.abc import Iterator

from slrmerge.blend import Blender
from slrmerge.plan import MergePlan, PlannedShard
from slrmerge.stream import ShardStream, Sources


def shard_chunks(
    plan: MergePlan, shard: PlannedShard, sources: Sources, *, stretch: int | None = None
) -> Iterator[bytes]:
    """The chunks of a shard, asked for in stretches of `stretch` bytes (a multiple of 8), or all at once."""
    stream, blender = ShardStream(plan, shard, sources), Blender()
    for start in range(0, shard.file_bytes, stretch or shard.file_bytes):
        yield from map(
            bytes, stream.chunks(start, min(start + (stretch or shard.file_bytes), shard.file_bytes), blender)
        )
