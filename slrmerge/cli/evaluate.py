"""The command that compares models: eval."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slrmerge.cli.group import Command
from slrmerge.cli.options import grouped_option, json_option, options_from, out_option, quiet_option
from slrmerge.cli.output import Table, echo, print_json
from slrmerge.evaluation.options import EvaluationOptions

if TYPE_CHECKING:
    from slrmerge.evaluation.result import EvaluationResult

_TASKS = ("open-qa", "creative", "reasoning")  # evaluation.tasks.TASKS, without importing it


@click.command("eval", cls=Command)
@click.argument("task", type=click.Choice(_TASKS), metavar="TASK")
@out_option("samples and results", required=True)
@grouped_option(
    "--data",
    group="Questions",
    required=True,
    metavar="FILE|DATASET",
    help="Questions: .json, .jsonl, .csv, .txt with one prompt per line, or a dataset on the Hub.",
)
@grouped_option(
    "--model",
    "models",
    group="Answers",
    required=True,
    multiple=True,
    metavar="LABEL=MODEL",
    help="A folder, a repository, MODEL@URL of an OpenAI-compatible server, or a .jsonl file of generations. Others are"
    " compared with the first.",
)
@options_from(EvaluationOptions)
@json_option
@quiet_option
def evaluate(
    task: str, data: str, models: tuple[str, ...], out: Path, *, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Compare the diversity and quality of models' answers.

    TASK is open-qa (questions and their accepted answers), creative (requests for poems, stories, jokes) or reasoning
    (questions whose answer is a number). Killed at any moment, the same command resumes and requests no sample twice.

    \b
    slrmerge eval open-qa --data coverageqa.json --out ./eval \\
        --model post=./post --model slr=./hybrid
    slrmerge eval reasoning --data openai/gsm8k --subset main --out ./gsm8k \\
        --model post=http://localhost:8000/v1 \\
        --model slr=http://localhost:8001/v1
    """
    chosen = EvaluationOptions(**options)
    from slrmerge.cli.progress import TerminalProgress
    from slrmerge.io.threads import require_thread

    require_thread()
    with TerminalProgress(quiet=quiet or as_json) as progress:
        progress.status("loading the questions")
        from slrmerge.evaluation.run import Evaluation

        result = Evaluation(task, data, models, chosen, progress=progress).run(out)
    if as_json or not quiet:
        _print_result(result, out, as_json=as_json)


def _print_result(result: "EvaluationResult", out: Path, *, as_json: bool) -> None:
    """The table as in the paper, its notes, and the page of samples."""
    from slrmerge.evaluation.output import MARKDOWN, PAGE, summary

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
