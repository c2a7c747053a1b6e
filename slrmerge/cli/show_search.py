"""A search on the terminal: the selection next to the two models, the ten best; or what a search would take."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slrmerge.cli.group import as_typed
from slrmerge.cli.output import Table, echo, print_json
from slrmerge.io.sizes import format_bytes, format_duration
from slrmerge.merging.finding import HeldOut
from slrmerge.searching.held_out import NAMES
from slrmerge.searching.results import LOW_QUALITY, SearchResult
from slrmerge.searching.results_folder import RECIPES
from slrmerge.searching.selection import ScoredCandidate, ten_best

if TYPE_CHECKING:
    from slrmerge.searching.estimate import Estimate
    from slrmerge.searching.prepare import Prepared


def print_result(result: SearchResult, folder: Path, *, as_json: bool) -> None:
    """The selected candidate next to the parents and controls, then the ten best."""
    best = ten_best(result.rows)
    for warning in result.warnings:
        echo(f"warning: {as_typed(warning)}", err=True)
    if as_json:
        said = {"notes": result.notes, "doubts": result.doubts, "warnings": result.warnings}
        summary = result.summary().model_dump(mode="json", exclude_defaults=True)
        print_json({"out": str(folder), **summary, **said, "ten_best": [_plain(row) for row in best]})
        return
    choice = result.choice
    compared = Table("", "hybrid", ">layers", ">Q", ">D", ">ΔQ", ">ΔD")
    for names, row in _compared(result):
        changes = (_change(choice.post, row, "quality"), _change(choice.post, row, "diversity"))
        layers = str(row.layers_restored or "")
        is_doubtful = (row is choice.post and row.quality < LOW_QUALITY) or (
            row is choice.pre and row.quality > choice.post.quality
        )
        named = names + (" (!)" if is_doubtful else "")
        compared.add_row(named, row.full_label, layers, *_scores(row), *changes)
    compared.print()
    ranked = Table(">rank", "hybrid", ">layers", ">Q", ">D")
    for rank, row in enumerate(best, 1):
        label = row.full_label + ("" if row.exact else " (roughly)")
        ranked.add_row(str(rank), label, str(row.layers_restored), *_scores(row))
    ranked.print()
    if result.held_out:
        _print_held_out(result.held_out)
    on_others = "; held-out: difference [95% interval]" if result.held_out else ""
    echo(f"ΔQ, ΔD: change from the post-trained model{on_others}")
    if result.reselected:
        echo(f"resampled prompts select {_shares(result.reselected)}")
    for line in (*result.notes, *result.doubts):
        echo(f"note: {as_typed(line)}")
    kept = f"quality ≥ {choice.min_quality:.0%} of the post-trained model"
    if choice.slr is None:
        if result.intervals:
            again = f"slrmerge select {_quoted(folder)} --min-quality …"
            echo(f"no interval has {kept}; select again with a lower minimum: {again}")
        return
    label, count = choice.slr.label, len(result.rows)
    echo(f"selected {label}: the highest diversity of {count:,} candidates with {kept}")
    echo(f"merge it: slrmerge {_quoted(folder / RECIPES['slr'])} --out ./hybrid")


def print_estimate(prepared: "Prepared", estimate: "Estimate", *, as_json: bool) -> None:
    """What the search asks and would take, and what the paper's three models would take on this machine."""
    if as_json:
        asked = {"prompt": prepared.prompts[0].text, "date": prepared.day and prepared.day.isoformat()}
        print_json({**estimate.to_dict(), **asked, "notes": prepared.notes})
        return
    tokens = f"{estimate.prompt_tokens:,} tokens, packed into {estimate.packed_tokens:,}"
    lengths = [len(path) for prompt in prepared.prompts for path in prompt.answers]
    answers = f", {len(lengths):,} answers of up to {max(lengths)} tokens" if max(lengths) > 1 else ""
    echo(f"{estimate.prompts} prompts{answers}, {tokens}")
    for note in prepared.notes:
        echo(f"note: {as_typed(note)}")
    each_worker = " for each worker" if estimate.workers > 1 else ""
    if estimate.download_bytes:
        echo(f"downloads {format_bytes(estimate.download_bytes)} from the Hub{each_worker}")
    if each_worker:
        echo(f"for each of {estimate.workers} workers; the time is at the rate of this machine")
    rows = Table("search of", ">candidates", "dtype", ">rate here", ">time here", ">memory", ">states")
    for row in estimate.rows:
        rate = row.flop_per_s / 1e9
        speed = f"{rate:,.{0 if rate >= 10 else 1}f} GFLOP/s", format_duration(row.seconds)
        taken = format_bytes(row.memory_bytes), format_bytes(row.cost.states_bytes)
        rows.add_row(row.name, f"{row.candidates:,}", row.dtype, *speed, *taken)
    rows.print()
    echo("time: the matrix products of each pass at the rate measured here,")
    echo("without start-up and reading weights")
    echo("memory: about the peak, with at most --max-memory of hidden states")
    echo("states: what all hidden states take, and on disk, to resume")
    echo("after a pass in bfloat16 or a quick one, finalists are re-scored in float32:")
    echo("few, or all where scores tie")


def _print_held_out(held_out: HeldOut) -> None:
    """The scores on prompts that were not used to select, each hybrid once."""
    table = Table(f"{held_out.prompts} held-out prompts", ">Q", ">D", ">ΔQ", ">ΔD")
    names: dict[str, list[str]] = {}
    for name in held_out.scores:
        names.setdefault(held_out.scores[name].label, []).append(name)
    for same in names.values():
        found = held_out.scores[same[0]]
        changes = (change.text(3) if change else "" for change in (found.quality_change, found.diversity_change))
        named = ", ".join(NAMES[name] for name in same)
        hybrid = found.label if found.label == named else f"{found.label} ({named})"
        table.add_row(hybrid, f"{found.quality:.3f}", f"{found.diversity:.3f}", *changes)
    table.print()


def _shares(reselected: Mapping[str, float], shown: int = 3) -> str:
    """How often resampled prompts select which candidates, the most frequent first."""
    listed = [f"{as_typed(label)} {share:.0%}" for label, share in list(reselected.items())[:shown]]
    others = sum(list(reselected.values())[shown:])
    nothing = 1 - sum(reselected.values())
    listed += [f"{name} {share:.0%}" for name, share in (("others", others), ("nothing", nothing)) if share > 0.005]
    return ", ".join(listed)


def _scores(row: ScoredCandidate) -> tuple[str, str]:
    return f"{row.quality:.3f}", f"{row.diversity:.3f}"


def _compared(result: SearchResult) -> list[tuple[str, ScoredCandidate]]:
    """The rows of the first table: each hybrid once, with all its names; recipes that were scored come last."""
    groups: dict[str, tuple[list[str], ScoredCandidate]] = {}
    for name, row in result.choice.named().items():
        groups.setdefault(row.label, ([], row))[0].append(NAMES[name])
    for row in result.rows:
        if row.space == "recipe" or row.also_named:
            groups.setdefault(row.label, (["recipe"], row))
    return [(", ".join(names), row) for names, row in groups.values()]


def _change(post: ScoredCandidate, row: ScoredCandidate, score: Literal["quality", "diversity"]) -> str:
    """The change of a score from the post-trained model, relative to it."""
    if row is post or not getattr(post, score):
        return ""
    return f"{getattr(row, score) / getattr(post, score) - 1:+.0%}"


def _plain(row: ScoredCandidate) -> dict[str, Any]:
    return {"label": row.label, "quality": row.quality, "diversity": row.diversity, "exact": row.exact}


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
