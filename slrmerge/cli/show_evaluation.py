"""An evaluation on the terminal: the table, what to know of it, where to read on."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from slrmerge.cli.show import print_json, print_table, table
from slrmerge.evaluate.report import caption, table_rows
from slrmerge.evaluate.results import PAGE, summary

if TYPE_CHECKING:
    from slrmerge.evaluate.report import Report


def print_report(report: "Report", out: Path, *, as_json: bool) -> None:
    """The table as in the paper, its notes, and the page of samples."""
    if as_json:
        return print_json({"out": str(out), **summary(report)})
    header, *rows = table_rows(report)
    shown = table(*header)
    for row in rows:
        shown.add_row(*row)
    print_table(shown)
    click.echo(caption(report))
    for metric in report.shown:
        click.echo(f"{metric.name}: {metric.meaning}")
    for note in report.notes:
        click.echo(f"note: {note}")
    click.echo(f"read what they said: {out / PAGE}")
    return None
