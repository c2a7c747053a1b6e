"""Questions whose worked solution ends in a number: does it help to try again? (the form of GSM8K)"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Annotated, Any, ClassVar

from pydantic import AliasChoices, Field, PlainSerializer, PlainValidator

from slrmerge.errors import DataError, Problem
from slrmerge.evaluation.metrics import pass_at_k
from slrmerge.evaluation.numbers import MOST_DIGITS, final_number
from slrmerge.evaluation.questions import Question, Text
from slrmerge.evaluation.tasks.base import ChosenQuestions, Helpers, Metric, ModelResponses, Score, Task, TaskScores
from slrmerge.io.model import InvalidValue

KS = (1, 4, 8, 16, 32, 64)

QUESTIONS_PER_ROUND = 64
"""Questions per round of greedy decoding; rounds end once enough questions were missed."""


def _number(value: Any) -> Fraction:
    is_number = isinstance(value, int | float | Fraction) and not isinstance(value, bool)
    if is_number and abs(value) < 10**MOST_DIGITS:  # which NaN is not
        return Fraction(str(value))
    found = final_number(value) if isinstance(value, str) else None
    if found is None:
        remedy = "give the correct number, alone or after ####"
        raise InvalidValue("no-number", "contains no number", remedy)
    return found


class WordProblem(Question):
    """A question and the correct number; a worked solution, ended by `####`, may precede it."""

    question: Text = Field(validation_alias=AliasChoices("question", "problem", "prompt"))
    answer: Annotated[Fraction, PlainValidator(_number), PlainSerializer(str)]

    @property
    def text(self) -> str:
        return self.question


class Reasoning(Task[WordProblem]):
    """pass@k, by the unbiased estimator, on the questions that the first model misses with greedy decoding."""

    name: ClassVar = "reasoning"
    samples: ClassVar = 64
    max_tokens: ClassVar = 4096
    plot: ClassVar = "curves"
    question = WordProblem

    def choose(
        self,
        questions: Sequence[WordProblem],
        wanted: int | None,
        greedy: Callable[[Sequence[WordProblem]], list[str]],
    ) -> ChosenQuestions[WordProblem]:
        missed: list[WordProblem] = []
        per_round = QUESTIONS_PER_ROUND if wanted else len(questions)
        tried = 0
        while tried < len(questions) and (wanted is None or len(missed) < wanted):
            part = questions[tried : tried + per_round]
            answers = zip(part, greedy(part), strict=True)
            missed += [question for question, answer in answers if final_number(answer) != question.answer]
            tried += len(part)
        if not missed:
            what = f"answers all {len(questions):,} questions correctly with greedy decoding"
            raise DataError(Problem("no-missed-questions", "the first model", what, "use more difficult questions"))
        return ChosenQuestions(
            missed[:wanted],
            f"the questions are those that the first model misses with greedy decoding, out of {tried:,} tried: this "
            "favours the other models where k is small",
        )

    def metrics(self, samples: int) -> tuple[Metric, ...]:  # noqa: ARG002 (undefined where k is larger)
        return tuple(Metric(f"pass@{k}", f"probability that at least one of {k} samples is correct") for k in KS)

    def score(self, responses: Sequence[ModelResponses[WordProblem]], helpers: Helpers) -> TaskScores:  # noqa: ARG002
        scores = []
        for each in responses:
            numbers = [None if text is None else final_number(text) for text in each.texts]
            correct = [number == each.question.answer for number in numbers]
            marks = [
                f"{'no number' if number is None else number} {'✓' if is_correct else '✗'}"
                for number, is_correct in zip(numbers, correct, strict=True)
            ]
            scores.append(Score({f"pass@{k}": pass_at_k(len(correct), sum(correct), k) for k in KS}, marks))
        return TaskScores(scores)
