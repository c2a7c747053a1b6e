"""File operations of commands × kill, Ctrl-C, full disk, read or write error, refused access, on four systems.

The target is absent, as before, or complete and right, never a mixture; the next run completes with the same bytes.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.adapters import Q, lora_tensors, write_adapter
from tests.checkpoints import llama_tensors, write_checkpoint
from tests.conftest import mounted
from tests.evaluation.openai_server import OpenAIServer
from tests.gguf_files import write_gguf
from tests.merging.faults import OLD, leftovers, snapshot
from tests.searching.pairs import make_pair
from tests.slow.faults import FAULTS, Job, Runner

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults"), pytest.mark.timeout(300)]

EVERY = "default"
"""The file system on which every operation of a merge is tried."""

PER_FAULT = 3
"""Operations of each kind of fault that are tried elsewhere, and of other jobs twice as many on `EVERY`."""

ELSEWHERE = ("merge", "overwrite", "gguf")
"""The jobs that are also tried elsewhere: those for which file systems differ, by what they clone and exchange."""


def merge_job(folder: Path, *more: str, before: dict[str, bytes] | None = None, **rules: object) -> Job:
    write_checkpoint(folder / "pre", llama_tensors("pre"))
    write_checkpoint(folder / "post", llama_tensors("post"), shards=2)
    sources = {"pretrained": "./pre", "posttrained": "./post", "max_shard_size": "2KB"}
    return recipe_job(folder, {**sources, **rules}, *more, before=before)


def adapter_job(folder: Path, server: OpenAIServer) -> Job:
    base = llama_tensors("base")
    write_checkpoint(folder / "base", base, shards=2)
    factors = lora_tensors(base, [f"model.layers.{layer}.{Q}" for layer in range(6)])
    write_adapter(folder / "lora", factors, base_model_name_or_path=f"{folder}/base")
    return recipe_job(folder, {"posttrained": "./lora", "restore": [2, 3]})


def gguf_job(folder: Path, server: OpenAIServer) -> Job:
    write_gguf(folder / "pre.gguf", "pre")
    write_gguf(folder / "post" / "post.gguf", "post", parts=2)
    return recipe_job(folder, {"pretrained": "./pre.gguf", "posttrained": "./post", "restore": [1, 2]})


def recipe_job(folder: Path, recipe: object, *more: str, before: dict[str, bytes] | None = None) -> Job:
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    out = folder / "work" / "hybrid"
    out.parent.mkdir()
    command = ["merge", f"{folder}/recipe.yaml", "--out", f"{out}", "--threads", "1", *more]
    return Job(command, out, before or {})


def search_job(folder: Path, server: OpenAIServer) -> Job:
    make_pair(folder, layers=2)
    (folder / "pair.yaml").write_text("pretrained: ./pre\nposttrained: ./post\n")
    out = folder / "work" / "search"
    out.parent.mkdir()
    command = ["search", f"{folder}/pair.yaml", "--out", f"{out}", "--threads", "1", "--overwrite"]
    before = {"summary.json": b"{}", "results.csv": b"old", "soup.yaml": b"old"}
    return Job(command, out, before, normalised=without_elapsed_time, hurried=True)


def without_elapsed_time(files: dict[str, bytes]) -> dict[str, bytes]:
    summary = json.loads(files["summary.json"])
    summary.pop("elapsed_s", None)
    return {**files, "summary.json": json.dumps(summary).encode()}


def evaluation_job(folder: Path, server: OpenAIServer) -> Job:
    (folder / "questions.json").write_text(json.dumps({"One?": ["1"], "Two?": ["2"]}))
    out = folder / "work" / "eval"
    out.parent.mkdir()
    models = [f"--model={label}=m@{server.url}" for label in ("a", "b")]
    command = ["eval", "open-qa", "--data", f"{folder}/questions.json", "--out", f"{out}", *models, "--samples", "2"]
    jsonl = ("samples.jsonl", "greedy.jsonl", "judge.jsonl")
    return Job([*command, "--concurrency", "1"], out, hurried=True, in_place=True, grows=jsonl)


JOBS: dict[str, Callable[[Path, OpenAIServer], Job]] = {
    "merge": lambda folder, _: merge_job(folder, restore=[2, 3]),
    "soup": lambda folder, _: merge_job(folder, alpha=0.5),
    "overwrite": lambda folder, _: merge_job(folder, "--overwrite", before=OLD, restore=[2, 3]),
    "adapter": adapter_job,
    "gguf": gguf_job,
    "search": search_job,
    "eval": evaluation_job,
}


class Trial(NamedTuple):
    """A job and its runner, what it writes undisturbed, and the operations that it does."""

    name: str
    job: Job
    runner: Runner
    expected: dict[str, bytes]
    operations: list[str]


@pytest.fixture(scope="module")
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer("m") as made:
        yield made


SYSTEMS = (EVERY, "xfs", "btrfs", "tmpfs")
CASES = [(system, job) for system in SYSTEMS for job in JOBS if system == EVERY or job in ELSEWHERE]


@pytest.fixture(scope="module")
def system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A file system by name, and a folder on it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == EVERY:
        yield EVERY, folder
        return
    with mounted(request.param, folder / "root", "400M") as root:
        yield request.param, root


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Runner]]:
    """A runner for jobs that are hurried and one for the others, on all file systems: their imports take long."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for the injector")
    with ExitStack() as stack:
        yield {
            hurried: stack.enter_context(Runner(tmp_path_factory.mktemp("runner"), hurried=hurried))
            for hurried in (False, True)
        }


