"""Which layers to restore: every interval and soup of a pair, scored by a proxy task in one pass (paper, section 3)."""

from slrmerge.search.candidates import SPACES
from slrmerge.search.choose import MIN_QUALITY, Choice, Row, ten_best
from slrmerge.search.results import Report
from slrmerge.search.run import Estimate, Search, SearchOptions, SearchProgress, select

__all__ = [
    "MIN_QUALITY",
    "SPACES",
    "Choice",
    "Estimate",
    "Report",
    "Row",
    "Search",
    "SearchOptions",
    "SearchProgress",
    "select",
    "ten_best",
]
