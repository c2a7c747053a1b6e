"""The spaces of candidates: their names, and how figures show them."""

from typing import NamedTuple


class Look(NamedTuple):
    """How figures show candidates: their name and sign in the legend, a colour of MODEL_COLOURS, plotly's symbol."""

    name: str
    sign: str
    colour: str
    symbol: str


SPACES = {"intervals": "interval", "soups": "soup", "attention": "attention", "mlp": "mlp"}
"""The names of spaces in results, by those that options give them."""

INTERVAL_SPACES = {
    "interval": Look("intervals", "●", "interval", "circle"),
    "attention": Look("attention only", "■", "early", "square"),
    "mlp": Look("MLPs only", "◆", "late", "diamond"),
}
"""Spaces of intervals, by their names in results; the selection is made in the first of them that was tried."""
