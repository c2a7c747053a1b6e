"""Worked solutions that end in a number: does it help to try again? (GSM8K's form)"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from typing import Annotated, Any, ClassVar

from slrmerge.errors import DataError, Problem
from slrmerge.evaluate.metrics import pass_at_k
from slrmerge.evaluate.numbers import final_number
from slrmerge.evaluate.questions import Question
from slrmerge.evaluate.tasks.base import Answered, Helpers, Metric, Scored, Task
from slrmerge.structure import Fault, Read, Text

KS = (1, 4, 8, 16, 32, 64)
TRIED_AT_A_TIME = 64
"""Questions asked greedily at a time, until as many were missed as are wanted."""


def _number(value: Any) -> Fraction:
    if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
        return Fraction(str(value))
    found = final_number(value) if isinstance(value, str) else None
    if found is None:
        raise Fault("holds no number", "give the right number, by itself or behind ####")
    return found


@dataclass(frozen=True, kw_only=True)
class WordProblem(Question):
    """A question and the number that is right; a worked solution may stand before it, ended by `####`."""

    aliases: ClassVar = {"question": ("question", "problem", "prompt")}

    question: Text
    answer: Annotated[Fraction, Read(_number)]

    @property
    def text(self) -> str:
        return self.question


class Reasoning(Task):
    """pass@k, by the unbiased estimator, on the questions that the first model misses under greedy decoding."""

    name: ClassVar = "reasoning"
    samples: ClassVar = 64
    max_tokens: ClassVar = 4096
    question: ClassVar = WordProblem
    plot: ClassVar = "curves"

    def choose(
        self, questions: Sequence[Any], wanted: int | None, greedy: Callable[[Sequence[Any]], list[str]]
    ) -> tuple[list[Any], str]:
        missed: list[Any] = []
        at_a_time = TRIED_AT_A_TIME if wanted else len(questions)
        tried = 0
        while tried < len(questions) and (wanted is None or len(missed) < wanted):
            part = questions[tried : tried + at_a_time]
            answers = zip(part, greedy(part), strict=True)
            missed += [question for question, said in answers if final_number(said) != question.answer]
            tried += len(part)
        if not missed:
            what = f"answers all {len(questions):,} questions right without exploring"
            raise DataError(Problem("the first model", what, "ask harder ones"))
        return missed[:wanted], (
            f"these are questions that the first model misses under greedy decoding, of {tried:,} that it was asked: "
            "that favours every other model where k is small"
        )

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
