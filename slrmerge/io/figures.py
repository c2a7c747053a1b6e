"""Matplotlib figures on disk: the same figure gives the same bytes."""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from slrmerge.io.files import replace_file
from slrmerge.io.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_text(text: str) -> str:
    """`text` as matplotlib shows it literally: no formula between dollars, not hidden from a legend."""
    text = printable(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def save_figure(figure: "Figure", path: Path) -> None:
    """Write `figure` to `path` with .png and with .svg, without dates or random ids in the files."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "slrmerge", "svg.fonttype": "none"}):
        for form, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            drawn = BytesIO()
            figure.savefig(drawn, format=form, dpi=150, metadata=metadata)
            replace_file(path.with_suffix(f".{form}"), drawn.getvalue())
