"""Scores of each task, with and without judge and embeddings."""

import json
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import isnan, log
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from slrmerge.errors import DataError
from slrmerge.evaluation.models import AnswerSink, SampleRequest
from slrmerge.evaluation.options import EvaluationOptions
from slrmerge.evaluation.questions import QuestionRow, parse_questions
from slrmerge.evaluation.requesting import Judge
from slrmerge.evaluation.samples import Answer, SampleFile, Settings
from slrmerge.evaluation.tasks import TASKS
from slrmerge.evaluation.tasks.base import Helpers, ModelResponses, Task
from slrmerge.evaluation.tasks.creative import CRITERIA, RUBRIC, Creative, WritingPrompt
from slrmerge.evaluation.tasks.open_qa import OpenQA, OpenQuestion
from slrmerge.evaluation.tasks.reasoning import Reasoning, WordProblem
from slrmerge.io.progress import Progress
from tests.evaluation.helpers import Answering, Embeddings
from tests.problems import refused

STATES = OpenQuestion(question="Name a state.", answers=(("Ohio", "OH"), ("Utah",), ("Iowa",), ("Maine", "ME")))
JOKE = WritingPrompt(prompt="Tell me a joke.")
SUM = WordProblem(question="How many?", answer=Fraction(4))

Judging = Callable[[Callable[[str], str]], tuple[Judge, Answering]]


@pytest.fixture
def judging(tmp_path: Path) -> Iterator[Judging]:
    """Makes a judge that replies by a function, with a file of its own."""
    with SampleFile(tmp_path / "judge.jsonl") as file:

        def make(reply: Callable[[str], str]) -> tuple[Judge, Answering]:
            model = Answering(reply, "a-judge")
            return Judge(model, file, Progress()), model

        yield make


class Scored(NamedTuple):
    metrics: dict[str, float]
    marks: list[str]
    right: list[bool] | None
    notes: list[str]


def score(task: Task[Any], question: Any, texts: Sequence[str | None], helpers: Helpers) -> Scored:
    """The score of one model's responses to one question."""
    found = task.score([ModelResponses("post", question, texts)], helpers)
    (one,) = found.scores
    return Scored(dict(one.metrics), list(one.marks), one.right and list(one.right), list(found.notes))


class Long(Sequence[str | None]):
    """Long texts, each made when it is asked for."""

    def __init__(self, prompt: str, count: int = 20) -> None:
        self.prompt, self.count = prompt, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: Any) -> Any:
        if at >= self.count:
            raise IndexError
        return f"{self.prompt} {at} " + "x" * 100_000


class Grader(Answering):
    """A judge that gives everything the same grade, and keeps no request."""

    def answer(self, requests: Sequence[SampleRequest], settings: Settings, sink: AnswerSink) -> None:
        for request in requests:
            sink.keep(request, Answer(self.reply(request.prompt), "stop"))


@pytest.mark.parametrize(
    ("task", "make", "grade"),
    [
        (Creative(), lambda name: WritingPrompt(prompt=name), json.dumps(dict.fromkeys(CRITERIA, 5))),
        (OpenQA(), lambda name: OpenQuestion(question=name, answers=["a"]), '{"answer": 0}'),
    ],
    ids=["creative", "open-qa"],
)
def test_the_prompts_of_a_judge_are_not_held_in_memory(task: Task[Any], make: Any, grade: str, tmp_path: Path) -> None:
    responses = [ModelResponses("post", make(name), Long(name)) for name in map(str, range(10))]
    with SampleFile(tmp_path / "judge.jsonl") as file:
        judge = Judge(Grader(lambda prompt: grade), file, Progress())
        tracemalloc.start()
        scores = task.score(responses, Helpers(20, judge)).scores
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(file) == 200
    assert {mark for score in scores for mark in score.marks} == ({"0.50"} if task.name == "creative" else {""})
    assert peak < 5_000_000  # of 20 MB


# open-qa


def test_open_qa_counts_names_and_what_ends_in_one() -> None:
    texts = ["Ohio", "OH.", "It is Utah!", "Texas", "Ohio or Utah", None]
    metrics, marks, right, notes = score(OpenQA(), STATES, texts, Helpers(6))
    assert marks == ["Ohio", "Ohio", "Utah", "", "", ""]
    assert right == [True, True, True, False, False, False]
    assert metrics["precision"] == 0.5
    assert metrics["entropy"] == pytest.approx(log(3) - 2 / 3 * log(2))
    assert metrics["coverage-6"] == 0.5
    (note,) = notes
    assert note.endswith(": post 1")


def test_open_qa_without_a_right_answer_is_zero_throughout() -> None:
    metrics = score(OpenQA(), STATES, ["Texas", "", None], Helpers(3)).metrics
    assert metrics == {"precision": 0, "entropy": 0, "coverage-3": 0}


