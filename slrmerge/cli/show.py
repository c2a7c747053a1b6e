"""Results on stdout: tables and sentences, or the same as JSON."""

import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.cli.group import as_typed
from slrmerge.cli.output import Table, echo, print_json
from slrmerge.io.sizes import format_bytes, format_duration
from slrmerge.merging.executor import MergeResult
from slrmerge.merging.plan.model import MergePlan
from slrmerge.merging.plan.summary import describe_layers, describe_plan, summarise_parts

if TYPE_CHECKING:
    from slrmerge.merging.hub_commit import PushResult
    from slrmerge.merging.verify import VerifyResult


_DISK_RATES = {"1 GB/s": 1e9}
_NETWORK_RATES = {"100 Mbit/s": 12.5e6, "1 Gbit/s": 125e6}
"""Rates, in bytes per second, for which a plan says how long the merge takes."""


def print_plan(plan: MergePlan, out: Path | None, free_bytes: int, *, as_json: bool) -> None:
    """What a merge would read and write: sources, parts, files, disk space, time, notes.

    `free_bytes` are those of the disk of `out`, or of the current folder.
    """
    if as_json:
        target = {"out": str(out)} if out else {}
        return print_json({**target, "free_bytes": free_bytes, **plan.to_dict()})
    sources = Table("", "checkpoint", ">tensors", ">size", ">files")
    for side, checkpoint in (("pre-trained", plan.pair.pretrained), ("post-trained", plan.pair.posttrained)):
        files = str(len(checkpoint.weight_files))
        sources.add_row(side, str(checkpoint), f"{len(checkpoint):,}", format_bytes(checkpoint.total_bytes), files)
    sources.print()
    parts = Table("part", "from", ">tensors", ">size")
    for part in summarise_parts(plan):
        parts.add_row(part.where, part.source, f"{part.tensors:,}", format_bytes(part.output_bytes))
    parts.print()
    done = {"copy": "copied", "cast": "cast", "adapter": "computed with the adapter", "scaled": "scaled"}
    kinds = (f"{count:,} {done.get(kind, f'blended ({kind})')}" for kind, count in sorted(plan.kinds.items()))
    echo(f"tensors    {', '.join(kinds)}")
    echo(f"reads      {format_bytes(plan.read_bytes)}")
    if download_bytes := plan.download_bytes:
        full = f"; both full checkpoints are {format_bytes(plan.full_download_bytes)}"
        echo(f"downloads  {format_bytes(download_bytes)} from the Hub{full}")
    shards, others = _count(len(plan.shards), "shard"), _count(len(plan.files), "other file")
    echo(f"writes     {format_bytes(plan.output_bytes)} in {shards} and {others}")
    if plan.resharded:
        echo(f"shards     new ones: {as_typed(plan.resharded)}")
    else:
        unchanged = sum(shard.is_unchanged for shard in plan.shards)
        echo(f"shards     those of the post-trained side, {unchanged} of {len(plan.shards)} unchanged")
    echo(f"disk       {format_bytes(free_bytes)} free{'' if out else ' in the current folder'}")
    echo(f"time       {', '.join(_times(plan))}")
    for note in plan.notes:
        echo(f"note: {as_typed(note)}")
    return None


def _times(plan: MergePlan) -> Iterator[str]:
    """How long a merge takes at common rates: nothing is measured."""
    rates, moved_bytes = _DISK_RATES, plan.output_bytes
    if plan.download_bytes:
        rates, moved_bytes = _NETWORK_RATES, plan.download_bytes
    for name, bytes_per_s in rates.items():
        seconds = moved_bytes / bytes_per_s
        yield f"{'less than 1 s' if seconds < 1 else f'about {format_duration(seconds)}'} at {name}"


def print_merged(
    plan: MergePlan, result: MergeResult, out: Path, *, pushed: "PushResult | None" = None, as_json: bool
) -> None:
    """What was written, how fast, and where it was pushed."""
    if as_json:
        files = {name: {"bytes": file.file_bytes, "digest": file.digest} for name, file in result.files.items()}
        return print_json(
            {
                "out": str(out),
                "output_bytes": result.output_bytes,
                "resumed_pieces": result.resumed_pieces,
                "elapsed_s": round(result.elapsed_s, 3),
                "notes": list(result.notes),
                "files": files,
                **({"pushed": asdict(pushed)} if pushed else {}),
            }
        )
    for line in describe_plan(plan):
        echo(line)
    for note in result.notes:
        echo(f"note: {as_typed(note)}")
    rate = result.output_bytes / max(result.elapsed_s, 1e-3)
    size = format_bytes(result.output_bytes)
    echo(f"{out}: {size} in {result.elapsed_s:.1f} s ({format_bytes(rate)}/s)")
    if pushed is None:
        echo(f"verify it: slrmerge verify {shlex.quote(str(out))}")
        return None
    return print_pushed(pushed, as_json=False)


