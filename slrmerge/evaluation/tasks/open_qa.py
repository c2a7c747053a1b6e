"""Open-ended questions with many correct answers: how many of them does a model give? (the form of CoverageQA)"""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from math import inf
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field

from slrmerge.evaluation.matching import match_stated, match_whole, names_of, normalise
from slrmerge.evaluation.metrics import Metric, coverage, entropy, precision
from slrmerge.evaluation.questions import Question, Text, prompt_id
from slrmerge.evaluation.replies import whole_number
from slrmerge.evaluation.tasks.base import Helpers, ModelResponses, Score, Task, TaskScores
from slrmerge.evaluation.tasks.judging import judge_texts
from slrmerge.io.model import InvalidValue
from slrmerge.io.strict_json import InvalidJsonError, parse_json

JUDGED = """\
Somebody was asked a question that has many right answers. Decide which of the accepted answers, numbered below, the \
response gives. Another spelling, another name for the same thing, or words around it do not matter. Something that is \
only near to an accepted answer does not count, and neither does a response that leaves open which one is meant.

Question: {question}

Accepted answers:
{answers}

Response:
<response>
{response}
</response>

Reply with the number of the accepted answer that the response gives, or with 0 where it gives none of them, as JSON \
and nothing else: {{"answer": NUMBER}}"""


def _as_lists(value: Any) -> list[Any]:
    """Single names as lists of one; the text of a CSV cell is a JSON list, or names separated by |."""
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.lstrip().startswith("[") else value.split("|")
        except InvalidJsonError:
            what, remedy = "is not a JSON list of answers", "separate answers by |, or write a JSON list"
            raise InvalidValue("invalid-json", what, remedy) from None
    if not isinstance(value, list | tuple):
        raise InvalidValue("wrong-type", "is not a list of answers", "expected a list of names, or of lists of names")
    return [(answer,) if isinstance(answer, str) else answer for answer in value]


def _named(answers: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    """The answers without those whose names all belong to earlier ones."""
    if not all(any(map(normalise, names)) for names in answers):
        raise InvalidValue("unnamed-answer", "has an answer without letters or digits", "give every answer a name")
    owners = set(names_of(answers).values())
    return tuple(names for index, names in enumerate(answers) if index in owners)


Answers = Annotated[
    tuple[tuple[str, ...], ...], Field(min_length=1), BeforeValidator(_as_lists), AfterValidator(_named)
]


class OpenQuestion(Question):
    """A question and its accepted answers; each is a name, or a list of names of the same thing.

    Repeated answers are dropped.
    """

    text: Text = Field(validation_alias=AliasChoices("question", "prompt"))
    answers: Answers

    @property
    def reference(self) -> list[str]:
        """See `Question`; of each answer the first name."""
        return [names[0] for names in self.answers]

    @cached_property
    def names(self) -> dict[str, int]:
        """See `names_of`."""
        return names_of(self.answers)


class OpenQA(Task[OpenQuestion]):
    """Precision, entropy of the accepted answers given, and the share of them given at least once.

    A response matches an accepted answer if it is one of its names. The judge decides about the others; without a
    judge, a response also matches an answer that it ends in, as in "It is Utah."
    """

    name: ClassVar = "open-qa"
    samples: ClassVar = 128
    max_tokens: ClassVar = 64
    question = OpenQuestion

    def metrics(self, samples: int) -> tuple[Metric, ...]:
        return (
            Metric("precision", "share of the samples that are an accepted answer"),
            Metric("entropy", "entropy of the accepted answers given, in nats", most=inf),
            Metric(f"coverage-{samples}", f"share of the accepted answers given at least once in {samples} samples"),
        )

    def score(self, responses: Sequence[ModelResponses[OpenQuestion]], helpers: Helpers) -> TaskScores:
        judge = helpers.judge
        judged = judge_texts(judge, responses, key=_key, prompt=_prompt, read=_number) if judge else None
        names_of_metrics = [metric.name for metric in self.metrics(helpers.samples)]
        stated: Counter[str] = Counter()
        scores = []
        for each in responses:
            question, names = each.question, each.question.names
            matched: list[int | None] = []
            for text in each.texts:
                answer = None if text is None else match_whole(text, names)
                if text is not None and answer is None and judged:
                    number = judged.grade(question, text)
                    answer = number - 1 if number else None
                elif text is not None and answer is None:
                    answer = match_stated(text, names)
                    stated[each.model] += answer is not None
                matched.append(answer)
            values = (precision(matched), entropy(matched), coverage(matched, len(question.answers)))
            marks = ["" if answer is None else question.answers[answer][0] for answer in matched]
            right = [answer is not None for answer in matched]
            scores.append(Score(dict(zip(names_of_metrics, values, strict=True)), marks, right))
        notes = judged.notes("responses", "count as wrong") if judged else []
        if stated.total():
            counts = ", ".join(f"{model} {count:,}" for model, count in stated.items() if count)
            notes.append(f"without a judge, sentences that end in an accepted answer count as that answer: {counts}")
        return TaskScores(scores, notes)


def _key(question: OpenQuestion, text: str) -> str | None:
    """Identifies the responses to a question that are judged alike; None for what is an accepted name, or blank."""
    normalised = normalise(text)
    is_clear = not normalised or normalised in question.names
    return None if is_clear else prompt_id(f"{question.id} {normalised}")


def _number(question: OpenQuestion, reply: str) -> int | None:
    return whole_number(reply, "answer", top=len(question.answers))


def _prompt(question: OpenQuestion, response: str) -> str:
    lines = [f"{number}. {' / '.join(names)}" for number, names in enumerate(question.answers, 1)]
    return JUDGED.format(question=question.text, answers="\n".join(lines), response=response)
