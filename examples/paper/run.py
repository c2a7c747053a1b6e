"""Take a pair through sections 3 and 4 of the paper: search, merge, sample, and write its tables and figures.

    python examples/paper/run.py recipes/llama-3.1-8b-slr.yaml --out llama --open-qa coverageqa.json

Every step is kept in the output folder, so the same command resumes, and computes nothing twice.
"""

import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

import click
import tables

import slrmerge as slr
from slrmerge.cli.group import fail
from slrmerge.cli.progress import TerminalProgress
from slrmerge.errors import DataError, OutputError, Problem, ServerError, UnsupportedModelError
from slrmerge.evaluation.questions import parse_questions, read_data
from slrmerge.evaluation.tasks import TASKS
from slrmerge.io.figures import save_figure
from slrmerge.io.files import replace_file
from slrmerge.io.text import to_json
from slrmerge.merging.manifest import read_manifest
from slrmerge.recipe.load import AnyRecipe, load_recipe
from slrmerge.searching.results_folder import read_result
from slrmerge.searching.selection import Selection

EVERY = ("post", "soup", "early", "late", "slr")
REASONING_QUESTIONS, HOT, ANSWERS_AT_ONCE = 100, 1.5, 4  # sections 4.1, 4.3 and 4.4
QUICK = {"questions": 5, "samples": 8, "max_tokens": 64}
VLLM = "vllm serve {model} --served-model-name {name} --port {port} --max-model-len auto"
REQUESTS_AT_ONCE = 256
START_S = 1800  # that a server may take to load a model


class Evaluation(NamedTuple):
    """One of section 4's evaluations: its folder, its task, the data that it needs, its models, its options."""

    name: str
    task: str
    data: str
    models: tuple[str, ...] = tables.COMPARED
    options: Mapping[str, Any] = {}


EVALUATIONS = (
    Evaluation("open-qa", "open-qa", "open_qa", EVERY),
    Evaluation("open-qa-hot", "open-qa", "open_qa", options={"temperature": HOT}),
    Evaluation("open-qa-verbalized", "open-qa", "open_qa", options={"verbalized": ANSWERS_AT_ONCE}),
    *(Evaluation(kind, "creative", kind) for kind in tables.WRITING),
    *(Evaluation(f"{kind}-hot", "creative", kind, options={"temperature": HOT}) for kind in tables.WRITING),
    Evaluation("reasoning", "reasoning", "reasoning", options={"subset": "main"}),
)


class Run(NamedTuple):
    """What the command line says: folder, data by name, options of samples and of scores, how to serve models."""

    out: Path
    data: Mapping[str, str]
    sampling: Mapping[str, Any]
    scoring: Mapping[str, Any]
    quick: bool
    serve: str
    progress: slr.Progress

    def evaluations(self, model: str) -> list[Evaluation]:
        """The evaluations of a model for which there is data."""
        return [each for each in EVALUATIONS if each.data in self.data and model in each.models]

    def evaluate(self, each: Evaluation, models: Mapping[str, str | Path], **more: Any) -> slr.EvaluationResult | None:
        """None where the first model can answer no question, such as one that reads no long prompt, or misses none."""
        options = {**self.sampling, **each.options, **more}
        if each.task == "reasoning":
            options.setdefault("questions", REASONING_QUESTIONS)
        named = {label: models[label] for label in each.models if label in models}
        folder, data = self.out / each.name, self.data[each.data]
        try:
            return slr.evaluate(each.task, data, named, folder, progress=self.progress, **options)
        except (DataError, UnsupportedModelError) as error:
            self.progress.message(f"{each.name} is left out: {error}")
            return None


def search(recipe: AnyRecipe, pair: slr.ModelPair, run: Run) -> slr.SearchResult:
    """The search of the pair, read from the output folder where it is complete."""
    folder = run.out / "search"
    if not folder.exists():
        return slr.search(recipe, folder, quick=run.quick, device=run.scoring["device"], progress=run.progress)
    found = read_result(folder)
    named, known = recipe.as_run(pair, folder), found.choice.base.to_dict()
    if any(named[side] != known[side] for side in ("pretrained", "posttrained")):
        what = f"contains a search of {known['pretrained']} and {known['posttrained']}"
        raise OutputError(Problem("other-pair", str(folder), what, "choose another output folder"))
    return found


