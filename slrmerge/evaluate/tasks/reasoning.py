"""Worked solutions that end in a number: does it help to try again? (GSM8K's form)"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, ClassVar

from pydantic import AliasChoices, Field, field_validator

from slrmerge.errors import DataError, Problem
from slrmerge.evaluate.metrics import pass_at_k
from slrmerge.evaluate.numbers import final_number
from slrmerge.evaluate.questions import Question
from slrmerge.evaluate.tasks.base import Answered, Helpers, Metric, Scored, Task
from slrmerge.written import fault

KS = (1, 4, 8, 16, 32, 64)
TRIED_AT_A_TIME = 64
"""Questions asked greedily at a time, until as many were missed as are wanted."""


class WordProblem(Question):
    """A question and the number that is right; a worked solution may stand before it, ended by `####`."""

    question: str = Field(validation_alias=AliasChoices("question", "problem", "prompt"), min_length=1)
    answer: Fraction

    @property
    def text(self) -> str:
        return self.question

    @field_validator("answer", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        found = final_number(str(value)) if isinstance(value, str | int | float) else None
        if found is None:
            raise fault("holds no number", "give the right number, by itself or behind ####")
        return found


class Reasoning(Task):
    """pass@k, by the unbiased estimator, on the questions that the first model misses under greedy decoding."""

    name: ClassVar = "reasoning"
    samples: ClassVar = 64
    max_tokens: ClassVar = 4096
    question: ClassVar = WordProblem
    plot: ClassVar = "curves"

    def choose(
        self, questions: Sequence[Any], wanted: int | None, greedy: Callable[[Sequence[Any]], list[str]]
    ) -> list[Any]:
        missed: list[Any] = []
        for start in range(0, len(questions), TRIED_AT_A_TIME):
            tried = questions[start : start + TRIED_AT_A_TIME]
            answers = zip(tried, greedy(tried), strict=True)
            missed += [question for question, said in answers if final_number(said) != question.answer]
            if wanted is not None and len(missed) >= wanted:
                break
        if not missed:
            what = f"answers all {len(questions):,} questions right without exploring"
            raise DataError(Problem("the first model", what, "ask harder ones"))
        return missed[:wanted]

    def metrics(self, samples: int) -> tuple[Metric, ...]:  # noqa: ARG002 (those for more samples stay empty)
        return tuple(Metric(f"pass@{k}", f"probability that one of {k} samples is right") for k in KS)

    def score(self, answered: Sequence[Answered], helpers: Helpers) -> list[Scored]:  # noqa: ARG002 (needs none)
        return [_scored(each) for each in answered]


def _scored(answered: Answered) -> Scored:
    found = [None if text is None else final_number(text) for text in answered.texts]
    right = [number == answered.question.answer for number in found]
    metrics = {f"pass@{k}": pass_at_k(len(right), sum(right), k) for k in KS}
    marks = [f"{_written(number)} {'✓' if sound else '✗'}" for number, sound in zip(found, right, strict=True)]
    return Scored(metrics, marks)


def _written(number: Fraction | None) -> str:
    return "no number" if number is None else str(number)
