"""Select again from the results of a search, without the models."""

import os
from dataclasses import replace
from pathlib import Path

from slrmerge.errors import require_extra
from slrmerge.io.files import as_path
from slrmerge.io.lock import lock
from slrmerge.io.pieces import translate_os_errors
from slrmerge.merging.finding import SUMMARY_NAME
from slrmerge.searching.held_out import look_again, reselect
from slrmerge.searching.options import MIN_QUALITY, SearchOptions
from slrmerge.searching.prompt_scores import read_prompts
from slrmerge.searching.results import SearchResult
from slrmerge.searching.results_folder import read_result, write_result
from slrmerge.searching.selection import mark_feasible, select_from


def select(folder: str | os.PathLike[str], *, min_quality: float = MIN_QUALITY) -> SearchResult:
    """Select again from the results of a search in `folder`, with another minimum quality (a share, 0 to 1).

    Replaces the recipes, summary, figures and report there. Raises OutputError for missing or damaged results,
    BusyError where another process writes to the folder, OptionError for a `min_quality` out of range.
    """
    require_extra("search", "matplotlib", "plotly", "jinja2")
    SearchOptions(min_quality=min_quality)  # raises for what is out of range
    folder = as_path("folder", folder)
    read_result(folder)  # raises before anything is locked
    with translate_os_errors(folder), lock(folder / SUMMARY_NAME):
        return _select(folder, min_quality)


def _select(folder: Path, min_quality: float) -> SearchResult:
    result = read_result(folder)
    rows = tuple(mark_feasible(result.rows, post_quality=result.post_quality, min_quality=min_quality))
    choice = select_from(rows, base=result.choice.base, min_quality=min_quality)
    kept = read_prompts(folder, [row.label for row in rows])
    selected = replace(
        result,
        rows=rows,
        choice=choice,
        held_out=look_again(choice, kept and kept.held_out),
        reselected=reselect(rows, kept.asked, min_quality=min_quality) if kept else {},
    )
    write_result(folder, selected)
    return selected
