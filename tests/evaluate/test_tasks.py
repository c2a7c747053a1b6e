"""What answers are worth: each task, with and without those who help to measure."""

import json
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import isnan, log
from pathlib import Path
from typing import Any

import pytest

from slrmerge.cli import evaluate as cli
from slrmerge.errors import DataError
from slrmerge.evaluate.judge import Judge
from slrmerge.evaluate.samples import SampleFile
from slrmerge.evaluate.tasks import TASKS, Answered, Helpers, Task
from slrmerge.evaluate.tasks.creative import CRITERIA, RUBRIC, Creative, Request
from slrmerge.evaluate.tasks.open_qa import OpenQA, OpenQuestion
from slrmerge.evaluate.tasks.reasoning import Reasoning, WordProblem
from slrmerge.progress import Silent
from tests.evaluate.helpers import Answering, Embeddings

STATES = OpenQuestion(question="Name a state.", answers=(("Ohio", "OH"), ("Utah",), ("Iowa",), ("Maine", "ME")))
JOKE = Request(prompt="Tell me a joke.")
SUM = WordProblem(question="How many?", answer=Fraction(4))

Judging = Callable[[Callable[[str], str]], tuple[Judge, Answering]]


@pytest.fixture
def judging(tmp_path: Path) -> Iterator[Judging]:
    """Makes a judge that replies by a function, with a file of its own."""
    with SampleFile(tmp_path / "judge.jsonl") as file:

        def make(reply: Callable[[str], str]) -> tuple[Judge, Answering]:
            model = Answering(reply, "a-judge")
            return Judge(model, file, Silent()), model

        yield make


def score(
    task: Task, question: Any, texts: Sequence[str | None], helpers: Helpers
) -> tuple[dict[str, float], list[str]]:
    (scored,) = task.score([Answered("post", question, texts)], helpers)
    return dict(scored.metrics), list(scored.marks)


# open-qa


def test_open_qa_counts_names_and_what_ends_in_one() -> None:
    texts = ["Ohio", "OH.", "It is Utah!", "Texas", "Ohio or Utah", None]
    helpers = Helpers(6)
    metrics, marks = score(OpenQA(), STATES, texts, helpers)
    assert marks == ["Ohio", "Ohio", "Utah", "", "", ""]
    assert metrics["precision"] == 0.5
    assert metrics["entropy"] == pytest.approx(log(3) - 2 / 3 * log(2))
    assert metrics["coverage-6"] == 0.5
    assert helpers.notes == ["without a judge, sentences that end in an accepted answer count as it: post 1"]


def test_open_qa_without_a_right_answer_is_zero_throughout() -> None:
    metrics, _ = score(OpenQA(), STATES, ["Texas", "", None], Helpers(3))
    assert metrics == {"precision": 0, "entropy": 0, "coverage-3": 0}


def test_a_judge_decides_on_all_that_is_no_name(judging: Judging) -> None:
    judge, model = judging(lambda prompt: '{"answer": 4}' if "the pine tree state" in prompt else '{"answer": 0}')
    helpers = Helpers(5, judge=judge)
    texts = ["Ohio", "It is Utah!", "the pine tree state", "The Pine Tree State.", ""]
    metrics, marks = score(OpenQA(), STATES, texts, helpers)
    assert marks == ["Ohio", "", "Maine", "Maine", ""]
    assert metrics["precision"] == 0.6
    assert len(model.asks) == 2  # neither what is a name, nor what is the same but for case, nor nothing
    assert helpers.notes == []


def test_the_judge_reads_the_question_all_answers_and_the_response(judging: Judging) -> None:
    judge, model = judging(lambda prompt: '{"answer": 0}')
    score(OpenQA(), STATES, ["It is\nUtah!"], Helpers(1, judge=judge))
    prompt = model.asks[0].prompt
    assert "Question: Name a state.\n" in prompt
    assert "\n1. Ohio / OH\n2. Utah\n3. Iowa\n4. Maine / ME\n" in prompt
    assert "<response>\nIt is\nUtah!\n</response>" in prompt
    assert (model.settings[0].temperature, model.settings[0].min_p) == (0, 0)


def test_the_judge_is_not_asked_again_about_the_same(judging: Judging) -> None:
    judge, model = judging(lambda prompt: '{"answer": 2}')
    first = score(OpenQA(), STATES, ["It is Utah!"], Helpers(1, judge=judge))
    assert score(OpenQA(), STATES, ["It is Utah!"], Helpers(1, judge=judge)) == first
    assert len(model.asks) == 1


@pytest.mark.parametrize(
    "reply",
    ["", "Utah", "2", '{"answer": 5}', '{"answer": -1}', '{"answer": "2"}', '{"answer": true}', '{"answer": 2', "[2]"],
)
def test_a_judges_nonsense_counts_as_wrong_and_is_said(judging: Judging, reply: str) -> None:
    judge, _ = judging(lambda prompt: reply)
    helpers = Helpers(2, judge=judge)
    metrics, _ = score(OpenQA(), STATES, ["Ohio", "It is Utah!"], helpers)
    assert metrics["precision"] == 0.5
    assert helpers.notes == [
        "a-judge judged 1 responses; 1 of its replies could not be read, and those responses count as wrong"
    ]


def test_a_judge_may_think_before_it_replies(judging: Judging) -> None:
    judge, _ = judging(lambda prompt: 'Not {"answer": 1}, so\n```json\n{"answer": 2}\n```')
    assert score(OpenQA(), STATES, ["It is Utah!"], Helpers(1, judge=judge))[1] == ["Utah"]


