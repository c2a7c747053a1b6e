"""Choose again from the results of a search, without the models."""

from dataclasses import replace
from pathlib import Path

from slrmerge.errors import require_extra
from slrmerge.plots import draw_report
from slrmerge.search.choose import choose, judge
from slrmerge.search.results import Report, read_report, write_report
from slrmerge.writer import os_errors_at


def select(folder: Path, *, min_quality: float) -> Report:
    """Choose again from a search's results, by another share of quality, and renew its recipes, summary and pictures.

    Raises OutputError where `folder` does not hold a search's results.
    """
    require_extra("search", "matplotlib")
    report = read_report(folder)
    rows = tuple(judge(report.rows, post_quality=report.post_quality, min_quality=min_quality))
    again = replace(report, rows=rows, choice=choose(rows, min_quality=min_quality))
    with os_errors_at(folder):
        write_report(folder, again)
        draw_report(folder, again)
    return again