@pytest.fixture(scope="module")
def trial(
    request: pytest.FixtureRequest, system: tuple[str, Path], server: OpenAIServer, runners: dict[bool, Runner]
) -> Trial:
    folder = system[1] / request.param
    folder.mkdir()
    job = JOBS[request.param](folder, server)
    runner = runners[job.hurried]
    job.reset()
    outcome = runner.run(job)
    assert outcome.exit_code == 0, outcome.stderr
    expected = job.written()
    assert expected
    return Trial(request.param, job, runner, expected, outcome.operations)


def chosen(trial: Trial, fault: str, system: str) -> list[int]:
    """The numbers of the operations to try, spread evenly over those that the fault can happen to."""
    operations = enumerate((line.partition(" ")[0] for line in trial.operations), 1)
    numbers = [number for number, operation in operations if FAULTS[fault].happens_to(operation)]
    if system == EVERY and trial.name == "merge":
        return numbers
    limit = min(len(numbers), 2 * PER_FAULT if system == EVERY else PER_FAULT)
    return [numbers[k * len(numbers) // limit] for k in range(limit)]


@pytest.mark.parametrize(("system", "trial"), CASES, indirect=True)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_command_with_a_fault_at_any_file_operation_leaves_its_target_whole_and_then_completes(
    trial: Trial, fault: str, system: tuple[str, Path], record_property: Callable[[str, object], None]
) -> None:
    numbers = chosen(trial, fault, system[0])
    assert numbers
    record_property("runs", len(numbers))
    violations = {}
    for number in numbers:
        if found := list(violations_at(trial, fault, number)):
            violations[f"{number}: {trial.operations[number - 1]}"] = found
    assert not violations, json.dumps(violations, indent=1)


def violations_at(trial: Trial, fault: str, number: int) -> Iterator[str]:
    """What should not be after a run with a fault at an operation, and after the run that follows it."""
    job, runner = trial.job, trial.runner
    job.reset()
    outcome = runner.run(job, fault=fault, at=number)
    if outcome.exit_code not in FAULTS[fault].exit_codes:
        yield f"exit code {outcome.exit_code}: {outcome.stderr[-1500:]}"
    if "Traceback" in outcome.stderr:
        yield f"a traceback: {outcome.stderr[-1500:]}"
    if outcome.exit_code == 0 and job.written() != trial.expected:
        yield f"success, but the target is {state(trial)}"
    place = trial.operations[number - 1].partition(" /work/")[2]  # a fault may keep what would be removed
    if left := [name for name in leftovers(job.out) if outcome.exit_code == 0 and not place.startswith(name)]:
        yield f"success, but {left} is left"
    if not (is_whole_in_place(trial) if job.in_place else state(trial) in ("before", "complete")):
        yield f"the target is {state(trial)}"
    if state(trial) == "before" and not leftovers(job.out):
        return  # nothing was written: the next run is the undisturbed one
    is_replaced = state(trial) == "complete" and not job.before and not job.in_place
    again = runner.run(job, *["--overwrite"] * is_replaced)
    if again.exit_code or job.written() != trial.expected or leftovers(job.out):
        yield f"the next run: {again.exit_code}, {state(trial)}, {leftovers(job.out)}, {again.stderr[-1500:]}"


def state(trial: Trial) -> str:
    found = snapshot(trial.job.out)
    if (found or {}) == trial.job.before:
        return "before"
    return "complete" if found and trial.job.normalised(found) == trial.expected else f"{sorted(found or {})}"


def is_whole_in_place(trial: Trial) -> bool:
    """Whether each file is complete, or as the command writes it first; one that grows may end in the middle."""
    for name, data in (snapshot(trial.job.out) or {}).items():
        wanted = trial.expected.get(name.removesuffix(".new"))
        is_grown = name in trial.job.grows and (wanted or b"").startswith(data)
        is_mark = name.startswith("evaluation.json") and (name.endswith(".new") or b'"task"' in data)
        if not (data == wanted or is_grown or is_mark or name.endswith(".new")):
            return False
    return True
