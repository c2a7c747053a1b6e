"""The files that an evaluation writes beside the samples: tables, chart, page, summary."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from io import StringIO
from math import isnan
from pathlib import Path
from typing import Any

from slrmerge._version import __version__
from slrmerge.errors import OutputError, Problem
from slrmerge.evaluation import charts
from slrmerge.evaluation.page import page
from slrmerge.evaluation.result import Cell, EvaluationResult
from slrmerge.io import files
from slrmerge.io.figures import save_figure

SUMMARY, TABLE, MARKDOWN, PROMPTS = "evaluation.json", "results.csv", "results.md", "prompts.csv"
PAGE, CHART = "samples.html", "metrics"


def claim(folder: Path, task: str) -> None:
    """Create the folder of an evaluation of this task, or accept an existing one. Raises OutputError for any other."""
    files.create_folder(folder, durable=False)
    mark, remedy = folder / SUMMARY, "choose another output folder"
    if mark.exists():
        try:
            found = json.loads(mark.read_bytes())["task"]
        except (ValueError, LookupError, TypeError) as error:
            what = "is not the summary of an evaluation"
            raise OutputError(Problem("not-an-evaluation", str(mark), what, remedy)) from error
        if found != task:
            raise OutputError(Problem("other-task", str(folder), f"contains an evaluation of {found}", remedy))
    elif {path.name for path in folder.iterdir()} - {f"{SUMMARY}.new"}:
        what = "is neither empty nor the folder of an evaluation"
        raise OutputError(Problem("not-an-evaluation", str(folder), what, remedy))
    else:
        files.replace_file(mark, _json({"slrmerge": __version__, "task": task}))


def write_results(folder: Path, result: EvaluationResult) -> None:
    """Write tables, chart and page, then the summary; each file is replaced atomically."""
    contents = {
        TABLE: as_csv(result),
        MARKDOWN: as_markdown(result),
        PROMPTS: prompts_as_csv(result),
        PAGE: page(result),
    }
    for name, content in contents.items():
        files.replace_file(folder / name, content.encode("utf-8", "replace"))
    save_figure(charts.draw(result), folder / CHART)
    files.replace_file(folder / SUMMARY, _json(summary(result)))


def summary(result: EvaluationResult) -> dict[str, Any]:
    """The result as plain values, for `evaluation.json` and `--json`; None where undefined."""
    return {
        "slrmerge": __version__,
        "task": result.task,
        "models": dict(result.models),
        "prompts": result.prompts,
        "settings": dict(result.settings),
        "metrics": {metric.name: metric.meaning for metric in result.metrics},
        "results": [
            {name: None if isinstance(value, float) and isnan(value) else value for name, value in asdict(cell).items()}
            for cell in result.cells
        ],
        "notes": list(result.notes),
    }


def as_markdown(result: EvaluationResult) -> str:
    """Caption, table, definitions of the metrics, and notes."""
    header, *rows = result.table_rows()
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    lines += [f"| {' | '.join(cell.replace(chr(10), '<br>') for cell in row)} |" for row in rows]
    meanings = [f"- **{metric.name}**: {metric.meaning}" for metric in result.shown]
    notes = [f"- {note.replace(chr(10), chr(10) + '  ')}" for note in result.notes]
    parts = [result.caption, "\n".join(lines), "\n".join(meanings), *(["\n".join(notes)] if notes else [])]
    return "\n\n".join(parts) + "\n"


def as_csv(result: EvaluationResult) -> str:
    """A line for each model and metric; empty where undefined."""
    names = [field.name for field in fields(Cell)]
    return _csv(names, ([getattr(cell, name) for name in names] for cell in result.cells))


def prompts_as_csv(result: EvaluationResult) -> str:
    """A line for each prompt and model, with every metric."""
    metrics = [metric.name for metric in result.metrics]
    return _csv(
        ["prompt", "model", *metrics, "text"],
        (
            [each.question.id, each.model, *(score.metrics[name] for name in metrics), each.question.text]
            for each, score in zip(result.responses, result.scores, strict=True)
        ),
    )


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(["" if isinstance(value, float) and isnan(value) else value for value in row])
    return text.getvalue()


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
