"""Matplotlib figures: the same bytes for the same figure, one colour per model, labels that do not overlap."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from slrmerge.io.files import replace_file
from slrmerge.io.text import printable

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
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
    a line, or in the end a stroke. Call this last, on a figure with DPI dots per inch: it draws the figure to learn
    where everything is, and keeps that layout. At 80 layers, adjustText 1.3 writes most labels over each other, and
    textalloc 1.2 leaves out needed ones.
    """
    import numpy as np

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    scale = figure.dpi / 72
    drawn = [axes.transData.transform(line) for line in lines if len(line)]
    drawn_lines = np.concatenate([np.empty((0, 4)), *(np.hstack([line[:-1], line[1:]]) for line in drawn)])
    points = axes.transData.transform([(each.x, each.y) for each in labels]) if labels else np.empty((0, 2))
    taken = _boxes(points, 8 * scale, 8 * scale)
    written_in = strokes = np.empty((0, 4))
    left, bottom, right, top = axes.get_window_extent().extents
    for label, point in sorted(zip(labels, points, strict=True), key=lambda pair: not pair[0].needed):
        written = _write(axes, label, fontsize)
        size = np.array(written.get_window_extent().size)
        distances = np.repeat(_DISTANCES if label.needed else _DISTANCES[:2], len(_SIDES))
        sides = np.resize(_SIDES, (len(distances), 2))
        centres = point + sides * (size / 2 + distances[:, None] * scale)
        boxes = _boxes(centres, *size)
        is_inside = ((boxes[:, :2] >= (left, bottom)) & (boxes[:, 2:] <= (right, top))).all(axis=1)
        own = np.hstack([np.tile(point, (len(centres), 1)), np.where(distances[:, None] > _NEAR, centres, point)])
        crossings = _crossings(boxes, drawn_lines).any(axis=1).astype(int)
        crossings[_crossings(boxes, strokes).any(axis=1) | _crossings(written_in, own).any(axis=0)] += 2
        free = np.flatnonzero(is_inside & ~_overlap(boxes, taken) & (label.needed | (crossings == 0)))
        if not len(free):
            written.remove()
            continue
        best = free[crossings[free].argmin()]
        distance, (x, y) = int(distances[best]), sides[best].tolist()
        taken, written_in = np.vstack([taken, boxes[best]]), np.vstack([written_in, boxes[best]])
        strokes = np.vstack([strokes, own[best]])
        written.set(
            position=(x * distance, y * distance),
            ha={1: "left", 0: "center", -1: "right"}[x],
            va={1: "bottom", 0: "center", -1: "top"}[y],
        )
        assert written.arrow_patch is not None
        written.arrow_patch.set_visible(distance > _NEAR)


def _write(axes: "Axes", label: Label, fontsize: float) -> "Annotation":
    """Write a label on its point, with a stroke for when it is moved away."""
    return axes.annotate(
        label.text, (label.x, label.y), xytext=(0, 0), textcoords="offset points", fontsize=fontsize,
        color=label.colour, zorder=6, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
        arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
    )  # fmt: skip


def _boxes(centres: "NDArray[np.float64]", width: float, height: float) -> "NDArray[np.float64]":
    """Boxes around points, in pixels: left, bottom, right, top, shape (points, 4)."""
    import numpy as np

    half = width / 2, height / 2
    return np.hstack([centres - half, centres + half])


def _overlap(boxes: "NDArray[np.float64]", others: "NDArray[np.float64]") -> "NDArray[np.bool_]":
    """Whether each box overlaps any of the others, shape (boxes,)."""
    left, bottom, right, top = boxes.T[:, :, None]
    overlaps = (left < others[:, 2]) & (others[:, 0] < right) & (bottom < others[:, 3]) & (others[:, 1] < top)
    found: NDArray[np.bool_] = overlaps.any(axis=1)
    return found


def _crossings(boxes: "NDArray[np.float64]", lines: "NDArray[np.float64]") -> "NDArray[np.bool_]":
    """Whether each straight line, x and y of both its ends, crosses each box: shape (boxes, lines).

    A line misses a box that lies beside both its ends, or whose corners all lie on one side of it.
    """
    import numpy as np

    left, bottom, right, top = boxes.T[:, :, None]
    x0, y0, x1, y1 = lines.T
    corners = [(x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) for x in (left, right) for y in (bottom, top)]
    is_beside = (np.maximum(x0, x1) <= left) | (right <= np.minimum(x0, x1))
    is_beside |= (np.maximum(y0, y1) <= bottom) | (top <= np.minimum(y0, y1))
    crossed: NDArray[np.bool_] = ~is_beside & (np.min(corners, axis=0) <= 0) & (np.max(corners, axis=0) >= 0)
    return crossed


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
