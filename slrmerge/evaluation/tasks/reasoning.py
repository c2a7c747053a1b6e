"""Questions whose worked solution ends in an answer: does it help to try again? (the form of GSM8K)"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Annotated, Any, ClassVar

from pydantic import AliasChoices, Field, PlainSerializer, PlainValidator

from slrmerge.errors import DataError, Problem, require_extra
from slrmerge.evaluation.answers import (
    MATH_VERIFY,
    MOST_DIGITS,
    READERS,
    Reading,
    as_math,
    final_number,
    parse_expression,
)
from slrmerge.evaluation.metrics import Metric, pass_at_k
from slrmerge.evaluation.options import EvaluationOptions
from slrmerge.evaluation.questions import Question, Text
from slrmerge.evaluation.tasks.base import ChosenQuestions, Helpers, ModelResponses, Score, Task, TaskScores
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


def _expression(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    text = str(value).rpartition("####")[2].strip() if isinstance(value, str) or is_number else ""
    if not (text and parse_expression(as_math(text))):
        remedy = r"give the correct answer as LaTeX, such as \frac{3}{4}, alone or after ####"
        raise InvalidValue("no-expression", "contains no answer that math-verify reads", remedy)
    return text


class SolvedQuestion(Question):
    """A question and its correct answer; a worked solution, ended by `####`, may precede it."""

    text: Text = Field(validation_alias=AliasChoices("question", "problem", "prompt"))
    answer: Any

    @property
    def reference(self) -> list[str]:
        """See `Question`."""
        return [str(self.answer)]


class WordProblem(SolvedQuestion):
    """One whose answer is a number."""

    answer: Annotated[Fraction, PlainValidator(_number), PlainSerializer(str)]


class MathProblem(SolvedQuestion):
    """One whose answer is any expression that math-verify reads."""

    answer: Annotated[str, PlainValidator(_expression)]


class Reasoning(Task[SolvedQuestion]):
    """pass@k, by the unbiased estimator, on the questions that the first model misses with greedy decoding, or on all.

    Raises MissingExtraError where answers are to be read by math-verify, which is not installed.
    """

    name: ClassVar = "reasoning"
    samples: ClassVar = 64
    max_tokens: ClassVar = 4096
    plot: ClassVar = "curves"

    def __init__(self, options: EvaluationOptions | None = None) -> None:
        super().__init__(options)
        self._is_only_missed, self._extract = self.options.missed, self.options.extract
        self._read = READERS[self._extract]
        self.question: type[SolvedQuestion] = WordProblem
        if self._extract == MATH_VERIFY:
            require_extra("eval", "math_verify")
            self.question = MathProblem

    def choose(
        self,
        questions: Sequence[SolvedQuestion],
        wanted: int | None,
        greedy: Callable[[Sequence[SolvedQuestion]], list[str]],
    ) -> ChosenQuestions[SolvedQuestion]:
        if not self._is_only_missed:
            return super().choose(questions, wanted, greedy)
        missed: list[SolvedQuestion] = []
        per_round = QUESTIONS_PER_ROUND if wanted else len(questions)
        tried = 0
        while tried < len(questions) and (wanted is None or len(missed) < wanted):
            part = questions[tried : tried + per_round]
            answers = zip(part, greedy(part), strict=True)
            missed += [question for question, answer in answers if not self._read(answer, question.answer).is_correct]
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
        one_of = {k: f"at least one of {k} samples" if k > 1 else "a sample" for k in KS}
        return tuple(Metric(f"pass@{k}", f"probability that {samples} is correct") for k, samples in one_of.items())

    def score(self, responses: Sequence[ModelResponses[SolvedQuestion]], helpers: Helpers) -> TaskScores:  # noqa: ARG002
        scores = []
        for each in responses:
            readings = [
                Reading(None, False) if text is None else self._read(text, each.question.answer) for text in each.texts
            ]
            marks = ["no answer" if reading.text is None else reading.text for reading in readings]
            right = [reading.is_correct for reading in readings]
            scores.append(Score({f"pass@{k}": pass_at_k(len(right), sum(right), k) for k in KS}, marks, right))
        return TaskScores(scores, [f"answers were read by {self._extract}"] if self._extract != "number" else [])
