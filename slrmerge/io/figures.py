"""Matplotlib figures: the same bytes for the same figure, one colour per model, labels that do not overlap."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from slrmerge.io.files import replace_file
from slrmerge.io.text import printable

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

MODEL_COLOURS = {
    "post": "#33383e",
    "slr": "#c5360d",
    "soup": "#9e9319",
    "early": "#1880f2",
    "late": "#347560",
    "pre": "#c844bf",
    "interval": "#0439ae",
    "recipe": "#770000",
}
"""Colours by what a model is, the same in every figure; page.css has them too.

Each has a contrast of at least 3 on white, and no two look alike with any kind of colour blindness.
"""

DPI = 150
"""Dots per inch of the PNGs."""

_NEAR, _DISTANCES = 14, (5, 9, 14, 21, 30, 42, 56, 75)
"""Points between a mark and its label, in the order in which they are tried; up to `_NEAR` there is no stroke."""

_SIDES = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))


def figure_text(text: str) -> str:
    """`text` as matplotlib shows it literally: no formula between dollars, not hidden from a legend."""
    text = printable(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def colour_names(labels: Iterable[str]) -> dict[str, str]:
    """For each label a name in MODEL_COLOURS, which page.css has too: the label itself, otherwise the next free one."""
    labels = list(dict.fromkeys(labels))
    free = cycle([name for name in MODEL_COLOURS if name not in labels] or MODEL_COLOURS)
    return {label: label if label in MODEL_COLOURS else next(free) for label in labels}


def model_colours(labels: Iterable[str]) -> dict[str, str]:
    """A colour for each label, as `colour_names` names them."""
    return {label: MODEL_COLOURS[name] for label, name in colour_names(labels).items()}


@dataclass(frozen=True)
class Label:
    """A text for the point (x, y). One that is not `needed` is left out where there is no room beside its point."""

    x: float
    y: float
    text: str
    colour: str
    needed: bool = True


def place_labels(
    axes: "Axes", labels: Sequence[Label], lines: Iterable[Sequence[tuple[float, float]]] = (), *, fontsize: float = 7.5
) -> None:
    """Write labels beside their points so that none covers another label, a labelled point or one of `lines`.

    Needed labels are placed first; where it is crowded they are farther away, with a stroke to the point, and may cross
    a line. Call this last, on a figure with DPI dots per inch: it draws the figure to learn where everything is, and
    keeps that layout. At 80 layers, adjustText 1.3 writes most labels over each other, and textalloc 1.2 leaves out
    needed ones.
    """
    import numpy as np

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    scale = figure.dpi / 72
    drawn = [axes.transData.transform(line) for line in lines if len(line)]
    dense = [np.linspace(a, b, 2 + int(np.abs(b - a).max() / 3)) for each in drawn for a, b in pairwise(each)]
    on_lines = np.tile(np.concatenate([np.empty((0, 2)), *dense]), 2)
    points = axes.transData.transform([(each.x, each.y) for each in labels]) if labels else np.empty((0, 2))
    taken = _boxes(points, 8 * scale, 8 * scale)
    left, bottom, right, top = axes.get_window_extent().extents
    for label, point in sorted(zip(labels, points, strict=True), key=lambda pair: not pair[0].needed):
        written = axes.annotate(
            label.text, (label.x, label.y), xytext=(0, 0), textcoords="offset points", fontsize=fontsize,
            color=label.colour, zorder=6, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip
        width, height = written.get_window_extent().size
        distances = _DISTANCES if label.needed else _DISTANCES[:2]
        places = [(distance, side) for distance in distances for side in _SIDES]
        offsets = [(x * (width / 2 + far * scale), y * (height / 2 + far * scale)) for far, (x, y) in places]
        boxes = _boxes(point + np.array(offsets), width, height)
        is_inside = ((boxes[:, :2] >= (left, bottom)) & (boxes[:, 2:] <= (right, top))).all(axis=1)
        free = np.flatnonzero(is_inside & ~_overlap(boxes, taken))
        fitting = [*free[~_overlap(boxes[free], on_lines)], *(free if label.needed else ())]
        if not fitting:
            written.remove()
            continue
        distance, (x, y) = places[fitting[0]]
        taken = np.vstack([taken, boxes[fitting[0]]])
        written.set(
            position=(x * distance, y * distance),
            ha={1: "left", 0: "center", -1: "right"}[x],
            va={1: "bottom", 0: "center", -1: "top"}[y],
        )
        assert written.arrow_patch is not None
        written.arrow_patch.set_visible(distance > _NEAR)


def _boxes(centres: "NDArray[np.float64]", width: float, height: float) -> "NDArray[np.float64]":
    """Boxes around points, in pixels: left, bottom, right, top, shape (points, 4)."""
    import numpy as np

    half = width / 2, height / 2
    return np.hstack([centres - half, centres + half])


def _overlap(boxes: "NDArray[np.float64]", others: "NDArray[np.float64]") -> "NDArray[np.bool_]":
    """Whether each box overlaps any of the others, shape (boxes,); a point is a box without size."""
    left, bottom, right, top = boxes.T[:, :, None]
    pairs = (left < others[:, 2]) & (others[:, 0] < right) & (bottom < others[:, 3]) & (others[:, 1] < top)
    overlaps: NDArray[np.bool_] = pairs.any(axis=1)
    return overlaps


def save_figure(figure: "Figure", path: Path) -> bytes:
    """Write `figure` to `path` with .png and with .svg; returns the SVG, with its texts as text."""
    svg = _drawn(figure, "svg", Date=None)
    replace_file(path.with_suffix(".png"), _drawn(figure, "png", Software=None))
    replace_file(path.with_suffix(".svg"), svg)
    return svg


def _drawn(figure: "Figure", form: str, **metadata: None) -> bytes:
    """`figure` in a file format, without dates or random ids."""
    import matplotlib as mpl

    drawn = BytesIO()
    with mpl.rc_context({"svg.hashsalt": "slrmerge", "svg.fonttype": "none"}):
        figure.savefig(drawn, format=form, dpi=DPI, metadata=metadata)
    return drawn.getvalue()
