"""Creative writing: how unlike each other are a model's poems, stories or jokes, and how good?"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import ClassVar

from slrmerge.evaluate.metrics import dissimilarity
from slrmerge.evaluate.questions import Question
from slrmerge.evaluate.replies import json_values
from slrmerge.evaluate.tasks.base import Answered, Helpers, Metric, Scored, Task
from slrmerge.structure import Text

CRITERIA = ("request", "language", "craft", "invention", "effect")
TOP = 10

RUBRIC = """\
You grade creative writing. Read the request and the response, and give whole points from 0 to 10 for each of these:

request: it does what was asked for, in the form that was asked for, and comes to an end
language: it is correct, clear, and its words are chosen rather than the first that come
craft: it uses what its form lives on, such as image, rhythm, timing, structure or point of view
invention: it has an idea of its own, and a reader could not have foretold it from the request
effect: a reader is moved, amused or made to think, as the form intends

5 is what a practised amateur writes, 8 what one would publish, 10 what one would remember. Judge the response alone: \
neither its length nor what it says about itself counts.

Request:
<request>
{request}
</request>

Response:
<response>
{response}
</response>

Reply with JSON and nothing else: {{"request": 0, "language": 0, "craft": 0, "invention": 0, "effect": 0}}"""


@dataclass(frozen=True, kw_only=True)
class Request(Question):
    """What is to be written."""

    aliases: ClassVar = {"prompt": ("prompt", "question")}

    prompt: Text

    @property
    def text(self) -> str:
        return self.prompt


class Creative(Task):
    """Diversity is 1 minus the mean cosine similarity of a prompt's samples; quality is a judge's points, as a share.

    A response that is empty or missing has no place among the others, and gets no points.
    """

    name: ClassVar = "creative"
    samples: ClassVar = 32
    max_tokens: ClassVar = 4096
    question: ClassVar = Request

    def metrics(self, samples: int) -> tuple[Metric, ...]:  # noqa: ARG002 (the same for any number)
        return (
            Metric("quality", f"the judge's points, mean of {len(CRITERIA)} criteria, of {TOP}"),
            Metric("diversity", "1 − mean cosine similarity of embeddings"),
        )

    def score(self, answered: Sequence[Answered], helpers: Helpers) -> list[Scored]:
        points = self._points(answered, helpers)
        diversity = self._diversity(answered, helpers)
        scored = []
        for each, unlike in zip(answered, diversity, strict=True):
            given = [self._given(points, each.question.prompt, text) for text in each.texts] if points else []
            known = [value for value in given if value is not None]
            quality = sum(known) / len(known) if known else nan
            marks = ["" if value is None else f"{value:.2f}" for value in given] or [""] * len(each.texts)
            scored.append(Scored({"quality": quality, "diversity": unlike}, marks))
        return scored

    @staticmethod
    def _given(points: dict[tuple[str, str], float | None], request: str, text: str | None) -> float | None:
        return points[request, text] if text and text.strip() else 0.0

    def _diversity(self, answered: Sequence[Answered], helpers: Helpers) -> list[float]:
        if helpers.embedder is None:
            helpers.notes.append("nobody measured diversity: name a model with --embeddings")
            return [nan] * len(answered)
        texts = [[text for text in each.texts if text and text.strip()] for each in answered]
        every = list(dict.fromkeys(text for group in texts for text in group))
        if not every:
            return [nan] * len(answered)
        if cut := helpers.embedder.cut_off(every):
            helpers.notes.append(f"{helpers.embedder.name} reads only the beginning of {cut:,} of {len(every):,} texts")
        vectors = helpers.embedder.embed(every)
        place = {text: number for number, text in enumerate(every)}
        return [dissimilarity(vectors[[place[text] for text in group]]) if group else nan for group in texts]

    def _points(self, answered: Sequence[Answered], helpers: Helpers) -> dict[tuple[str, str], float | None]:
        """The judge's points as a share of all, by request and response."""
        if helpers.judge is None:
            helpers.notes.append("nobody judged quality: name a judge with --judge MODEL@URL")
            return {}
        prompts = {
            (each.question.prompt, text): RUBRIC.format(request=each.question.prompt, response=text)
            for each in answered
            for text in each.texts
            if text and text.strip()
        }
        replies = helpers.judge.replies(prompts.values())
        points = {key: _share(replies[prompt]) for key, prompt in prompts.items()}
        if unread := sum(value is None for value in points.values()):
            helpers.notes.append(
                f"{helpers.judge.name} judged {len(points):,} texts; {unread:,} of its replies could not be read, and "
                "those texts have no quality"
            )
        rubric = RUBRIC.format(request="…", response="…")
        helpers.notes.append(f"{helpers.judge.name} judged by this rubric:\n{rubric}")
        return points


def _share(reply: str) -> float | None:
    """The mean of all criteria, 0 to 1; None unless a reply has points for every one."""
    found = [value for value in json_values(reply) if isinstance(value, dict) and value.keys() >= set(CRITERIA)]
    points = [found[-1][criterion] for criterion in CRITERIA] if found else []
    sound = points and all(type(value) in (int, float) and 0 <= value <= TOP for value in points)
    return sum(points) / len(points) / TOP if sound else None