def test_a_judge_decides_on_responses_that_are_not_a_name(judging: Judging) -> None:
    judge, model = judging(lambda prompt: '{"answer": 4}' if "the pine tree state" in prompt else '{"answer": 0}')
    texts = ["Ohio", "It is Utah!", "the pine tree state", "The Pine Tree State.", ""]
    metrics, marks, _, notes = score(OpenQA(), STATES, texts, Helpers(5, judge=judge))
    assert marks == ["Ohio", "", "Maine", "Maine", ""]
    assert metrics["precision"] == 0.6
    assert len(model.requests) == 2  # neither what is a name, nor what is the same but for case, nor nothing
    assert notes == []


def test_the_judge_reads_the_question_all_answers_and_the_response(judging: Judging) -> None:
    judge, model = judging(lambda prompt: '{"answer": 0}')
    score(OpenQA(), STATES, ["It is\nUtah!"], Helpers(1, judge=judge))
    prompt = model.requests[0].prompt
    assert "Question: Name a state.\n" in prompt
    assert "\n1. Ohio / OH\n2. Utah\n3. Iowa\n4. Maine / ME\n" in prompt
    assert "<response>\nIt is\nUtah!\n</response>" in prompt
    assert (model.settings[0].temperature, model.settings[0].min_p) == (0, 0)


def test_the_judge_is_not_asked_again_about_the_same(judging: Judging) -> None:
    judge, model = judging(lambda prompt: '{"answer": 2}')
    first = score(OpenQA(), STATES, ["It is Utah!"], Helpers(1, judge=judge))
    assert score(OpenQA(), STATES, ["It is Utah!"], Helpers(1, judge=judge)) == first
    assert len(model.requests) == 1


@pytest.mark.parametrize(
    "reply",
    ["", "Utah", "2", '{"answer": 5}', '{"answer": -1}', '{"answer": "2"}', '{"answer": true}', '{"answer": 2', "[2]"],
)
def test_an_invalid_judgement_counts_as_wrong_and_is_noted(judging: Judging, reply: str) -> None:
    judge, _ = judging(lambda prompt: reply)
    metrics, _, _, notes = score(OpenQA(), STATES, ["Ohio", "It is Utah!"], Helpers(2, judge=judge))
    assert metrics["precision"] == 0.5
    (note,) = notes
    assert note.startswith("a-judge judged 1 responses; 1 of its replies")


def test_a_judge_may_reason_before_it_replies(judging: Judging) -> None:
    judge, _ = judging(lambda prompt: 'Not {"answer": 1}, so\n```json\n{"answer": 2}\n```')
    assert score(OpenQA(), STATES, ["It is Utah!"], Helpers(1, judge=judge)).marks == ["Utah"]


# creative


def points(*values: object) -> str:
    return json.dumps(dict(zip(CRITERIA, values, strict=True)))


def test_creative_diversity_is_over_texts_that_say_something() -> None:
    helpers = Helpers(4, embedder=Embeddings({"a": (1, 0), "b": (0, 1)}))
    metrics, marks, right, notes = score(Creative(), JOKE, ["a", "b", "", None, " \n"], helpers)
    assert metrics["diversity"] == pytest.approx(1)
    assert isnan(metrics["quality"])
    assert (marks, right) == (["", "", "", "", ""], None)
    (note,) = notes
    assert note.startswith("quality was not measured")


