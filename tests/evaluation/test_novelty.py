"""NoveltyBench's metrics, from files that its scripts write beside the exported generations."""

import json
from math import isnan
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slrmerge.errors import DataError
from slrmerge.evaluation.novelty import DISTINCT, PATIENCE, UTILITY, Novelty, distinct, utility
from slrmerge.evaluation.questions import prompt_id
from slrmerge.evaluation.result import EvaluationResult
from slrmerge.evaluation.run import evaluate
from slrmerge.evaluation.tasks.base import ModelResponses
from slrmerge.evaluation.tasks.open_qa import OpenQuestion
from tests.problems import refused

pytestmark = pytest.mark.usefixtures("sketched")

QUESTIONS = {"Name a colour.": ["red", "blue"], "Name a river.": ["Nile"]}
ANSWERS = {"Name a colour.": ["red", "Red!", "blue", "red"], "Name a river.": ["Nile"] * 4}


def test_distinct_counts_classes() -> None:
    assert [distinct([0, 1, 0, 2]), distinct([0, 0])] == [3, 1]
    assert isnan(distinct([]))


def test_utility_is_what_the_definition_says() -> None:
    assert utility([10, 10, 10]) == pytest.approx(10)
    assert utility([10, 0, 5]) == pytest.approx((10 + 0.64 * 5) / (1 + 0.8 + 0.64))
    assert isnan(utility([]))


@given(st.lists(st.integers(0, 10), min_size=1, max_size=20))
def test_utility_is_the_papers_formula(scores: list[int]) -> None:
    k, p = len(scores), PATIENCE
    assert utility(scores) == pytest.approx((1 - p) / (1 - p**k) * sum(p**i * u for i, u in enumerate(scores)))


def line(prompt: str, *, scored: bool = True) -> dict[str, Any]:
    """What NoveltyBench's script writes: red and Red! are equivalent; every first one of its kind has score 5."""
    kinds = [text.strip("!").lower() for text in ANSWERS[prompt]]
    partition = [list(dict.fromkeys(kinds)).index(kind) for kind in kinds]
    scores = {"generation_scores": [0 if kind in kinds[:n] else 5 for n, kind in enumerate(kinds)]}
    content = {"id": prompt_id(prompt), "prompt": prompt, "model": "m", "generations": ANSWERS[prompt]}
    return {**content, "partition": partition, **(scores if scored else {})}


def write(folder: Path, name: str, *lines: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def responses(prompt: str) -> ModelResponses[OpenQuestion]:
    question = OpenQuestion(question=prompt, answers=tuple((name,) for name in QUESTIONS[prompt]))
    return ModelResponses("post", question, ANSWERS[prompt])


def test_scores_beside_the_generations_are_reported(tmp_path: Path) -> None:
    (tmp_path / "questions.json").write_text(json.dumps(QUESTIONS))
    lines = [{"prompt": prompt, "generations": texts} for prompt, texts in ANSWERS.items()]
    answers = write(tmp_path, "answers.jsonl", *lines) / "answers.jsonl"

    def run() -> EvaluationResult:
        models = {"post": answers, "slr": answers}
        return evaluate("open-qa", tmp_path / "questions.json", models, tmp_path / "eval", samples=4)

    run()
    write(tmp_path / "eval" / "noveltybench" / "post", "scores.jsonl", *map(line, QUESTIONS))
    result = run()
    expected = ["precision", "entropy", "coverage-4", "novelty-distinct", "novelty-utility"]
    assert [metric.name for metric in result.shown] == expected
    assert [score.metrics["novelty-distinct"] for score in result.scores[::2]] == [2, 1]
    values = [score.metrics["novelty-utility"] for score in result.scores[::2]]
    assert values == pytest.approx([utility([5, 0, 5, 0]), utility([5, 0, 0, 0])])
    assert result.cell("slr", "novelty-distinct").prompts == 0  # whose generations were not partitioned
    assert "novelty-utility" in (tmp_path / "eval" / "results.csv").read_text()


def test_partitions_without_scores_have_no_utility(tmp_path: Path) -> None:
    colours, rivers = map(responses, QUESTIONS)
    novelty = Novelty.read(write(tmp_path, "partitions.jsonl", line("Name a colour.", scored=False)))
    assert novelty.metrics == (DISTINCT,)
    assert novelty.values(colours, novelty.metrics) == {"novelty-distinct": 2}
    assert isnan(novelty.values(colours, (DISTINCT, UTILITY))["novelty-utility"])
    assert isnan(novelty.values(rivers, novelty.metrics)["novelty-distinct"])
    assert Novelty.read(tmp_path / "nothing").metrics == ()


def test_partitions_of_other_generations_are_an_error(tmp_path: Path) -> None:
    other = {**line("Name a colour."), "generations": ["red", "blue", "green", "red"]}
    novelty = Novelty.read(write(tmp_path, "scores.jsonl", other))
    with refused(DataError, "partitions-outdated"):
        novelty.values(responses("Name a colour."), novelty.metrics)


@pytest.mark.parametrize(
    "more",
    [{"partition": [0, 1]}, {"partition": None}, {"partition": ["0"] * 4}, {"id": 1}, {"generation_scores": [1]}],
)
def test_lines_of_another_form_are_an_error(tmp_path: Path, more: dict[str, Any]) -> None:
    lines = [line("Name a river."), {**line("Name a colour."), **more}]
    with refused(DataError, "not-partitions") as caught:
        Novelty.read(write(tmp_path, "scores.jsonl", *lines))
    assert caught.value.problems[0].where.endswith("scores.jsonl:2")
