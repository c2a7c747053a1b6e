"""Matplotlib figures: the same bytes for the same figure, one colour per model, labels that do not overlap."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
    dense = [np.linspace(a, b, 2 + int(np.abs(b - a).max() / 3)) for each in drawn for a, b in pairwise(each)]
    on_lines = np.concatenate([np.empty((0, 2)), *dense])
    points = [axes.transData.transform((each.x, each.y)) for each in labels]
    taken = [_Box.around(x, y, 8 * scale, 8 * scale) for x, y in points]
    written_in: list[_Box] = []
    on_strokes = np.empty((0, 2))
    room = _Box(*axes.get_window_extent().extents)
    for label, (x, y) in sorted(zip(labels, points, strict=True), key=lambda pair: not pair[0].needed):
        written = axes.annotate(
            label.text, (label.x, label.y), xytext=(0, 0), textcoords="offset points", fontsize=fontsize,
            color=label.colour, zorder=6, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip
        size = written.get_window_extent()
        places = (
            _Place(distance, right, up, _Box.beside(x, y, size.width, size.height, right, up, distance * scale))
            for distance in (_DISTANCES if label.needed else _DISTANCES[:2])
            for right, up in _SIDES
        )
        ranked = [
            (each.box.covers(on_strokes) or each.strikes(written_in, (x, y)), each.box.covers(on_lines), number, each)
            for number, each in enumerate(places)
            if each.box.is_inside(room) and not any(map(each.box.overlaps, taken))
        ]
        crosses_stroke, crosses_line, _, place = min(ranked, default=(True, True, 0, None))
        if place is None or ((crosses_stroke or crosses_line) and not label.needed):
            written.remove()
            continue
        distance, right, up, box = place
        taken.append(box)
        written_in.append(box)
        on_strokes = np.concatenate([on_strokes, place.stroke((x, y))])
        written.set(
            position=(right * distance, up * distance),
            ha={1: "left", 0: "center", -1: "right"}[right],
            va={1: "bottom", 0: "center", -1: "top"}[up],
        )
        assert written.arrow_patch is not None
        written.arrow_patch.set_visible(distance > _NEAR)


@dataclass(frozen=True)
class _Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def around(cls, x: float, y: float, width: float, height: float) -> "_Box":
        return cls(x - width / 2, y - height / 2, x + width / 2, y + height / 2)

    @classmethod
    def beside(cls, x: float, y: float, width: float, height: float, right: int, up: int, distance: float) -> "_Box":
        """A box so far from a point, on its right (1), its left (-1) or neither (0), and likewise above or below."""
        return cls.around(x + right * (width / 2 + distance), y + up * (height / 2 + distance), width, height)

    def overlaps(self, other: "_Box") -> bool:
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def is_inside(self, other: "_Box") -> bool:
        return (
            other.left <= self.left and self.right <= other.right
            and other.bottom <= self.bottom and self.top <= other.top
        )  # fmt: skip

    def covers(self, points: "NDArray[np.float64]") -> bool:
        """Whether one of the points, an array of shape (points, 2), is inside."""
        x, y = points.T
        return bool(((self.left < x) & (x < self.right) & (self.bottom < y) & (y < self.top)).any())


class _Place(NamedTuple):
    """Where a label may be: so far to the right (1) or left (-1) of its point, above (1) or below (-1) it."""

    distance: float
    right: int
    up: int
    box: _Box

    def stroke(self, point: tuple[float, float]) -> "NDArray[np.float64]":
        """Places on the stroke from the label to its point, close together; none for a label that is near."""
        import numpy as np

        middle = (self.box.left + self.box.right) / 2, (self.box.bottom + self.box.top) / 2
        return np.linspace(middle, point, 64 if self.distance > _NEAR else 0)

    def strikes(self, boxes: Sequence[_Box], point: tuple[float, float]) -> bool:
        """Whether the stroke to the point goes through one of the boxes."""
        return any(box.covers(self.stroke(point)) for box in boxes)


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
