"""What people see: tables and sentences on stdout, or the same as JSON."""

import json
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slrmerge.checkpoint import Checkpoint
from slrmerge.files import free_bytes
from slrmerge.merge import MergeResult, resolve_target
from slrmerge.plan import Kind, MergePlan, summarise_parts
from slrmerge.plan.summary import plan_sentences

if TYPE_CHECKING:
    from rich.table import Table

    from slrmerge.push import PushResult
    from slrmerge.verify import VerifyReport


def print_plan(plan: MergePlan, out: Path | None, *, as_json: bool) -> None:
    """What would be read and written: sources, parts, files, disk, notes."""
    if as_json:
        room = {} if out is None else {"out": str(out), "free_bytes": free_bytes(resolve_target(out))}
        return print_json({**plan.to_dict(), **room})
    sources = table("", "checkpoint", ">tensors", ">size", ">files")
    for side, checkpoint in (("pre-trained", plan.pretrained), ("post-trained", plan.posttrained)):
        sources.add_row(
            side,
            str(checkpoint),
            f"{len(checkpoint.weight_map):,}",
            size(checkpoint.total_bytes),
            str(len(checkpoint.shards)),
        )
    print_table(sources)
    parts = table("part", "from", ">tensors", ">size")
    for part in summarise_parts(plan):
        parts.add_row(part.where, part.source, f"{part.tensors:,}", size(part.output_bytes))
    print_table(parts)
    kinds = Counter(tensor.kind for tensor in plan.tensors())
    click.echo("tensors  " + ", ".join(f"{kinds[kind]:,} {_DONE[kind]}" for kind in _DONE if kinds[kind]))
    click.echo(f"reads    {size(plan.read_bytes)}")
    if download_bytes := plan.download_bytes:
        whole = f"; both checkpoints whole are {size(plan.whole_download_bytes)}"
        click.echo(f"fetches  {size(download_bytes)} from the Hub{whole}")
    shards, others = _count(len(plan.shards), "shard"), _count(len(plan.files), "other file")
    click.echo(f"writes   {size(plan.output_bytes)} in {shards} and {others}")
    if out is not None:
        click.echo(f"disk     {size(free_bytes(resolve_target(out)))} free at {out}")
    for note in plan.notes:
        click.echo(f"note     {note}")
    return None


def print_merged(
    plan: MergePlan, result: MergeResult, out: Path, *, pushed: "PushResult | None" = None, as_json: bool
) -> None:
    """What was written, how fast, and where it was pushed."""
    if as_json:
        return print_json(
            {
                "out": str(result.folder),
                "output_bytes": result.output_bytes,
                "resumed_pieces": result.resumed_pieces,
                "elapsed_s": round(result.elapsed_s, 3),
                "notes": list(plan.notes),
                "files": {
                    name: {"bytes": file.file_bytes, "digest": file.digest} for name, file in result.files.items()
                },
                **({"pushed": asdict(pushed)} if pushed else {}),
            }
        )
    for line in plan_sentences(plan):
        click.echo(line)
    for note in plan.notes:
        click.echo(f"note: {note}")
    rate = result.output_bytes / max(result.elapsed_s, 1e-3)
    click.echo(f"{out}: {size(result.output_bytes)} in {result.elapsed_s:.1f} s ({size(rate)}/s)")
    if pushed is None:
        click.echo(f"prove it: slrmerge verify {shlex.quote(str(out))}")
        return None
    return print_pushed(pushed, as_json=False)


def print_pushed(pushed: "PushResult", *, as_json: bool) -> None:
    """Where a merge is on the Hub now."""
    if as_json:
        return print_json(asdict(pushed))
    if pushed.was_there:
        click.echo(f"nothing to push: {pushed.url} has it already")
        return None
    removed = f", {_count(len(pushed.removed), 'older file')} removed" if pushed.removed else ""
    click.echo(f"pushed {_count(len(pushed.files), 'file')}{removed}: {pushed.url}")
    return None


def print_verified(report: "VerifyReport", *, as_json: bool) -> None:
    """What was proven."""
    if as_json:
        return print_json({**asdict(report), "folder": str(report.folder), "verified": True})
    click.echo(f"{report.folder}: {report.files} files, {size(report.checked_bytes)}, all as they were written")
    click.echo(f"against the sources: {report.sources}")
    return None


def print_checkpoint(checkpoint: Checkpoint, *, tensors: bool, as_json: bool) -> None:
    """A checkpoint's layers, shapes, dtypes and sizes."""
    if as_json:
        return print_json(_described(checkpoint))
    described = _described(checkpoint)
    click.echo(f"{checkpoint}: {described['architecture'] or 'unknown architecture'}")
    stack = checkpoint.stack
    layers = f"{stack.count} ({stack.prefix}.0–{stack.count - 1})" if stack else "none that can be told"
    dtypes = ", ".join(f"{dtype} {size(count)}" for dtype, count in described["bytes_by_dtype"].items())
    click.echo(f"layers      {layers}")
    click.echo(f"parameters  {described['parameters']:,} in {len(checkpoint.weight_map):,} tensors")
    click.echo(f"size        {size(checkpoint.total_bytes)} in {_count(len(checkpoint.shards), 'file')} ({dtypes})")
    rows = table("tensor", "layers", "dtype", "shape", ">size")
    if tensors:
        rows = table("tensor", "dtype", "shape", ">size", "file")
        for name, info in checkpoint.items():
            rows.add_row(name, info.dtype, _shape(info.shape), size(info.nbytes), checkpoint.weight_map[name])
    else:
        for (name, dtype, shape), members in _families(checkpoint).items():
            rows.add_row(name, members[0], dtype, shape, size(members[1]))
    print_table(rows)
    return None


_DONE: dict[Kind, str] = {"copy": "copied as they are", "cast": "cast", "blend": "blended", "slerp": "slerped"}


def _families(checkpoint: Checkpoint) -> dict[tuple[str, str, str], tuple[str, int]]:
    """Tensors that are alike in every layer, as one row: (name, dtype, shape) → (layers, bytes)."""
    from slrmerge.plan.summary import interval_words

    layers: dict[tuple[str, str, str], list[int]] = {}
    total: Counter[tuple[str, str, str]] = Counter()
    for name, info in checkpoint.items():
        place = checkpoint.stack.locate(name) if checkpoint.stack else None
        key = (
            f"{checkpoint.stack.prefix}.*.{place[1]}" if place and checkpoint.stack else name,
            info.dtype,
            _shape(info.shape),
        )
        layers.setdefault(key, []).extend([place[0]] if place else [])
        total[key] += info.nbytes
    return {
        key: (interval_words(found).partition(" ")[2] if found else "", total[key]) for key, found in layers.items()
    }


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    by_dtype: Counter[str] = Counter()
    for _, info in checkpoint.items():
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
        "files": {name: shard.identity.file_bytes for name, shard in checkpoint.shards.items()},
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


def size(count: float) -> str:
    """Bytes as people read them: GB = 10**9."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def table(*columns: str) -> "Table":
    """A table with these columns; those written with a > before them are set flush right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column[:1] == ">" else "left", no_wrap=True)
    return table


def print_table(table: "Table") -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 10_000
    console.print(table)
    click.echo()


def print_json(value: Mapping[str, Any]) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))
