"""An HTML page of the samples: the responses of all models to each prompt, side by side."""

from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from math import isnan
from typing import Any

from slrmerge.evaluation.result import EvaluationResult
from slrmerge.evaluation.tasks.base import ModelResponses, Score
from slrmerge.io.figures import colour_names
from slrmerge.io.page import render_page

PROMPTS_SHOWN = 100
CHARACTERS_SHOWN = 8_000_000
"""Of the texts of all prompts that are shown: a browser cannot show a much longer page."""

TEXTS_SHOWN = 12
"""Distinct texts of one model for one prompt."""


@dataclass(frozen=True, slots=True)
class ShownText:
    """A text, its count, its mark, and whether it is right; None for a task that has no right and wrong."""

    text: str | None
    count: int
    mark: str
    is_right: bool | None


@dataclass(frozen=True, slots=True)
class Column:
    """One model's responses to one prompt: the most frequent texts, the number of further ones, the metrics."""

    model: str
    texts: Sequence[ShownText]
    more: int
    metrics: str


def page(result: EvaluationResult, chart: bytes = b"") -> str:
    """The page as HTML, with `chart`, an SVG; it loads nothing, and its Content-Security-Policy forbids it to."""
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
    return render_page(
        "slrmerge.evaluation",
        "page.html.jinja",
        result=result,
        table=result.table_rows(),
        colours={model: f"var(--{name})" for model, name in colour_names(result.models).items()},
        chart=b64encode(chart).decode(),
        prompts=prompts,
        more=result.prompts - len(prompts),
    )


def _column(responses: ModelResponses[Any], score: Score) -> Column:
    given = list(responses.texts)
    verdicts = dict(zip(given, score.verdicts(), strict=True))
    counts = Counter(given).most_common()
    texts = [_shown(text, count, *verdicts[text]) for text, count in counts[:TEXTS_SHOWN]]
    metrics = ", ".join(f"{name} {value:.3f}" for name, value in score.metrics.items() if not isnan(value))
    return Column(responses.model, texts, len(counts) - len(texts), metrics)


def _shown(text: str | None, count: int, mark: str, is_right: bool | None) -> ShownText:
    """Without a mark that only repeats the text."""
    return ShownText(text, count, "" if mark == (text or "").strip() else mark, is_right)