def print_pushed(pushed: "PushResult", *, as_json: bool) -> None:
    """Where a merge is on the Hub now."""
    if as_json:
        return print_json(asdict(pushed))
    if pushed.unchanged:
        echo(f"nothing to push: {pushed.url} is up to date")
        return None
    removed = f", removed {_count(len(pushed.removed), 'older file')}" if pushed.removed else ""
    echo(f"pushed {_count(len(pushed.files), 'file')}{removed}: {pushed.url}")
    moved = {"uploaded": pushed.uploaded_bytes, "copied on the Hub": pushed.copied_bytes, "there": pushed.skipped_bytes}
    echo(", ".join(f"{format_bytes(size)} {how}" for how, size in moved.items() if size))
    return None


def print_verified(result: "VerifyResult", *, as_json: bool) -> None:
    """What was verified."""
    if as_json:
        return print_json({**asdict(result), "folder": str(result.folder), "verified": True})
    echo(f"{result.folder}: {result.files} files, {format_bytes(result.checked_bytes)}, all unaltered")
    echo(f"sources: {as_typed(result.sources)}")
    return None


_MAX_ROWS = 2000
"""More than models have tensors that differ; a hostile one has 100,000."""


def print_checkpoint(checkpoint: Checkpoint, *, tensors: bool, as_json: bool) -> None:
    """A checkpoint's layers, shapes, dtypes and sizes."""
    described = _describe(checkpoint)
    if as_json:
        return print_json(described)
    echo(f"{checkpoint}: {described['architecture'] or 'unknown architecture'}")
    stack = checkpoint.stack
    layers = f"{stack.count} ({stack.prefix}.0–{stack.count - 1})" if stack else "not identified"
    dtypes = ", ".join(f"{dtype} {format_bytes(count)}" for dtype, count in described["bytes_by_dtype"].items())
    size, files = format_bytes(checkpoint.total_bytes), _count(len(checkpoint.weight_files), "file")
    echo(f"layers      {layers}")
    echo(f"parameters  {described['parameters']:,} in {len(checkpoint):,} tensors")
    echo(f"size        {size} in {files} ({dtypes})")
    more = 0
    if tensors:
        rows = Table("tensor", "dtype", "shape", ">size", "file")
        for name, info in checkpoint.items():
            rows.add_row(name, info.dtype, _shape(info.shape), format_bytes(info.nbytes), checkpoint.weight_map[name])
    else:
        rows = Table("tensor", "layers", "dtype", "shape", ">size")
        groups = _groups(checkpoint)
        for (name, dtype, shape), (places, nbytes) in islice(groups.items(), _MAX_ROWS):
            rows.add_row(name, places, dtype, shape, format_bytes(nbytes))
        more = len(groups) - _MAX_ROWS
    rows.print()
    if more > 0:
        echo(f"… and {more:,} more rows; --tensors lists every tensor")
    return None


def _groups(checkpoint: Checkpoint) -> dict[tuple[str, str, str], tuple[str, int]]:
    """Tensors that are the same in several layers, as one row: (name, dtype, shape) → (layers, bytes)."""
    layers: dict[tuple[str, str, str], list[int]] = {}
    total: Counter[tuple[str, str, str]] = Counter()
    for name, info in checkpoint.items():
        place = checkpoint.stack.locate(name) if checkpoint.stack else None
        name = f"{checkpoint.stack.prefix}.*.{place[1]}" if place and checkpoint.stack else name
        key = (name, info.dtype, _shape(info.shape))
        layers.setdefault(key, []).extend([place[0]] if place else [])
        total[key] += info.nbytes
    return {
        key: (describe_layers(found).partition(" ")[2] if found else "", total[key]) for key, found in layers.items()
    }


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    by_dtype: Counter[str] = Counter()
    for info in checkpoint.values():
        by_dtype[info.dtype] += info.nbytes
    architectures = checkpoint.config.get("architectures")
    return {
        "checkpoint": str(checkpoint),
        "folder": str(checkpoint.folder),
        "architecture": ", ".join(map(str, architectures)) if isinstance(architectures, list) else None,
        "layers": checkpoint.stack.count if checkpoint.stack else None,
        "layer_prefix": checkpoint.stack.prefix if checkpoint.stack else None,
        "parameters": checkpoint.parameters,
        "total_bytes": checkpoint.total_bytes,
        "bytes_by_dtype": dict(by_dtype),
        "files": {name: file.file_bytes for name, file in checkpoint.weight_files.items()},
        "tensors": {
            name: {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "bytes": info.nbytes,
                "file": checkpoint.weight_map[name],
            }
            for name, info in checkpoint.items()
        },
    }


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "scalar"
