"""An HTML page of the samples: the responses of all models to each prompt, side by side."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby, islice
from math import isnan
from typing import Any

from slrmerge.evaluation.result import EvaluationResult
from slrmerge.evaluation.tasks.base import ModelResponses, Score
from slrmerge.io.text import IN_PROSE, printable

PROMPTS_SHOWN = 100
CHARACTERS_SHOWN = 8_000_000
"""Of the texts of all prompts that are shown: a browser cannot show a much longer page."""

TEXTS_SHOWN = 12
"""Distinct texts of one model for one prompt."""


@dataclass(frozen=True, slots=True)
class ShownText:
    """A text, its count, and its mark."""

    text: str | None
    count: int
    mark: str


@dataclass(frozen=True, slots=True)
class Column:
    """One model's responses to one prompt: the most frequent texts, the number of further ones, the metrics."""

    model: str
    texts: Sequence[ShownText]
    more: int
    metrics: str


def page(result: EvaluationResult) -> str:
    """The page as HTML; it loads nothing but the chart beside it."""
    from jinja2 import Environment

    source = (files("slrmerge.evaluation") / "page.html.jinja").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    scored = zip(result.responses, result.scores, strict=True)
    by_prompt = (list(group) for _, group in groupby(scored, key=lambda pair: pair[0].question.id))
    prompts: list[tuple[str, list[Column]]] = []
    characters = 0
    for group in islice(by_prompt, PROMPTS_SHOWN):
        columns = [_column(responses, score) for responses, score in group]
        characters += sum(len(shown.text or "") for column in columns for shown in column.texts)
        if prompts and characters > CHARACTERS_SHOWN:
            break
        prompts.append((group[0][0].question.text, columns))
    text = template.render(
        result=result, table=result.table_rows(), prompts=prompts, more=result.prompts - len(prompts)
    )
    return printable(text, keep=IN_PROSE)


def _column(responses: ModelResponses[Any], score: Score) -> Column:
    marks = dict(zip(responses.texts, score.marks, strict=True))
    counts = Counter(responses.texts).most_common()
    texts = [ShownText(text, count, marks[text]) for text, count in counts[:TEXTS_SHOWN]]
    metrics = ", ".join(f"{name} {value:.3f}" for name, value in score.metrics.items() if not isnan(value))
    return Column(responses.model, texts, len(counts) - len(texts), metrics)