# creative


def points(*values: object) -> str:
    return json.dumps(dict(zip(CRITERIA, values, strict=True)))


def test_creative_diversity_is_over_texts_that_say_something() -> None:
    helpers = Helpers(4, embedder=Embeddings({"a": (1, 0), "b": (0, 1)}))
    metrics, marks = score(Creative(), JOKE, ["a", "b", "", None, " \n"], helpers)
    assert metrics["diversity"] == pytest.approx(1)
    assert isnan(metrics["quality"])
    assert marks == ["", "", "", "", ""]
    assert helpers.notes == ["nobody judged quality: name a judge with --judge MODEL@URL"]


def test_creative_counts_the_same_text_as_often_as_it_came() -> None:
    helpers = Helpers(3, embedder=Embeddings({"a": (1, 0), "b": (0, 1)}))
    assert score(Creative(), JOKE, ["a", "a", "b"], helpers)[0]["diversity"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("texts", [["a"], ["", None], []])
def test_creative_diversity_takes_two_texts(texts: list[str | None]) -> None:
    helpers = Helpers(1, embedder=Embeddings({"a": (1, 0)}))
    assert isnan(score(Creative(), JOKE, texts, helpers)[0]["diversity"])


def test_texts_that_embeddings_read_only_in_part_are_counted() -> None:
    helpers = Helpers(2, embedder=Embeddings({"abc": (1, 0), "b": (0, 1)}, reads=2))
    score(Creative(), JOKE, ["abc", "b", "abc"], helpers)
    assert "a-table reads only the beginning of 1 of 2 texts" in helpers.notes


def test_quality_is_the_share_of_the_judges_points_and_the_rubric_is_shown(judging: Judging) -> None:
    judge, model = judging(lambda prompt: points(10, 8, 6, 4, 2) if "good" in prompt else points(0, 0, 0, 0, 0.0))
    helpers = Helpers(4, judge=judge)
    metrics, marks = score(Creative(), JOKE, ["good", "bad", "bad", "", None], helpers)
    assert metrics["quality"] == pytest.approx(0.6 / 5)  # nothing is worth nothing
    assert isnan(metrics["diversity"])
    assert marks == ["0.60", "0.00", "0.00", "0.00", "0.00"]
    assert model.asks[0].prompt == RUBRIC.format(request="Tell me a joke.", response="good")
    assert helpers.notes == [
        "a-judge judged by this rubric:\n" + RUBRIC.format(request="…", response="…"),
        "nobody measured diversity: name a model with --embeddings",
    ]


@pytest.mark.parametrize(
    "reply", ["", "10/10", "[10]", points(10, 8, 6, 4, 11), points(10, 8, 6, 4, "2"), points(1, 1, 1, 1, None), "{}"]
)
def test_quality_is_blank_where_the_judges_reply_cannot_be_read(judging: Judging, reply: str) -> None:
    judge, _ = judging(lambda prompt: reply)
    helpers = Helpers(1, judge=judge)
    metrics, marks = score(Creative(), JOKE, ["a"], helpers)
    assert isnan(metrics["quality"])
    assert marks == [""]
    said = "a-judge judged 1 texts; 1 of its replies could not be read, and those texts have no quality"
    assert said in helpers.notes


# reasoning


def test_reasoning_compares_numbers() -> None:
    metrics, marks = score(Reasoning(), SUM, ["It is 4.", "#### 4.0", "5", "none", None], Helpers(5))
    assert marks == ["4 ✓", "4 ✓", "5 ✗", "no number ✗", "no number ✗"]
    assert metrics["pass@1"] == pytest.approx(0.4)
    assert metrics["pass@4"] == 1
    assert isnan(metrics["pass@8"])


def sums(count: int) -> list[WordProblem]:
    return [WordProblem(question=f"{number} + 0?", answer=Fraction(number)) for number in range(count)]


def test_reasoning_asks_what_is_missed_without_chance_until_there_is_enough() -> None:
    asked: list[WordProblem] = []

    def greedy(questions: Sequence[WordProblem]) -> list[str]:
        asked.extend(questions)
        return [str(question.answer) if question.answer % 2 else "7.5" for question in questions]

    chosen, note = Reasoning().choose(sums(300), 40, greedy)
    assert [int(question.answer) for question in chosen] == list(range(0, 80, 2))
    assert len(asked) == 128
    assert note == (
        "these are questions that the first model misses under greedy decoding, of 128 that it was asked: "
        "that favours every other model where k is small"
    )
    assert len(Reasoning().choose(sums(300), None, greedy)[0]) == 150


def test_reasoning_needs_a_question_that_is_missed() -> None:
    with pytest.raises(DataError) as caught:
        Reasoning().choose(sums(3), None, lambda questions: [str(question.answer) for question in questions])
    assert str(caught.value) == "the first model: answers all 3 questions right without exploring; ask harder ones"


# all


@pytest.mark.parametrize("name", TASKS)
def test_a_task_gives_every_metric_that_it_names(name: str) -> None:
    task = TASKS[name]()
    question = {"open-qa": STATES, "creative": JOKE, "reasoning": SUM}[name]
    for texts in (["Ohio 4"], [None], [], ["", " "]):
        metrics, marks = score(task, question, texts, Helpers(7))
        assert list(metrics) == [metric.name for metric in task.metrics(7)]
        assert len(marks) == len(texts)
    assert task.name == name


def test_the_command_line_offers_every_task() -> None:
    assert tuple(TASKS) == cli._TASKS