def merge(choice: Selection, name: str, pair: slr.ModelPair, run: Run) -> Path:
    """The merge of a selected candidate, written unless the output folder has it."""
    candidate, folder = choice.named()[name], run.out / "models" / name
    recipe = choice.recipe_for(candidate)
    if folder.exists():
        manifest, planned = read_manifest(folder), slr.plan(recipe, pair)
        is_same_pair = all(manifest.sources[side].matches(source) for side, source in pair.items())
        if is_same_pair and to_json(manifest.tensors) == to_json(dict(planned.origins())):
            return folder
    run.progress.message(f"merging {name}: {candidate.label}")
    slr.merge(recipe, folder, pair=pair.download(run.progress), overwrite=True, progress=run.progress)
    return folder


def sample_from_servers(
    models: Mapping[str, str | Path], folders: Mapping[str, str | Path], run: Run
) -> Mapping[str, str]:
    """Request the missing samples of each model from a server of its own, one after the other.

    Returns addresses, under whose names the samples are kept; nothing listens there any more.
    """
    addresses: dict[str, str] = {}
    for label, model in models.items():
        port, name = free_port(), served_name(model)
        addresses[label] = f"{name}@http://127.0.0.1:{port}/v1"
        asked = {key: addresses[key] for key in ("post", label)}

        def request(asked: Mapping[str, str] = asked, label: str = label) -> None:
            for each in run.evaluations(label):
                run.evaluate(each, asked, concurrency=REQUESTS_AT_ONCE)

        try:  # where no sample is missing, no server is needed
            request()
        except ServerError:
            with serving(run, label, model=folders[label], name=name, port=port):
                request()
    return addresses


def served_name(model: str | Path) -> str:
    """A model's name on its server, which identifies its weights: samples are only reused for the same name."""
    from slrmerge.checkpoint.location import parse_place
    from slrmerge.evaluation.local import LocalModel

    local = LocalModel(parse_place(model), device="cpu", batch=1, progress=slr.Progress())
    return re.sub(r"[^\w.-]+", "-", local.model_id)


@contextmanager
def serving(run: Run, label: str, **words: object) -> Iterator[None]:
    """Run the server of a model, which ends with this process also at SIGTERM; its output is in `LABEL.log`."""
    log = run.out / f"{label}.log"
    run.progress.status(f"loading {label} into its server; see {log}")
    command = [word.format(**words) for word in shlex.split(run.serve)]
    earlier = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as server:
        try:
            wait_for(f"http://127.0.0.1:{words['port']}/v1/models", server, log)
            yield
        finally:
            server.terminate()
            signal.signal(signal.SIGTERM, earlier)


