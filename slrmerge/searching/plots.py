"""Figures of a search: the trade-off of quality and diversity, and both over all intervals."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slrmerge.io.figures import DPI, MODEL_COLOURS, Label, figure_text, place_labels, save_figure
from slrmerge.merging.finding import SearchSummary
from slrmerge.searching.report import write_report
from slrmerge.searching.selection import ScoredCandidate, Selection, intervals_of
from slrmerge.searching.spaces import INTERVAL_SPACES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MODELS = {
    "pre": ("pre-trained", "D", 45),
    "early": ("early control: {}", "<", 45),
    "late": ("late control: {}", ">", 45),
    "post": ("post-trained", "D", 45),
    "slr": ("selected: {}", "*", 220),
}
"""The models of a selection: their texts, markers and sizes, in the order in which they are drawn."""


def draw_result(folder: Path, rows: Sequence[ScoredCandidate], choice: Selection, summary: SearchSummary) -> None:
    """Draw both figures, each as PNG and as SVG, and write the report. The same results give the same bytes."""
    save_figure(tradeoff_figure(rows, choice), folder / "tradeoff")
    save_figure(heatmaps_figure(rows, choice, summary.layers), folder / "heatmaps")
    write_report(folder, rows, choice, summary)


def tradeoff_figure(rows: Sequence[ScoredCandidate], choice: Selection) -> "Figure":
    """Quality against diversity (paper, figure 2): all intervals, the front with its layers, soups, the selection."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.margins(0.06)
    for space, look in INTERVAL_SPACES.items():
        own = [row for row in rows if row.space == space]
        if own:
            size, alpha = (12, 0.45) if len(own) < 1000 else (6, 0.25)
            colour = MODEL_COLOURS[look.colour]
            axes.scatter(*_points(own), color=colour, s=size, alpha=alpha, linewidths=0, label=look.name)
    front = sorted((row for row in intervals_of(rows) if row.pareto), key=lambda row: row.quality)
    lines = _draw_line(axes, front, "o-", "interval", linewidth=1.2, label="their front, with the layers restored")
    labels = [_label(row, _layers(row), "interval", needed=False) for row in front if row is not choice.slr]
    soups = [row for row in rows if row.space == "soup"]
    if soups:
        curve = sorted((row for row in rows if row.space in ("post", "soup", "pre")), key=lambda row: row.alpha or 0)
        lines += _draw_line(axes, curve, "s--", "soup", linewidth=1, label="soups, with alpha")
        labels += [_label(row, f"{row.alpha:g}", "soup", needed=False) for row in soups]
    recipes = [row for row in rows if row.space == "recipe"]
    if recipes:
        axes.scatter(*_points(recipes), marker="^", s=45, color=MODEL_COLOURS["recipe"], label="recipes")
        labels += [_label(row, figure_text(row.label), "recipe") for row in recipes]
    labels += _draw_models(axes, choice)
    floor = choice.min_quality * choice.post.quality
    axes.axvline(floor, color="#59626d", linewidth=0.9, linestyle=":", label=f"{choice.min_quality:g} · Q(post)")
    axes.set_xlabel("quality Q: probability of a valid answer")
    axes.set_ylabel("diversity D: entropy of the valid answers (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    place_labels(axes, labels, lines)
    return figure


def _draw_line(
    axes: "Axes", rows: Sequence[ScoredCandidate], style: str, name: str, *, linewidth: float, label: str
) -> list[list[tuple[float, float]]]:
    """Draw a line through candidates; returns its points, or nothing where there are no candidates."""
    if not rows:
        return []
    colour = MODEL_COLOURS[name]
    axes.plot(*_points(rows), style, color=colour, markersize=3.5, linewidth=linewidth, label=label)
    return [list(zip(*_points(rows), strict=True))]


def _draw_models(axes: "Axes", choice: Selection) -> Iterator[Label]:
    """Draw the models that a selection names, and yield their labels."""
    for name, (text, marker, size) in _MODELS.items():
        row = getattr(choice, name)
        if row is not None:
            label = _label(row, figure_text(text.format(row.label)), name)
            axes.scatter(
                row.quality, row.diversity,
                marker=marker, s=size, color=label.colour, edgecolors="white", zorder=4, label=label.text,
            )  # fmt: skip
            yield label


def heatmaps_figure(rows: Sequence[ScoredCandidate], choice: Selection, layers: int) -> "Figure":
    """Q and D of every interval over its first and last layer; the selection framed, too low qualities faded."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 5.4), layout="compressed")
    quality, diversity, faded = np.full((3, layers, layers), np.nan)
    for row in intervals_of(rows):
        if row.start is not None and row.end is not None:
            place = row.start, row.end
            quality[place], diversity[place] = row.quality, row.diversity
            faded[place] = np.nan if row.feasible else 1
    slr = choice.slr
    half = max(0.5, layers / 40)  # around the cell where cells are small
    for number, (title, grid) in enumerate((("quality Q", quality), ("diversity D (nats)", diversity)), 1):
        axes = figure.add_subplot(1, 2, number)
        if slr is not None and slr.start is not None and slr.end is not None:
            corner = slr.end - half, slr.start - half
            colour = MODEL_COLOURS["slr"]
            axes.add_patch(Rectangle(corner, 2 * half, 2 * half, fill=False, edgecolor=colour, lw=2, zorder=3))
        image = axes.imshow(grid, origin="lower", cmap="viridis")
        axes.imshow(faded, origin="lower", cmap=ListedColormap(["white"]), alpha=0.65)
        figure.colorbar(image, ax=axes, shrink=0.85)
        axes.set(title=title, xlabel="last restored layer", ylabel="first restored layer")
        axes.spines[["top", "left"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    selected = f"{slr.label} framed; " if slr else ""
    figure.supxlabel(figure_text(f"{selected}faded: less than {choice.min_quality:g} · Q(post)"), fontsize=9)
    return figure


def _points(rows: Sequence[ScoredCandidate]) -> tuple[list[float], list[float]]:
    return [row.quality for row in rows], [row.diversity for row in rows]


def _label(row: ScoredCandidate, text: str, name: str, *, needed: bool = True) -> Label:
    return Label(row.quality, row.diversity, text, MODEL_COLOURS[name], needed)


def _layers(row: ScoredCandidate) -> str:
    """`12–17`, or `12` for one layer."""
    return str(row.start) if row.start == row.end else f"{row.start}–{row.end}"
