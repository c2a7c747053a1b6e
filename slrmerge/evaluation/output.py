"""The files that an evaluation writes beside the samples: tables, chart, page, summary."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from math import isnan
from pathlib import Path
from typing import Any

from slrmerge._version import __version__
from slrmerge.errors import OutputError, Problem
from slrmerge.evaluation import charts
from slrmerge.evaluation.generations import noveltybench_folder, write_generations
from slrmerge.evaluation.page import page
from slrmerge.evaluation.result import Cell, EvaluationResult
from slrmerge.io import files
from slrmerge.io.figures import save_figure
from slrmerge.io.strict_json import parse_json
from slrmerge.io.text import IN_PROSE, markdown, printable, to_csv, to_json

SUMMARY, TABLE, MARKDOWN, PROMPTS = "evaluation.json", "results.csv", "results.md", "prompts.csv"
PAGE, CHART = "samples.html", "metrics"

MAX_SUMMARY_BYTES = 1 << 24


def claim(folder: Path, task: str) -> None:
    """Create the folder of an evaluation of this task, or accept an existing one. Raises OutputError for any other."""
    files.create_folder(folder, durable=False)
    mark, remedy = folder / SUMMARY, "choose another output folder"
    if mark.exists():
        try:
            found = parse_json(files.read_file(mark, MAX_SUMMARY_BYTES))["task"]
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


def require_no_links(folder: Path) -> None:
    """Raise OutputError where a folder of `--export` is a link or contains one, through which others' files change."""
    for link in filter(Path.is_symlink, (folder, *folder.rglob("*"))):
        what = "is a link, and would be written through"
        raise OutputError(Problem("not-a-folder", str(link), what, "remove it, or choose another output folder"))


def write_results(folder: Path, result: EvaluationResult) -> None:
    """Write tables, chart and page, then the summary; each file is replaced atomically."""
    chart = save_figure(charts.draw(result), folder / CHART)
    contents = {
        TABLE: as_csv(result),
        MARKDOWN: printable(as_markdown(result), keep=IN_PROSE),
        PROMPTS: prompts_as_csv(result),
        PAGE: page(result, chart),
    }
    for name, content in contents.items():
        files.replace_file(folder / name, content.encode())
    files.replace_file(folder / SUMMARY, _json(summary(result)))


def write_noveltybench(folder: Path, result: EvaluationResult) -> None:
    """Write `noveltybench/LABEL/generations.jsonl` for each model: what NoveltyBench's `partition.py` reads."""
    for label, model_id in result.models.items():
        responses = (responses for responses, _ in result.of(label))
        write_generations(noveltybench_folder(folder, label), model_id, responses)


def summary(result: EvaluationResult) -> dict[str, Any]:
    """The result as plain values, for `evaluation.json` and `--json`; None where undefined."""
    return {
        "slrmerge": __version__,
        "task": result.task,
        "models": dict(result.models),
        "prompts": result.prompts,
        "settings": dict(result.settings),
        "metrics": {metric.name: metric.meaning for metric in result.metrics},
        "results": [{name: _defined(value) for name, value in asdict(cell).items()} for cell in result.cells],
        "notes": list(result.notes),
    }


def as_markdown(result: EvaluationResult) -> str:
    """Caption, table, definitions of the metrics, and notes."""
    header, *rows = result.table_rows()
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    lines += [f"| {' | '.join('<br>'.join(map(markdown, cell.split(chr(10)))) for cell in row)} |" for row in rows]
    meanings = [f"- **{metric.name}**: {metric.meaning}" for metric in result.shown]
    notes = [f"- {(chr(10) + '  ').join(map(markdown, note.split(chr(10))))}" for note in result.notes]
    parts = [markdown(result.caption), "\n".join(lines), "\n".join(meanings), *(["\n".join(notes)] if notes else [])]
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
    return to_csv(header, (list(map(_defined, row)) for row in rows))


def _defined(value: object) -> object:
    """None, which is empty in a CSV, for a metric without a value."""
    return None if isinstance(value, float) and isnan(value) else value


def _json(value: Mapping[str, Any]) -> bytes:
    return to_json(value, indent=2).encode() + b"\n"
