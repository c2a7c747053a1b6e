"""The command that measures models: eval."""

from pathlib import Path

import click

from slrmerge.cli.options import PathArgument, a_number, json_option, options, quiet_option

_TASKS = ("open-qa", "creative", "reasoning")


_count = click.IntRange(min=1)

_data_options = options(
    click.option(
        "--data",
        required=True,
        metavar="FILE|DATASET",
        help="The questions: .json, .jsonl, .csv, .txt with a prompt a line, or a dataset on the Hub.",
    ),
    click.option("--subset", help="Of a dataset on the Hub: which of its subsets."),
    click.option("--split", default="test", show_default=True, help="Of a dataset on the Hub: which split."),
    click.option("--questions", type=_count, help="Ask only so many, drawn by --seed.  [default: all]"),
)

_sampling_options = options(
    click.option("--samples", type=_count, help="For each question.  [default: as in the paper: 128, 32, 64]"),
    click.option("--max-tokens", type=_count, help="Length of an answer.  [default: as in the paper: 64, 4096, 4096]"),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        callback=a_number,
        default=1.0,
        show_default=True,
        help="0 is greedy decoding.",
    ),
    click.option(
        "--min-p",
        type=click.FloatRange(0, 1),
        callback=a_number,
        default=0.1,
        show_default=True,
        help="Keep tokens at least so probable, relative to the most probable one; 0 for servers that do not know it.",
    ),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all chance there is."),
    click.option("--verbalized", type=click.IntRange(min=2), metavar="K", help="Ask for K answers in one call."),
)

_machine_options = options(
    click.option(
        "--concurrency",
        type=click.IntRange(1, 1000),
        default=16,
        show_default=True,
        help="How many questions a server has at a time.",
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        callback=a_number,
        default=600,
        show_default=True,
        help="Seconds that a server has for an answer.",
    ),
    click.option("--batch", type=_count, default=32, show_default=True, help="Samples at a time in this process."),
    click.option(
        "--device",
        default="cpu",
        show_default=True,
        help="Where models in this process compute; cuda has not been tried yet.",
    ),
)


@click.command("eval")
@click.argument("task", type=click.Choice(_TASKS))
@_data_options
@click.option(
    "--model",
    "models",
    required=True,
    multiple=True,
    metavar="LABEL=MODEL",
    help="A folder, a repository, or MODEL@URL of an OpenAI-compatible server; the others are held against the first.",
)
@click.option("--out", required=True, type=PathArgument(), help="The folder for samples and results.")
@_sampling_options
@click.option(
    "--judge", metavar="MODEL", help="Maps answers (open-qa) and gives points (creative); written as a model is."
)
@click.option(
    "--embeddings", metavar="MODEL", help="For diversity (creative): a sentence-transformers model, or MODEL@URL."
)
@_machine_options
@json_option
@quiet_option
@click.pass_context
def evaluate(
    ctx: click.Context,
    task: str,
    data: str,
    subset: str | None,
    split: str,
    questions: int | None,
    models: tuple[str, ...],
    out: Path,
    *,
    samples: int | None,
    max_tokens: int | None,
    temperature: float,
    min_p: float,
    seed: int,
    verbalized: int | None,
    judge: str | None,
    embeddings: str | None,
    concurrency: int,
    timeout: float,
    batch: int,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure models side by side.

    Do they say more, and still say it right? TASK is open-qa (a question and its accepted answers), creative (requests
    for poems, stories, jokes) or reasoning (questions that end in a number). Killed at any moment, the same command
    goes on and asks nothing again.

    \b
    slrmerge eval open-qa --data coverageqa.json --model post=./post --model slr=./hybrid --out ./eval
    slrmerge eval reasoning --data openai/gsm8k --subset main --questions 100 --out ./gsm8k \\
        --model post=http://localhost:8000/v1 --model slr=http://localhost:8001/v1
    """
    ctx.obj["as_json"] = as_json
    from slrmerge.cli import show_evaluation
    from slrmerge.cli.progress import TerminalProgress
    from slrmerge.evaluate.models import Served, parse_model
    from slrmerge.evaluate.options import EvaluationOptions
    from slrmerge.evaluate.run import Evaluation
    from slrmerge.evaluate.tasks import TASKS

    named = [parse_model(written) for written in models]
    labels = [model.label for model in named]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise click.UsageError(f"two models are called {twice[0]}; write LABEL=MODEL", ctx)
    if not all(isinstance(model.at, Served) for model in named):
        from slrmerge.devices import device_problem

        if problem := device_problem(device):
            raise click.UsageError(f"--device {device} cannot be used: {problem}", ctx)
    if verbalized and (samples or TASKS[task].samples) % verbalized:
        raise click.UsageError(f"--samples is not a multiple of --verbalized {verbalized}", ctx)
    chosen = EvaluationOptions(
        task=task,
        data=data,
        subset=subset,
        split=split,
        questions=questions,
        samples=samples,
        max_tokens=max_tokens,
        temperature=temperature,
        min_p=min_p,
        seed=seed,
        verbalized=verbalized,
        judge=judge,
        embeddings=embeddings,
        concurrency=concurrency,
        timeout_s=timeout,
        batch=batch,
        device=device,
    )
    with TerminalProgress(quiet=quiet or as_json) as progress:
        report = Evaluation(named, chosen, progress=progress).run(out)
    if as_json or not quiet:
        show_evaluation.print_report(report, out, as_json=as_json)
