"""What an evaluation leaves in its folder beside the samples: table, picture, page, summary."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import Any

import slrmerge
from slrmerge import files
from slrmerge.errors import OutputError, Problem
from slrmerge.evaluate import charts
from slrmerge.evaluate.page import page
from slrmerge.evaluate.report import Report, as_csv, as_markdown, prompts_as_csv
from slrmerge.plots import save

SUMMARY, TABLE, MARKDOWN, PROMPTS = "evaluation.json", "results.csv", "results.md", "prompts.csv"
PAGE, PICTURE = "samples.html", "metrics"


def claim(folder: Path, task: str) -> None:
    """Make sure that `folder` is, or becomes, the folder of an evaluation of this task. Raises OutputError."""
    files.create_folder(folder, fsync=False)
    mark = folder / SUMMARY
    if mark.exists():
        try:
            found = json.loads(mark.read_bytes())["task"]
        except (ValueError, LookupError, TypeError) as error:
            raise OutputError(Problem(str(mark), "is not an evaluation's", "choose another --out")) from error
        if found != task:
            raise OutputError(Problem(str(folder), f"holds an evaluation of {found}", "choose another --out"))
    elif {path.name for path in folder.iterdir()} - {f"{SUMMARY}.new"}:
        raise OutputError(Problem(str(folder), "holds something else than an evaluation", "choose another --out"))
    else:
        files.replace_file(mark, _json({"slrmerge": slrmerge.__version__, "task": task}))


def write_results(folder: Path, report: Report) -> None:
    """Table, picture and page, the summary last; each file is whole or the old one."""
    contents = {
        TABLE: as_csv(report),
        MARKDOWN: as_markdown(report),
        PROMPTS: prompts_as_csv(report),
        PAGE: page(report),
    }
    for name, content in contents.items():
        files.replace_file(folder / name, content.encode("utf-8", "replace"))
    save(charts.draw(report), folder / PICTURE)
    files.replace_file(folder / SUMMARY, _json(summary(report)))


def summary(report: Report) -> dict[str, Any]:
    """The outcome as plain values, for `evaluation.json` and `--json`; None where something is not defined."""
    return {
        "slrmerge": slrmerge.__version__,
        "task": report.task,
        "models": dict(report.models),
        "prompts": report.prompts,
        "settings": dict(report.settings),
        "metrics": {metric.name: metric.meaning for metric in report.metrics},
        "results": [
            {name: None if isinstance(value, float) and isnan(value) else value for name, value in asdict(cell).items()}
            for cell in report.cells
        ],
        "notes": list(report.notes),
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
