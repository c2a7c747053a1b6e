"""A search on the terminal: what was chosen, what it gains, the ten best; or what a search would take."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from slrmerge.cli.show import print_json, print_table, size, table
from slrmerge.search.choose import Row, ten_best
from slrmerge.search.results import Report

if TYPE_CHECKING:
    from slrmerge.search.estimate import Estimate

_NAMES = {
    "post": "post-trained",
    "slr": "choice",
    "soup": "best soup",
    "early": "early control",
    "late": "late control",
    "pre": "pre-trained",
}


def print_report(report: Report, folder: Path, *, as_json: bool) -> None:
    """The choice beside what it is held against, then the ten best."""
    if as_json:
        print_json({"out": str(folder), **report.summary(), "ten_best": [_plain(row) for row in ten_best(report.rows)]})
        return
    choice = report.choice
    compared = table("", "hybrid", ">layers", ">Q", ">D", ">gain in Q", ">gain in D")
    for name, row in choice.named().items():
        compared.add_row(
            _NAMES[name], row.candidate.label, str(row.candidate.layers_restored or ""), *_scores(row),
            _gain(choice.slr, row, "quality"), _gain(choice.slr, row, "diversity"),
        )  # fmt: skip
    print_table(compared)
    best = table(">rank", "hybrid", ">layers", ">Q", ">D")
    for rank, row in enumerate(ten_best(report.rows), 1):
        best.add_row(
            str(rank),
            row.candidate.label + ("" if row.exact else " (roughly)"),
            str(row.candidate.layers_restored),
            *_scores(row),
        )
    print_table(best)
    for note in report.notes:
        click.echo(f"note: {note}")
    for doubt in report.doubts:
        click.echo(doubt)
    floor = f"Q at least {choice.min_quality:g} of the post-trained model's"
    if choice.slr is None:
        if report.intervals:
            again = f"slrmerge select {_quoted(folder)} --min-quality …"
            click.echo(f"no interval has {floor}; choose again by a lower share: {again}")
        return
    click.echo(f"{choice.slr.candidate.label}: the highest D with {floor}, among {len(report.rows)} candidates")
    click.echo(f"merge it: slrmerge {_quoted(folder / 'slr.yaml')} --out ./hybrid")


def print_estimate(estimate: "Estimate", *, as_json: bool) -> None:
    """What the search would take, and what the paper's three models would on this machine."""
    if as_json:
        lines = [{**asdict(line), "seconds": line.seconds} for line in estimate.lines]
        print_json({**asdict(estimate), "lines": lines})
        return
    tokens = f"{estimate.prompt_tokens:,} tokens, packed into {estimate.packed_tokens:,}"
    click.echo(f"{estimate.prompts} prompts, {tokens}")
    rows = table("search of", ">candidates", ">arithmetic", ">states", "dtype", ">rate here", ">time here")
    for line in estimate.lines:
        rows.add_row(
            line.name, f"{line.candidates:,}", f"{line.cost.flop / 1e12:,.3g} TFLOP", size(line.cost.states_bytes),
            line.dtype, f"{line.flop_per_s / 1e9:,.0f} GFLOP/s", duration(line.seconds),
        )  # fmt: skip
    print_table(rows)
    click.echo(
        "time: the products of a first pass at the rate measured here; weights are to be read too, and after a pass"
    )
    click.echo("in bfloat16 the leaders are asked again in float32")


def duration(seconds: float) -> str:
    """A time as people read it."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _scores(row: Row) -> tuple[str, str]:
    return f"{row.quality:.3f}", f"{row.diversity:.3f}"


def _gain(choice: Row | None, other: Row, score: Literal["quality", "diversity"]) -> str:
    """How much more of a score the choice has than another row, as a share of the other's."""
    if choice is None or choice is other or not getattr(other, score):
        return ""
    return f"{getattr(choice, score) / getattr(other, score) - 1:+.0%}"


def _plain(row: Row) -> dict[str, Any]:
    return {"label": row.candidate.label, "quality": row.quality, "diversity": row.diversity, "exact": row.exact}


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