def test_creative_counts_the_same_text_as_often_as_it_came() -> None:
    helpers = Helpers(3, embedder=Embeddings({"a": (1, 0), "b": (0, 1)}))
    assert score(Creative(), JOKE, ["a", "a", "b"], helpers)[0]["diversity"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("texts", [["a"], ["", None], []])
def test_creative_diversity_takes_two_texts(texts: list[str | None]) -> None:
    helpers = Helpers(1, embedder=Embeddings({"a": (1, 0)}))
    assert isnan(score(Creative(), JOKE, texts, helpers)[0]["diversity"])


def test_texts_that_embeddings_read_only_in_part_are_counted() -> None:
    helpers = Helpers(2, embedder=Embeddings({"abc": (1, 0), "b": (0, 1)}, reads=2))
    notes = score(Creative(), JOKE, ["abc", "b", "abc"], helpers).notes
    assert "a-table truncates 1 of 2 texts" in notes


def test_quality_is_the_share_of_the_judges_points_and_the_rubric_is_shown(judging: Judging) -> None:
    judge, model = judging(lambda prompt: points(10, 8, 6, 4, 2) if "good" in prompt else points(0, 0, 0, 0, 0.0))
    metrics, marks, _, notes = score(Creative(), JOKE, ["good", "bad", "bad", "", None], Helpers(4, judge=judge))
    assert metrics["quality"] == pytest.approx(0.6 / 5)  # nothing is worth nothing
    assert isnan(metrics["diversity"])
    assert marks == ["0.60", "0.00", "0.00", "0.00", "0.00"]
    assert model.requests[0].prompt == RUBRIC.format(request="Tell me a joke.", response="good")
    rubric, diversity = notes
    assert rubric.endswith("\n" + RUBRIC.format(request="…", response="…"))
    assert diversity.startswith("diversity was not measured")


@pytest.mark.parametrize(
    "reply", ["", "10/10", "[10]", points(10, 8, 6, 4, 11), points(10, 8, 6, 4, "2"), points(1, 1, 1, 1, None), "{}"]
)
def test_quality_is_blank_where_the_judges_reply_cannot_be_read(judging: Judging, reply: str) -> None:
    judge, _ = judging(lambda prompt: reply)
    metrics, marks, _, notes = score(Creative(), JOKE, ["a"], Helpers(1, judge=judge))
    assert isnan(metrics["quality"])
    assert marks == [""]
    assert notes[0].startswith("a-judge judged 1 texts; 1 of its replies")


# reasoning


def test_reasoning_compares_numbers() -> None:
    metrics, marks, right, _ = score(Reasoning(), SUM, ["It is 4.", "#### 4.0", "5", "none", None], Helpers(5))
    assert marks == ["4", "4", "5", "no answer", "no answer"]
    assert right == [True, True, False, False, False]
    assert metrics["pass@1"] == pytest.approx(0.4)
    assert metrics["pass@4"] == 1
    assert isnan(metrics["pass@8"])


def sums(count: int) -> list[WordProblem]:
    return [WordProblem(question=f"{number} + 0?", answer=Fraction(number)) for number in range(count)]


def test_reasoning_chooses_questions_that_greedy_decoding_misses_until_there_are_enough() -> None:
    asked: list[WordProblem] = []

    def greedy(questions: Sequence[WordProblem]) -> list[str]:
        asked.extend(questions)
        return [str(question.answer) if question.answer % 2 else "7.5" for question in questions]

    chosen = Reasoning().choose(sums(300), 40, greedy)
    assert [int(question.answer) for question in chosen.questions] == list(range(0, 80, 2))
    assert len(asked) == 128
    assert "128" in chosen.note
    assert len(Reasoning().choose(sums(300), None, greedy).questions) == 150


def test_reasoning_can_ask_all_questions_without_greedy_decoding() -> None:
    def greedy(_: object) -> list[str]:
        raise AssertionError("decodes")

    chosen = Reasoning(EvaluationOptions(missed=False)).choose(sums(9), 5, greedy)
    assert (list(chosen.questions), chosen.note) == (sums(5), "")


def test_reasoning_reads_answers_as_the_option_says() -> None:
    texts = ["#### 4, not 5", "#### 4.0", "4"]
    for extract, marks, right in (
        ("number", ["4", "4", "4"], [True, True, True]),
        ("strict-match", ["4", "4.0", "no answer"], [True, False, False]),
        ("flexible-extract", ["5", "4.0", "4"], [False, False, True]),
    ):
        task = Reasoning(EvaluationOptions(extract=extract))
        _, *found, notes = score(task, SUM, texts, Helpers(3))
        assert found == [marks, right]
        assert [extract in note for note in notes] == [True] * (extract != "number")
        missed = task.choose([SUM], None, lambda _: ["#### 4.0"]) if extract != "number" else None
        assert missed is None or missed.questions == [SUM]


def test_reasoning_takes_answers_that_are_not_numbers_where_math_verify_reads_them() -> None:
    task = Reasoning(EvaluationOptions(extract="math-verify"))
    rows = [{"question": "Expand.", "answer": r"#### x^2 + 2x + 1"}, {"question": "Half?", "answer": 0.5}]
    expand, half = parse_questions(task.question, [QuestionRow("a", row) for row in rows])
    _, marks, right, _ = score(task, expand, [r"So it is \boxed{(x+1)^2}.", r"\boxed{x^2}", "no", None], Helpers(4))
    assert marks == ["(x+1)^2", "x^2", "no answer", "no answer"]
    assert right == [True, False, False, False]
    assert score(task, half, [r"It is $\frac{1}{2}$."], Helpers(1))[1:3] == ([r"\frac{1}{2}"], [True])
    for answer in ("####", "", None, True):
        with refused(DataError, "no-expression"):
            parse_questions(task.question, [QuestionRow("a", {"question": "What?", "answer": answer})])


def test_reasoning_needs_a_question_that_is_missed() -> None:
    with refused(DataError, "no-missed-questions"):
        Reasoning().choose(sums(3), None, lambda questions: [str(question.answer) for question in questions])


# all


@pytest.mark.parametrize("name", TASKS)
def test_a_task_scores_every_metric_that_it_names(name: str) -> None:
    task = TASKS[name]()
    question = {"open-qa": STATES, "creative": JOKE, "reasoning": SUM}[name]
    for texts in (["Ohio 4"], [None], [], ["", " "]):
        metrics, marks, right, _ = score(task, question, texts, Helpers(7))
        assert list(metrics) == [metric.name for metric in task.metrics(7)]
        assert len(marks) == len(texts)
        assert right is None or len(right) == len(texts)
    assert task.name == name
