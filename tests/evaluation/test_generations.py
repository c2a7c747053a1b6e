"""Answers from a file, and answers for other tools: what is exported can be read again."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from slrmerge.errors import DataError, OptionError
from slrmerge.evaluation.generations import GenerationsFile
from slrmerge.evaluation.models import SampleRequest
from slrmerge.evaluation.questions import prompt_id
from slrmerge.evaluation.result import EvaluationResult
from slrmerge.evaluation.run import evaluate
from slrmerge.evaluation.samples import SampleKey, Settings
from tests.evaluation.helpers import Kept
from tests.evaluation.openai_server import OpenAIServer
from tests.problems import refused

pytestmark = pytest.mark.usefixtures("sketched")

SETTINGS = Settings("", temperature=1.0, min_p=0.1, max_tokens=64)
QUESTIONS = {"Name a colour.": ["red", "blue"], "Name a river.": ["Nile"]}
GENERATIONS = {"Name a colour.": ["red", "Blue!", "green", ""], "Name a river.": ["the Nile", "Nile", "Po", "größer"]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(QUESTIONS))
    return path


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return path


def generations(folder: Path, **more: Any) -> Path:
    lines = [{"prompt": prompt, "generations": texts, **more} for prompt, texts in GENERATIONS.items()]
    return written(folder / "answers.jsonl", *lines)


def request(prompt: str, sample: int) -> SampleRequest:
    return SampleRequest(SampleKey("post", prompt_id(prompt), sample), prompt, 0)


def run(data: Path, models: dict[str, str | Path], **options: Any) -> EvaluationResult:
    return evaluate("open-qa", data, models, data.with_name("eval"), **{"samples": 4, **options})


def test_answers_of_a_file_are_measured(data: Path) -> None:
    result = run(data, {"post": generations(data.parent, model="elsewhere", id="x", partition=[0])})
    assert {each.question.text: list(each.texts) for each in result.responses} == GENERATIONS
    assert [score.metrics["precision"] for score in result.scores] == [0.5, 0.5]
    assert [score.metrics["coverage-4"] for score in result.scores] == [1.0, 1.0]
    assert any(note.startswith("post: answers from a file") for note in result.notes)
    assert result.models["post"].startswith("answers.jsonl ")


def test_lines_of_one_prompt_add_up(data: Path) -> None:
    lines = [{"prompt": p, "generations": [text]} for p, texts in GENERATIONS.items() for text in texts]
    result = run(data, {"post": written(data.parent / "answers.jsonl", *lines, "")})
    assert {each.question.text: list(each.texts) for each in result.responses} == GENERATIONS


@pytest.mark.parametrize("content", ["", "x" * 99, '{"prompt": "Name a river.", "generations": ["Po"]}\n' * 9])
def test_a_file_that_is_changed_while_it_is_in_use_is_an_error(tmp_path: Path, content: str) -> None:
    path = generations(tmp_path)
    model = GenerationsFile(path)
    path.write_text(content)
    with refused(DataError, "data-changed"):
        model.answer([request("Name a colour.", 0)], SETTINGS, Kept())


def test_generations_stay_in_the_file(tmp_path: Path) -> None:
    line = {"prompt": "p", "generations": ["x" * 100_000]}
    path = written(tmp_path / "answers.jsonl", *({**line, "prompt": str(number)} for number in range(200)))
    tracemalloc.start()
    model, kept = GenerationsFile(path), Kept()
    for number in range(200):
        model.answer([request(str(number), 0)], SETTINGS, kept)
        kept.answers.clear()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000  # of 20 MB


@pytest.mark.parametrize(
    ("lines", "code", "count"),
    [
        (["{"], "not-generations", 1),
        (["[]", "3", '{"prompt": "a"}', '{"prompt": "a", "generations": "b"}'], "not-generations", 4),
        (['{"prompt": 3, "generations": []}', '{"prompt": "a", "generations": [null]}'], "not-generations", 2),
        (["x"] * 50, "not-generations", 10),
        ([{"prompt": "Name a colour.", "generations": ["red"]}], "generations-missing", 2),
        ([], "generations-missing", 2),
    ],
)
def test_a_file_of_another_form_or_with_too_few_answers_is_refused(
    data: Path, lines: list[Any], code: str, count: int
) -> None:
    path = written(data.parent / "answers.jsonl", *lines)
    with pytest.raises(DataError) as caught:
        run(data, {"post": path})
    assert [problem.code for problem in caught.value.problems] == [code] * count
    assert all(problem.where.startswith(str(path)) for problem in caught.value.problems)


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with refused(DataError, "data-unreadable"):
        GenerationsFile(tmp_path / "nothing.jsonl")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_what_is_not_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "endless.jsonl").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "endless.jsonl"):
        with refused(DataError, "not-a-file"):
            GenerationsFile(tmp_path / name)


def test_a_file_has_no_greedy_answers(tmp_path: Path) -> None:
    data = tmp_path / "sums.json"
    data.write_text(json.dumps([{"question": "How many?", "answer": 4}]))
    path = written(tmp_path / "answers.jsonl", {"prompt": "How many?", "generations": ["4"] * 4})
    with refused(DataError, "no-greedy-answers"):
        evaluate("reasoning", data, {"post": path}, tmp_path / "eval", samples=4)
    result = evaluate("reasoning", data, {"post": path}, tmp_path / "eval", samples=4, missed=False)
    assert result.cell("post", "pass@1").mean == 1


def test_a_file_cannot_judge(data: Path) -> None:
    with refused(OptionError, "not-a-judge"):
        run(data, {"post": generations(data.parent)}, judge=str(data.with_name("answers.jsonl")))


def test_what_is_exported_is_read_again(server: OpenAIServer, data: Path) -> None:
    server.misbehave(413, skip=4)  # the second question is refused
    models = {"post": f"m@{server.url}", "a/b": f"m@{server.url}", "..": generations(data.parent)}
    first = run(data, models, export="noveltybench", concurrency=1)
    folder = data.with_name("eval") / "noveltybench"
    files = {path.parent.name: path for path in folder.glob("*/*")}
    assert {path.relative_to(folder).as_posix() for path in files.values()} == {
        "post/generations.jsonl", "a%2Fb/generations.jsonl", "%2E%2E/generations.jsonl",
    }  # fmt: skip
    lines = [json.loads(line) for line in files["post"].read_text("utf-8").splitlines()]
    assert [set(line) for line in lines] == [{"id", "prompt", "model", "generations"}] * 2
    assert {line["model"] for line in lines} == {"m"}
    assert lines[1]["generations"] == [""] * 4
    again = evaluate("open-qa", data, {name: files[name] for name in files}, data.with_name("again"), samples=4)
    for texts in (
        {each.question.text: [text or "" for text in each.texts] for each in result.responses if each.model == "post"}
        for result in (first, again)
    ):
        assert texts == {line["prompt"]: line["generations"] for line in lines}
    own = {each.question.text: list(each.texts) for each in again.responses if each.model == "%2E%2E"}
    assert own == GENERATIONS


def test_without_export_nothing_else_is_written(data: Path) -> None:
    run(data, {"post": generations(data.parent)})
    assert not (data.with_name("eval") / "noveltybench").exists()
