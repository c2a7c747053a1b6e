"""An evaluation on the terminal: the table, its notes, and the page of samples."""

from pathlib import Path
from typing import TYPE_CHECKING

from slrmerge.cli.output import Table, echo, print_json
from slrmerge.evaluation.output import MARKDOWN, PAGE, summary

if TYPE_CHECKING:
    from slrmerge.evaluation.result import EvaluationResult


def print_result(result: "EvaluationResult", out: Path, *, as_json: bool) -> None:
    """The table as in the paper, its notes, and the page of samples."""
    if as_json:
        return print_json({"out": str(out), **summary(result)})
    header, *rows = result.table_rows()
    shown = Table(*header)
    for row in rows:
        shown.add_row(*row)
    shown.print()
    echo(result.caption)
    for metric in result.shown:
        echo(f"{metric.name}: {metric.meaning}")
    for note in result.notes:
        first, _, more = note.partition("\n")
        echo(f"note: {first}" + (f" see {out / MARKDOWN}" if more else ""))
    echo(f"samples: {out / PAGE}")
    return None
