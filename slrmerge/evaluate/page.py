"""A page for reading: what every model said to each prompt, side by side."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby, islice
from math import isnan

from slrmerge.evaluate.report import Report, caption, table_rows
from slrmerge.evaluate.tasks import Answered, Scored

PROMPTS_SHOWN = 100
TEXTS_SHOWN = 12
"""Different texts of one model under one prompt."""


@dataclass(frozen=True, slots=True)
class Said:
    """A text, how often it came, and what it counts as."""

    text: str | None
    times: int
    mark: str


@dataclass(frozen=True, slots=True)
class Column:
    """What one model said to one prompt: the most frequent texts first, how many more there are, its metrics."""

    model: str
    said: Sequence[Said]
    more: int
    metrics: str


def page(report: Report) -> str:
    """The page as HTML, with nothing in it that is fetched but the chart beside it."""
    from jinja2 import Environment

    source = (files("slrmerge.evaluate") / "page.html.jinja").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    pairs = zip(report.answered, report.scored, strict=True)
    prompts = [
        (group[0][0].question.text, [_column(*pair) for pair in group])
        for group in islice(map(list, _by_question(pairs)), PROMPTS_SHOWN)
    ]
    return template.render(
        report=report,
        caption=caption(report),
        table=table_rows(report),
        prompts=prompts,
        more=report.prompts - len(prompts),
    )


def _by_question(pairs: Iterable[tuple[Answered, Scored]]) -> Iterable[Iterable[tuple[Answered, Scored]]]:
    return (group for _, group in groupby(pairs, key=lambda pair: pair[0].question.id))


def _column(answered: Answered, scored: Scored) -> Column:
    marks = dict(zip(answered.texts, scored.marks, strict=True))
    texts = Counter(answered.texts).most_common()
    said = [Said(text, times, marks[text]) for text, times in texts[:TEXTS_SHOWN]]
    metrics = ", ".join(f"{name} {value:.3f}" for name, value in scored.metrics.items() if not isnan(value))
    return Column(answered.model, said, len(texts) - len(said), metrics)
