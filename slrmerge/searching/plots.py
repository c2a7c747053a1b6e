"""Figures of a search: the trade-off of quality and diversity, and both over all intervals."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slrmerge.io.figures import figure_text, save_figure
from slrmerge.merging.finding import SearchSummary
from slrmerge.searching.report import write_report
from slrmerge.searching.selection import ScoredCandidate, Selection, intervals_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INTERVAL, _SOUP, _POST, _CHOICE, _FAINT = "#1f6f8b", "#c97b2a", "#3a3a3a", "#c0392b", "#9fb8c1"
_SPACES = {
    "interval": ("intervals", _FAINT),
    "attention": ("attention only", "#b7a7cf"),
    "mlp": ("MLPs only", "#a9c7a0"),
}
"""The spaces of intervals: their names in the legend, and their colours."""


def draw_result(folder: Path, rows: Sequence[ScoredCandidate], choice: Selection, summary: SearchSummary) -> None:
    """Draw both figures, each as PNG and as SVG, and write the report. The same results give the same bytes."""
    save_figure(tradeoff_figure(rows, choice), folder / "tradeoff")
    save_figure(heatmaps_figure(rows, choice, summary.layers), folder / "heatmaps")
    write_report(folder, rows, choice, summary)


def tradeoff_figure(rows: Sequence[ScoredCandidate], choice: Selection) -> "Figure":
    """Quality against diversity (paper, figure 2): all intervals, the front with its lengths, soups, the choice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    spaces = {row.info.space for row in rows}
    for space, (label, colour) in _SPACES.items():
        own = [row for row in rows if row.info.space == space]
        if own:
            axes.scatter(*_points(own), s=10, color=colour, alpha=0.5, linewidths=0, label=label)
    front = sorted((row for row in intervals_of(rows) if row.pareto), key=lambda row: row.quality)
    if front:
        label = "their front, with layers restored"
        axes.plot(*_points(front), "o-", color=_INTERVAL, markersize=4, linewidth=1, label=label)
    for row in front:
        axes.annotate(
            str(row.info.layers_restored), (row.quality, row.diversity), fontsize=7, color=_INTERVAL,
            xytext=(4, 3), textcoords="offset points",
        )  # fmt: skip
    if "soup" in spaces:
        curve = [row for row in rows if row.info.space in ("post", "soup", "pre")]
        curve.sort(key=lambda row: row.info.alpha or 0)
        axes.plot(*_points(curve), "s--", color=_SOUP, markersize=3, linewidth=1, label="soups")
    others = [row for row in rows if row.info.space == "recipe"]
    if others:
        axes.scatter(*_points(others), marker="^", s=50, color="black", label="recipes")
    axes.scatter(*_points([choice.post]), marker="D", s=60, color=_POST, zorder=3, label="post-trained")
    if choice.slr is not None:
        label = figure_text(f"selected: {choice.slr.info.label}")
        axes.scatter(*_points([choice.slr]), marker="*", s=220, color=_CHOICE, zorder=4, label=label)
    floor = choice.min_quality * choice.post.quality
    axes.axvline(floor, color="grey", linewidth=0.8, linestyle=":")
    axes.annotate(
        f"{choice.min_quality:g} · Q(post)", (floor, 1), xycoords=("data", "axes fraction"), fontsize=7, color="grey",
        xytext=(3, -3), textcoords="offset points", va="top",
    )  # fmt: skip
    axes.set_xlabel("quality Q: probability of a valid answer")
    axes.set_ylabel("diversity D: entropy of the valid answers (nats)")
    axes.legend(fontsize=8, loc="best")
    return figure


def heatmaps_figure(rows: Sequence[ScoredCandidate], choice: Selection, layers: int) -> "Figure":
    """Q and D of every interval over its first and last layer, the choice framed."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    quality, diversity = np.full((2, layers, layers), np.nan)
    for row in intervals_of(rows):
        if row.info.start is not None and row.info.end is not None:
            place = row.info.start, row.info.end
            quality[place], diversity[place] = row.quality, row.diversity
    slr = choice.slr
    for number, (title, grid) in enumerate((("quality Q", quality), ("diversity D (nats)", diversity)), 1):
        axes = figure.add_subplot(1, 2, number)
        if slr is not None and slr.info.start is not None and slr.info.end is not None:
            corner = slr.info.end - 0.5, slr.info.start - 0.5
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=_CHOICE, lw=2))
        image = axes.imshow(grid, origin="lower", cmap="viridis")
        figure.colorbar(image, ax=axes, shrink=0.85)
        axes.set(title=title, xlabel="last restored layer", ylabel="first restored layer")
    return figure


def _points(rows: Sequence[ScoredCandidate]) -> tuple[list[float], list[float]]:
    return [row.quality for row in rows], [row.diversity for row in rows]
