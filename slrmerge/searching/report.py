"""The report of a search: one HTML page with figures to explore, and the selection for any minimum quality."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import nextafter
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np

from slrmerge.io.files import replace_file
from slrmerge.io.page import plotly_js, plotly_js_version, render_page
from slrmerge.io.strict_yaml import write_yaml
from slrmerge.io.text import printable
from slrmerge.merging.finding import SearchSummary
from slrmerge.searching.held_out import NAMES
from slrmerge.searching.selection import (
    ScoredCandidate,
    Selection,
    interval_space,
    possibly_better,
    select_from,
)
from slrmerge.searching.spaces import INTERVAL_SPACES

REPORT = "report.html"

_NAMED = 4
"""Candidates that a step names as doubtful; the page shows one fewer, and whether there are more."""


def write_report(folder: Path, rows: Sequence[ScoredCandidate], choice: Selection, summary: SearchSummary) -> None:
    """Write the page. The same results give the same bytes."""
    replace_file(folder / REPORT, report(rows, choice, summary).encode())


def report(rows: Sequence[ScoredCandidate], choice: Selection, summary: SearchSummary) -> str:
    """The page as HTML; it loads nothing, and its Content-Security-Policy forbids it to."""
    return render_page(
        "slrmerge.searching",
        "report.html.jinja",
        data=report_data(rows, choice, summary),
        summary=summary,
        names=NAMES,
        plotly=plotly_js(),
        versions={**summary.versions, "plotly.js": plotly_js_version()},
    )


def report_data(rows: Sequence[ScoredCandidate], choice: Selection, summary: SearchSummary) -> dict[str, Any]:
    """What the page's script shows, as JSON: all candidates, and the selection by minimum quality."""
    kept = kept_quality(rows, summary.post_quality)
    recipes = [_recipe(choice, row) for row in rows]
    head = commonprefix([recipe for recipe in recipes if recipe])  # noqa: RUF071 (texts, not paths)
    return {
        "task": printable(summary.task),
        "layers": summary.layers,
        "space": interval_space(rows),
        "spaces": {space: look._asdict() for space, look in INTERVAL_SPACES.items()},
        "min_quality": choice.min_quality,
        "recipe_head": head,
        "rows": [
            {
                "label": printable(row.full_label),
                "first_label": printable(row.label),
                "space": row.space,
                "start": row.start,
                "end": row.end,
                "alpha": row.alpha,
                "restored": row.layers_restored,
                "quality": row.quality,
                "diversity": row.diversity,
                "pareto": row.pareto,
                "exact": row.exact,
                "conditions": printable(row.conditions),
                "keeps": kept[row.label],
                "recipe_rest": recipe.removeprefix(head) if recipe else None,
            }
            for row, recipe in zip(rows, recipes, strict=True)
        ],
        "steps": selections(rows, choice, summary.post_quality),
    }


def kept_quality(rows: Sequence[ScoredCandidate], post_quality: Mapping[str, float]) -> dict[str, float]:
    """By label, the highest minimum quality, of at most 1, with which each candidate is feasible.

    To the last bit, so that a comparison with it decides as `mark_feasible` does: bisects over the bits of floats.
    """
    quality = np.array([row.quality for row in rows])
    post = np.array([post_quality[row.conditions] for row in rows])
    low = np.zeros(len(rows), np.int64)
    high = np.full(len(rows), np.float64(nextafter(1, 2)).view(np.int64))
    for _ in range(63):
        middle = (low + high) // 2
        is_feasible = quality >= middle.view(np.float64) * post
        low, high = np.where(is_feasible, middle, low), np.where(is_feasible, high, middle)
    return dict(zip((row.label for row in rows), low.view(np.float64).tolist(), strict=True))


def selections(
    rows: Sequence[ScoredCandidate], choice: Selection, post_quality: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The selection for every minimum quality from 0 to 1: steps, each valid from the one before up to `up_to`.

    Candidates are given by their places in `rows`. What a step names stays feasible, and so selected, up to the lowest
    `kept_quality` of these; then the next step starts.
    """
    kept = kept_quality(rows, post_quality)
    places = {row.label: place for place, row in enumerate(rows)}
    either = [(kept[row.label], replace(row, feasible=True), replace(row, feasible=False)) for row in rows]
    steps: list[dict[str, Any]] = []
    up_to = nextafter(0, -1)
    while up_to < 1:
        share = max(0.0, nextafter(up_to, 2))
        marked = [enough if share <= limit else short for limit, enough, short in either]
        found = select_from(marked, base=choice.base, min_quality=share)
        near, rough = found.near_ties[:_NAMED], possibly_better(marked, found)[:_NAMED]
        decisive = [row for row in (found.slr, found.soup, *near, *rough) if row is not None]
        up_to = min((kept[row.label] for row in decisive), default=1.0)
        steps.append(
            {
                "up_to": up_to,
                **{name: places[row.label] for name, row in found.named().items()},
                "near_ties": [places[row.label] for row in near],
                "rough": [places[row.label] for row in rough],
            }
        )
    return steps


def _recipe(choice: Selection, row: ScoredCandidate) -> str | None:
    """The recipe of a candidate as YAML; None for a mergekit config."""
    return write_yaml(choice.recipe_for(row).to_dict()) if row.rules.has_rules else None
