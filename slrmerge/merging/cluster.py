"""Write the shards of a plan on a Ray cluster: each by one worker, all into the same staging folder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from slrmerge.io.cluster import Cluster, require_shared
from slrmerge.io.progress import Progress
from slrmerge.merging.journal import Journal, Piece, pieces_of
from slrmerge.merging.plan.model import MergePlan
from slrmerge.merging.shard_writer import ShardJobs, missing_pieces, write_shards
from slrmerge.merging.stream import HybridReader


def write_shards_on_cluster(
    missing: Sequence[ShardJobs],
    plan: MergePlan,
    journal: Journal,
    address: str,
    threads: int | None,
    progress: Progress,
) -> None:
    """Write the missing pieces, each worker with `threads`, by default one per core of its machine.

    The folder of `journal` and local sources must be on storage that all machines share. A shard whose worker dies is
    begun anew; the others are not affected. Raises ClusterError, and what `write_shards` raises.
    """
    progress.start("merging on the cluster", sum(job.stop - job.start for shard in missing for job in shard.jobs))
    with Cluster(address) as cluster:
        workers = cluster.workers(gpus=False)
        jobs = [
            _Job(
                replace(plan, shards=(shard.stream.shard,), files=(), notes=(), whole=None),  # what a worker reads
                journal.folder,
                tuple(job.piece for job in shard.jobs),
                journal.durable,
                threads or workers.cpus,
            )
            for shard in missing
        ]
        for _, written in cluster.run(_write_shard, jobs, workers=workers, progress=progress):
            journal.note_nans(written.nan_names)
            for piece, digest in written.pieces.items():
                journal.record(piece, digest)


@dataclass(frozen=True)
class _Job:
    """One shard: a plan of it alone, and its missing pieces."""

    plan: MergePlan
    folder: Path
    missing: tuple[Piece, ...]
    durable: bool
    threads: int


class _Written(NamedTuple):
    pieces: dict[Piece, bytes]
    nan_names: set[str]


class _Digests(Journal):
    """The journal of a worker, which the driver writes."""

    def _append(self, line: bytes) -> None:
        del line


def _write_shard(job: _Job, progress: Progress) -> _Written:
    require_shared(job.folder)
    (shard,) = job.plan.shards
    done = {piece for piece, _, _ in pieces_of(shard)}.difference(job.missing)
    digests = _Digests(job.folder, {}, "", durable=job.durable)
    with job.plan.pair.open() as readers:
        reader = HybridReader(readers)
        missing = missing_pieces(job.plan, reader, job.folder, done)
        write_shards(missing, job.plan, reader, digests, job.threads, progress)
    return _Written(digests.finished, digests.nan_names)
