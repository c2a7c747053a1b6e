"""Pictures: the trade-off of quality and diversity, both over all intervals, and how far each layer was moved."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slrmerge.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from slrmerge.diff import Differences
    from slrmerge.search.choose import Row
    from slrmerge.search.results import Report

PICTURES = ("tradeoff.png", "tradeoff.svg", "heatmaps.png", "heatmaps.svg")

_INTERVAL, _SOUP, _POST, _CHOICE, _FAINT = "#1f6f8b", "#c97b2a", "#3a3a3a", "#c0392b", "#9fb8c1"
_SPACES = {
    "interval": ("intervals", _FAINT),
    "attention": ("attention only", "#b7a7cf"),
    "mlp": ("MLPs only", "#a9c7a0"),
}
"""What the legend calls the spaces of intervals, and their colours."""


def draw_report(folder: Path, report: "Report") -> None:
    """Both pictures, each as PNG and as SVG. The same results give the same bytes."""
    for name, figure in (("tradeoff", tradeoff(report)), ("heatmaps", heatmaps(report))):
        save(figure, folder / name)


def save(figure: "Figure", path: Path) -> None:
    """`path` with .png and with .svg, without dates or random ids in them."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "slrmerge", "svg.fonttype": "none"}):
        for form, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            drawn = BytesIO()
            figure.savefig(drawn, format=form, dpi=150, metadata=metadata)
            replace_file(path.with_suffix(f".{form}"), drawn.getvalue())


def tradeoff(report: "Report") -> "Figure":
    """Quality against diversity (paper, figure 2): all intervals, the front with its lengths, soups, the choice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    choice = report.choice
    spaces = {row.candidate.space for row in report.rows}
    for space, (label, colour) in _SPACES.items():
        rows = [row for row in report.rows if row.candidate.space == space]
        if rows:
            axes.scatter(*_points(rows), s=10, color=colour, alpha=0.5, linewidths=0, label=label)
    front = sorted((row for row in report.intervals if row.pareto), key=lambda row: row.quality)
    if front:
        label = "their front, with layers restored"
        axes.plot(*_points(front), "o-", color=_INTERVAL, markersize=4, linewidth=1, label=label)
    for row in front:
        _write_beside(axes, row, str(row.candidate.layers_restored))
    if "soup" in spaces:
        curve = [row for row in report.rows if row.candidate.space in ("post", "soup", "pre")]
        curve.sort(key=lambda row: row.candidate.alpha or 0)
        axes.plot(*_points(curve), "s--", color=_SOUP, markersize=3, linewidth=1, label="soups")
    others = [row for row in report.rows if row.candidate.space == "recipe"]
    if others:
        axes.scatter(*_points(others), marker="^", s=50, color="black", label="recipes")
    axes.scatter(*_points([choice.post]), marker="D", s=60, color=_POST, zorder=3, label="post-trained")
    if choice.slr is not None:
        label = f"choice: {choice.slr.candidate.label}"
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


def heatmaps(report: "Report") -> "Figure":
    """Q and D of every interval over its first and last layer, the choice framed."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for number, (name, title) in enumerate((("quality", "quality Q"), ("diversity", "diversity D (nats)"))):
        axes = figure.add_subplot(1, 2, number + 1)
        grid = np.full((report.layers, report.layers), np.nan)
        for start, end, row in _intervals(report):
            grid[start, end] = getattr(row, name)
            if row is report.choice.slr:
                axes.add_patch(Rectangle((end - 0.5, start - 0.5), 1, 1, fill=False, edgecolor=_CHOICE, lw=2))
        image = axes.imshow(grid, origin="lower", cmap="viridis")
        figure.colorbar(image, ax=axes, shrink=0.85)
        axes.set(title=title, xlabel="last restored layer", ylabel="first restored layer")
    return figure


def differences_figure(differences: "Differences") -> "Figure":
    """The relative change and the cosine of each module in each layer."""
    from matplotlib.figure import Figure

    modules = differences.modules()
    size = (2.5 + 0.28 * differences.layers, 1.6 + 0.6 * len(modules))
    figure = Figure(figsize=size, layout="constrained")
    panels = (("relative_change", "|post − pre| / |pre|", "viridis"), ("cosine", "cosine", "viridis_r"))
    for number, (name, label, colours) in enumerate(panels, 1):
        grid = np.full((len(modules), differences.layers), np.nan)
        for (layer, module), distance in differences.by_module.items():
            if module in modules and 0 <= layer < differences.layers:
                grid[modules.index(module), layer] = getattr(distance, name)
        axes = figure.add_subplot(2, 1, number)
        image = axes.imshow(grid, cmap=colours, aspect="auto")
        figure.colorbar(image, ax=axes, label=label)
        axes.set_yticks(range(len(modules)), modules)
        axes.set_xlabel("layer")
    figure.suptitle("how far post-training moved the weights")
    return figure


def _points(rows: "list[Row]") -> tuple[list[float], list[float]]:
    return [row.quality for row in rows], [row.diversity for row in rows]


def _write_beside(axes: "Axes", row: "Row", text: str) -> None:
    options: dict[str, Any] = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 7, "color": _INTERVAL}
    axes.annotate(text, (row.quality, row.diversity), **options)


def _intervals(report: "Report") -> "Iterator[tuple[int, int, Row]]":
    for row in report.intervals:
        if row.candidate.start is not None and row.candidate.end is not None:
            yield row.candidate.start, row.candidate.end, row
