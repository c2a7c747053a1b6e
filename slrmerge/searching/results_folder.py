"""The folder of a search's result: table, values of each prompt, summary, recipes, figures and report."""

import csv
import os
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import from_json

from slrmerge.errors import OutputError, Problem, RecipeError
from slrmerge.io.files import as_path, read_file, replace_file
from slrmerge.io.lock import lock_file
from slrmerge.io.pieces import translate_os_errors
from slrmerge.io.strict_yaml import write_yaml
from slrmerge.io.text import from_csv, printable, to_csv, to_json
from slrmerge.merging.finding import SUMMARY_NAME, SearchSummary
from slrmerge.recipe.model import Recipe
from slrmerge.searching.prompt_scores import PROMPTS
from slrmerge.searching.results import SearchResult, kept_in_summary
from slrmerge.searching.selection import ScoredCandidate, select_from

TABLE = "results.csv"
RECIPES = {"slr": "slr.yaml", "soup": "soup.yaml", "early": "early.yaml", "late": "late.yaml"}
_MAX_BYTES = 1 << 28

FIGURES = ("tradeoff.png", "tradeoff.svg", "heatmaps.png", "heatmaps.svg", "report.html")
"""What `draw_result` writes."""


def write_result(folder: Path, result: SearchResult) -> None:
    """Write the table, the recipes, the figures, the report and, last, the summary. Raises OutputError.

    Recipes are written as seen from the folder that the pair's recipe (`choice.base`) was loaded from.
    """
    from slrmerge.searching.plots import draw_result

    files = {TABLE: _table(result)}
    named = result.choice.named()
    files |= {file: _recipe(result, name, named[name]) for name, file in RECIPES.items() if name in named}
    summary = result.summary()
    with translate_os_errors(folder):
        for file, text in files.items():
            replace_file(folder / file, text.encode())
        for file in set(RECIPES.values()) - files.keys():
            (folder / file).unlink(missing_ok=True)
        draw_result(folder, result.rows, result.choice, summary)
        content = summary.model_dump(mode="json", exclude_defaults=True)
        replace_file(folder / SUMMARY_NAME, to_json(content, indent=2).encode() + b"\n")


def read_result(folder: str | os.PathLike[str]) -> SearchResult:
    """Read a search's folder, with its selection as it was. Raises OutputError where it is missing or damaged."""
    folder = as_path("folder", folder)
    try:
        raw, table = (read_file(folder / name, _MAX_BYTES) for name in (SUMMARY_NAME, TABLE))
    except OSError as error:
        what, remedy = "does not contain the results of a search", "name the folder that a search wrote"
        raise OutputError(Problem("no-results", str(folder), what, remedy)) from error
    damaged = OutputError(
        Problem("results-damaged", str(folder), "contains damaged results of a search", "search again")
    )
    try:
        summary = SearchSummary.from_json(raw)
        lines = csv.DictReader(StringIO(table.decode(), newline=""))
        rows = tuple(map(_candidate, lines))
        sides = {"pretrained": summary.pretrained, "posttrained": summary.posttrained}
        base = Recipe(**sides, dtype=summary.dtype, vocabulary=summary.vocabulary)
    except (ValueError, csv.Error, RecipeError) as error:
        raise damaged from error
    parents = [row.space for row in rows if row.exact and row.space in ("post", "pre")]
    conditions = {row.conditions for row in rows}
    if parents != [name for name in ("post", "pre") if name in summary.selected]:
        raise damaged
    if summary.held_out is not None and "post" not in summary.held_out.scores:
        raise damaged
    if "post" not in parents or not conditions <= summary.post_quality.keys():
        raise damaged
    choice = select_from(rows, base=base.loaded_from(folder / RECIPES["slr"]), min_quality=summary.min_quality)
    return SearchResult(rows=rows, choice=choice, **kept_in_summary(summary))


def why_not_results(folder: Path) -> str | None:
    """Why a folder is not exactly the results of a search, which is all that a search replaces; None where it is."""
    names = {path.name for path in folder.iterdir()}
    if SUMMARY_NAME not in names or TABLE not in names:
        return "does not contain the results of a search"
    known = {SUMMARY_NAME, TABLE, PROMPTS, *RECIPES.values(), *FIGURES, lock_file(folder / SUMMARY_NAME).name}
    others = sorted({name.removesuffix(".new") for name in names} - known)
    return f"contains more than the results of a search ({', '.join(others)})" if others else None


def _table(result: SearchResult) -> str:
    rows = result.to_rows()
    values = ([str(value).lower() if isinstance(value, bool) else value for value in row.values()] for row in rows)
    return to_csv(list(rows[0]), values)


_CANDIDATE = TypeAdapter(ScoredCandidate)


def _candidate(line: dict[str, str]) -> ScoredCandidate:
    """A line of the table. Raises ValueError."""
    if line.keys() != {field.name for field in fields(ScoredCandidate)}:
        raise ValueError("other columns")
    cells: dict[str, Any] = {name: from_csv(cell) for name, cell in line.items() if cell}
    cells |= {name: from_json(cells[name]) for name in ("also_named", "rules") if name in cells}
    return _CANDIDATE.validate_python(cells)


_WHY = {
    "slr": "the interval with the highest diversity and at least {ratio:g} of the post-trained model's quality",
    "soup": "the soup with the highest diversity and at least {ratio:g} of the post-trained model's quality",
    "early": "a control: as many layers as slr.yaml, the first ones",
    "late": "a control: as many layers as slr.yaml, the last ones",
}


def _recipe(result: SearchResult, name: str, row: ScoredCandidate) -> str:
    post, how = result.choice.post, printable(f"{result.task}, {row.conditions}")
    return (
        f"# {printable(row.label)}: {_WHY[name].format(ratio=result.choice.min_quality)}.\n"
        f"# Selected by `slrmerge search` ({how}) from {len(result.rows)} candidates:\n"
        f"# Q {row.quality:.4f}, D {row.diversity:.4f} nats; the post-trained model: Q {post.quality:.4f}, "
        f"D {post.diversity:.4f}.\n" + write_yaml(result.choice.recipe_for(row).to_dict())
    )
