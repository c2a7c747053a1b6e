"""Diversity of a prompt's samples as texts, for every task: distinct-n and compression ratio."""

from collections.abc import Sequence
from math import inf

from slrmerge.evaluation.metrics import compression_ratio, distinct
from slrmerge.evaluation.tasks.base import Metric

LEXICAL = (
    Metric("distinct-1", "share of the words of all samples that are different", in_table=False),
    Metric("distinct-2", "share of the pairs of neighbouring words that are different", in_table=False),
    Metric(
        "compression-ratio",
        "size of all samples by their size after gzip; less is more diverse",
        in_table=False,
        most=inf,
        less_is_better=True,
    ),
)


def lexical_metrics(texts: Sequence[str | None]) -> dict[str, float]:
    """The values of `LEXICAL`, without missing and empty samples; NaN where undefined."""
    known = [text for text in texts if text and text.strip()]
    values = (distinct(known, 1), distinct(known, 2), compression_ratio(known))
    return dict(zip((metric.name for metric in LEXICAL), values, strict=True))
