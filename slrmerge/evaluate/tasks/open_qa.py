"""Open-ended questions with many right answers: how many of them does a model know to give? (CoverageQA's form)"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar

from slrmerge.evaluate.matching import match_stated, match_whole, names_of, normalise
from slrmerge.evaluate.metrics import coverage, entropy, precision
from slrmerge.evaluate.questions import Question
from slrmerge.evaluate.replies import whole_number
from slrmerge.evaluate.tasks.base import Answered, Helpers, Metric, Scored, Task
from slrmerge.structure import Fault, Finish, Prepare, Text, filled

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
    """Names by themselves as lists of one; in a CSV cell, names between bars or a JSON list."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("[") else value.split("|")
        except ValueError:
            raise Fault("is not a JSON list of answers", "separate answers by |, or write a JSON list") from None
    if not isinstance(value, list | tuple):
        raise Fault("is not a list of answers", "write a list of names, or of lists of names")
    return [(answer,) if isinstance(answer, str) else answer for answer in filled(value)]


def _named(answers: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    """Those of the answers that have a name to themselves."""
    if not all(any(map(normalise, names)) for names in answers):
        raise Fault("has an answer without letters or digits", "give every answer a name")
    owned = set(names_of(answers).values())
    return tuple(names for index, names in enumerate(answers) if index in owned)


@dataclass(frozen=True, kw_only=True)
class OpenQuestion(Question):
    """A question and its accepted answers; each is a name, or a list of names of the same thing.

    An answer that has no name to itself stands there for the second time, and is left out.
    """

    aliases: ClassVar = {"question": ("question", "prompt")}

    question: Text
    answers: Annotated[tuple[tuple[str, ...], ...], Prepare(_as_lists), Finish(_named)]

    @property
    def text(self) -> str:
        return self.question

    @cached_property
    def names(self) -> dict[str, int]:
        """See `names_of`; every model's every response is held against them."""
        return names_of(self.answers)


class OpenQA(Task):
    """Precision, entropy of the accepted answers that were given, and the share of them that came at least once.

    A response counts as an accepted answer if it is one of its names. What is left is for the judge; without one, it
    counts if it ends in one, as in "It is Utah."
    """

    name: ClassVar = "open-qa"
    samples: ClassVar = 128
    max_tokens: ClassVar = 64
    question: ClassVar = OpenQuestion

    def metrics(self, samples: int) -> tuple[Metric, ...]:
        return (
            Metric("precision", "share of the samples that are an accepted answer"),
            Metric("entropy", "entropy of the accepted answers given, in nats"),
            Metric(f"coverage-{samples}", f"share of the accepted answers given at least once in {samples} samples"),
        )

    def score(self, answered: Sequence[Answered], helpers: Helpers) -> list[Scored]:
        judged = self._judged(answered, helpers)
        stated: Counter[str] = Counter()
        scored = []
        for each in answered:
            question, names = each.question, each.question.names
            mapped: list[int | None] = []
            for text in each.texts:
                answer = None if text is None else match_whole(text, names)
                if text is not None and answer is None and helpers.judge:
                    answer = judged.get((question.id, normalise(text)))
                elif text is not None and answer is None:
                    answer = match_stated(text, names)
                    stated[each.model] += answer is not None
                mapped.append(answer)
            values = (precision(mapped), entropy(mapped), coverage(mapped, len(question.answers)))
            metrics = [metric.name for metric in self.metrics(helpers.samples)]
            marks = ["" if answer is None else question.answers[answer][0] for answer in mapped]
            scored.append(Scored(dict(zip(metrics, values, strict=True)), marks))
        if stated.total():
            counts = ", ".join(f"{model} {count:,}" for model, count in stated.items() if count)
            helpers.notes.append(f"without a judge, sentences that end in an accepted answer count as it: {counts}")
        return scored

    def _judged(self, answered: Sequence[Answered], helpers: Helpers) -> dict[tuple[str, str], int | None]:
        """What the judge says of every response that is no accepted name, by question and normalised response."""
        if helpers.judge is None:
            return {}
        prompts: dict[tuple[str, str], str] = {}
        tops: dict[tuple[str, str], int] = {}
        for each in answered:
            question, names = each.question, each.question.names
            for text in each.texts:
                key = (question.id, normalise(text or ""))
                if text is not None and key[1] and match_whole(text, names) is None and key not in prompts:
                    prompts[key] = _prompt(question, text)
                    tops[key] = len(question.answers)
        replies = helpers.judge.replies(prompts.values())
        numbers = {key: whole_number(replies[prompt], "answer", top=tops[key]) for key, prompt in prompts.items()}
        if unread := sum(number is None for number in numbers.values()):
            helpers.notes.append(
                f"{helpers.judge.name} judged {len(numbers):,} responses; {unread:,} of its replies could not be read, "
                "and those responses count as wrong"
            )
        return {key: number - 1 if number else None for key, number in numbers.items()}


def _prompt(question: OpenQuestion, response: str) -> str:
    lines = [f"{number}. {' / '.join(names)}" for number, names in enumerate(question.answers, 1)]
    return JUDGED.format(question=question.question, answers="\n".join(lines), response=response)