def wait_for(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until a server answers, or wants an API key. Raises ServerError where it ends, or takes too long."""
    direct = build_opener(ProxyHandler({}))
    end = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < end:
        try:
            direct.open(url, timeout=10).close()
        except OSError as error:
            if isinstance(error, HTTPError) and error.code in (401, 403):
                return
            time.sleep(0.2)
        else:
            return
    raise ServerError(Problem("server-not-started", str(log), "the server did not start", "read its messages there"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


def report(recipe: AnyRecipe, found: slr.SearchResult, results: tables.Results, paper: tables.Published) -> str:
    """The search's selection, the tables, and what limits them, as Markdown."""
    own = [(f"recipe {row.full_label}", row) for row in found.rows if row.space == "recipe"]
    selected = [
        f"| {name} | {row.full_label} | {row.quality:.4f} | {row.diversity:.4f} |"
        for name, row in chain(found.choice.named().items(), own)
    ]
    notes = [f"- {name}: {note}" for name, result in results.items() for note in result.notes if "\n" not in note]
    parts = [
        f"# {recipe.posttrained}, after sections 3 and 4 of the paper",
        "Cells are mean (sd) over prompts; `tables.csv` has 95% bootstrap intervals, too. "
        + ("Below are the paper's numbers." if paper else "The paper has no numbers for this pair."),
        "## Selection, and figure 2",
        "\n".join(["| | candidate | Q | D (nats) |", "| --- | --- | --- | --- |", *selected]),
        "![Figure 2: the trade-off of quality and diversity](search/tradeoff.png)",
        *(tables.as_markdown(table, results, paper) for table in tables.TABLES),
        "## Figure 3",
        "![Figure 3: writing, open-ended QA, reasoning](figure3.png)",
        *(["## Notes", "\n".join(dict.fromkeys(notes))] if notes else []),
    ]
    return "\n\n".join(parts) + "\n"


def reproduce(recipe: AnyRecipe, run: Run) -> Path:
    """Take all steps; returns the report."""
    for each in run.evaluations("post"):  # its errors come before a search, which may take hours
        read = read_data(run.data[each.data], subset=each.options.get("subset"))
        parse_questions(TASKS[each.task]().question, read.rows)
    pair = recipe.open_pair()
    found = search(recipe, pair, run)
    models: dict[str, str | Path] = {"post": pair.posttrained.reference}
    models |= {name: merge(found.choice, name, pair, run) for name in found.choice.named() if name in EVERY[1:]}
    if run.serve:
        models = dict(
            sample_from_servers(models, {**models, "post": pair.posttrained.download(run.progress).folder}, run)
        )
    results = {}
    for each in run.evaluations("post"):
        if (result := run.evaluate(each, models, **run.scoring)) is not None:
            results[each.name] = result
    paper = tables.published(recipe.posttrained.partition("@")[0])
    save_figure(tables.figure_3(results, paper), run.out / "figure3")
    replace_file(run.out / "tables.csv", tables.as_csv(results, paper).encode())
    replace_file(run.out / "report.md", report(recipe, found, results, paper).encode())
    return run.out / "report.md"


def default_server() -> str:
    """vLLM, where it and a GPU are here."""
    if shutil.which("vllm") is None:
        return ""
    import torch

    return VLLM if torch.cuda.is_available() else ""


@click.command()
@click.argument("recipe", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of everything; the same to resume.")
@click.option("--open-qa", metavar="FILE", help="Questions with their accepted answers: tables 3, 4, 6 and 7.")
@click.option("--joke", metavar="FILE", help="Prompts for jokes: tables 1 and 2.")
@click.option("--poem", metavar="FILE", help="Prompts for poems: tables 1 and 2.")
@click.option("--story", metavar="FILE", help="Prompts for stories: tables 1 and 2.")
@click.option("--reasoning", metavar="FILE|DATASET", help="Questions with a number as answer: table 5.")
@click.option("--judge", metavar="MODEL", help="As of `slrmerge eval`; without it, no quality of writing.")
@click.option("--embeddings", metavar="MODEL", help="As of `slrmerge eval`; without it, no diversity of writing.")
@click.option("--questions", type=click.IntRange(1), help="Questions of each task.  [default: all; reasoning: 100]")
@click.option("--samples", type=click.IntRange(1), help="Samples per question.  [default: as in the paper]")
@click.option("--max-tokens", type=click.IntRange(1), help="Length of an answer.  [default: as in the paper]")
@click.option("--quick", is_flag=True, help="5 questions, 8 samples of 64 tokens, and a quick search, unless given.")
@click.option("--device", default="cpu", show_default=True, help="Of the search, and of models in this process.")
@click.option(
    "--serve", metavar="COMMAND", help="Serves a {model} as {name} at {port}; empty: in this process.  [default: vLLM]"
)
def main(recipe: Path, out: Path, *, quick: bool, device: str, serve: str | None, **given: Any) -> None:
    """Search RECIPE's pair, merge what it selects, and write the paper's tables and figures for it."""
    named = {key: value for key, value in given.items() if value is not None}
    sampling = {**(QUICK if quick else {}), **{key: named[key] for key in QUICK if key in named}}
    if sampling.get("samples", 0) % ANSWERS_AT_ONCE:
        raise click.BadParameter(f"must be a multiple of {ANSWERS_AT_ONCE}", param_hint="--samples")
    data = {each.data: named[each.data] for each in EVALUATIONS if each.data in named}
    if not data:
        raise click.UsageError("name the data of at least one task, such as --open-qa FILE")
    scoring = {key: named[key] for key in ("judge", "embeddings") if key in named} | {"device": device}
    with TerminalProgress(quiet=False) as progress:
        try:
            command = default_server() if serve is None else serve
            written = reproduce(load_recipe(recipe), Run(out, data, sampling, scoring, quick, command, progress))
        except slr.SlrmergeError as error:
            fail(error, as_json=False)
    click.echo(f"report: {written}")


if __name__ == "__main__":
    main()
