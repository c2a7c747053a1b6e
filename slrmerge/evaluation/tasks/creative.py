"""Creative writing: how different are a model's poems, stories or jokes from each other, and how good?"""

from collections.abc import Sequence
from itertools import chain
from math import inf, nan
from typing import ClassVar, NamedTuple

import numpy as np
from pydantic import AliasChoices, Field

from slrmerge.evaluation.metrics import Metric, dissimilarity, vendi_score
from slrmerge.evaluation.questions import Question, Text, prompt_id
from slrmerge.evaluation.replies import json_values
from slrmerge.evaluation.tasks.base import Helpers, ModelResponses, Score, Task, TaskScores
from slrmerge.evaluation.tasks.judging import Judgements, judge_texts

CRITERIA = ("request", "language", "craft", "invention", "effect")
TOP = 10

RESPONSES_AT_ONCE = 128
"""Prompts and models whose texts are embedded at once; more embeddings are not held in memory."""

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


class WritingPrompt(Question):
    """What to write."""

    text: Text = Field(validation_alias=AliasChoices("prompt", "question"))


class Diversity(NamedTuple):
    """How different the texts of a ModelResponses are; NaN where it is undefined."""

    dissimilarity: float = nan
    vendi: float = nan


class Creative(Task[WritingPrompt]):
    """Diversity is 1 minus the mean cosine similarity of a prompt's samples; quality is the judge's share of points.

    The Vendi score counts different samples. An empty or missing response is left out of both and has quality 0.
    """

    name: ClassVar = "creative"
    samples: ClassVar = 32
    max_tokens: ClassVar = 4096
    question = WritingPrompt

    def metrics(self, samples: int) -> tuple[Metric, ...]:  # noqa: ARG002 (the same for any number)
        return (
            Metric("quality", f"the judge's points out of {TOP}, as a share, mean of {len(CRITERIA)} criteria"),
            Metric("diversity", "1 − mean cosine similarity of embeddings", most=2),
            Metric(
                "vendi",
                "Vendi score: effective number of different samples, by cosine similarity of embeddings",
                most=inf,
            ),
        )

    def score(self, responses: Sequence[ModelResponses[WritingPrompt]], helpers: Helpers) -> TaskScores:
        judge, notes = helpers.judge, ["quality was not measured; pass --judge"]
        judged = None
        if judge:
            judged = judge_texts(judge, responses, key=_key, prompt=_prompt, read=_share)
            rubric = RUBRIC.format(request="…", response="…")
            notes = [*judged.notes("texts", "have no quality"), f"{judge.model_id} used this rubric:\n{rubric}"]
        diversities, more_notes = _diversities(responses, helpers)
        scores = []
        for each, diversity in zip(responses, diversities, strict=True):
            shares = [None if judged is None else _share_of(judged, each.question, text) for text in each.texts]
            known = [share for share in shares if share is not None]
            quality = sum(known) / len(known) if known else nan
            marks = ["" if share is None else f"{share:.2f}" for share in shares]
            values = {"quality": quality, "diversity": diversity.dissimilarity, "vendi": diversity.vendi}
            scores.append(Score(values, marks))
        return TaskScores(scores, [*notes, *more_notes])


def _diversities(
    responses: Sequence[ModelResponses[WritingPrompt]], helpers: Helpers
) -> tuple[list[Diversity], list[str]]:
    """The diversity of each of `responses`, and notes."""
    embedder = helpers.embedder
    if embedder is None:
        return [Diversity()] * len(responses), ["diversity was not measured; pass --embeddings"]
    found: list[Diversity] = []
    texts, truncated, refused = 0, 0, 0
    for start in range(0, len(responses), RESPONSES_AT_ONCE):
        groups = [
            [text for text in each.texts if text and text.strip()]
            for each in responses[start : start + RESPONSES_AT_ONCE]
        ]
        place = {text: number for number, text in enumerate(dict.fromkeys(chain.from_iterable(groups)))}
        vectors = embedder.embed(list(place)) if place else np.empty((0, 0))
        is_refused = np.isnan(vectors[:, :1]).ravel()
        for group in groups:
            own = vectors[[place[text] for text in group if not is_refused[place[text]]]]
            found.append(Diversity(dissimilarity(own), vendi_score(own)))
        texts, refused = texts + len(place), refused + int(is_refused.sum())
        truncated += int(embedder.truncated(list(place)).sum())
    counts = {
        f"truncates {truncated:,} of {texts:,} texts": truncated,
        f"refuses {refused:,} of {texts:,} texts, which diversity leaves out": refused,
    }
    return found, [f"{embedder.model_id} {what}" for what, count in counts.items() if count]


def _key(question: WritingPrompt, text: str) -> str | None:
    """The id of the prompt about a text; None for a blank one."""
    return prompt_id(_prompt(question, text)) if text.strip() else None


def _prompt(question: WritingPrompt, response: str) -> str:
    return RUBRIC.format(request=question.text, response=response)


def _share_of(judged: Judgements[WritingPrompt, float], question: WritingPrompt, text: str | None) -> float | None:
    return judged.grade(question, text) if text and text.strip() else 0.0


def _share(_: WritingPrompt, reply: str) -> float | None:
    """The mean over all criteria, 0 to 1; None unless a reply has points for each."""
    found = [value for value in json_values(reply) if isinstance(value, dict) and value.keys() >= set(CRITERIA)]
    points = [found[-1][criterion] for criterion in CRITERIA] if found else []
    is_valid = points and all(type(value) in (int, float) and 0 <= value <= TOP for value in points)
    return sum(points) / len(points) / TOP if is_valid else None
