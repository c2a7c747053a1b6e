"""Verbalized sampling: several answers with their probabilities in one reply (arXiv 2510.01171)."""

from typing import Any

from slrmerge.evaluation.replies import json_values

VERBALIZED_TOKENS = 1024
"""Minimum length of a reply with several answers (paper, appendix A.1)."""

_REQUEST = """{question}

Do not give one answer but {count} different ones, as you would if you were asked again and again, and with each the \
probability that you would give it. Reply with JSON in this form and with nothing else:
{{"answers": [{{"text": "…", "probability": 0.0}}, …]}}"""

_PLACEHOLDER = "…"
"""The text in the requested form, which is not an answer where a reply repeats it."""


def verbalize(question: str, count: int) -> str:
    """The prompt that requests `count` answers to a question."""
    return _REQUEST.format(question=question, count=count)


def parse_verbalized(text: str, count: int) -> list[str | None]:
    """The `count` answers in a reply; None for each that is missing or has no text.

    The JSON may be between other words, and may be truncated: its complete answers count. Surplus answers are dropped.
    Probabilities are ignored, as no metric uses them.
    """
    found = [answer for value in json_values(text) for answer in _answers(value)][:count]
    return found + [None] * (count - len(found))


def _answers(value: Any) -> list[str | None]:
    if isinstance(value, dict) and "answers" in value:
        value = value["answers"]
    answers = value if isinstance(value, list) else [value]
    return [text if isinstance(text := answer["text"], str) else None for answer in answers if _has_text(answer)]


def _has_text(answer: Any) -> bool:
    return isinstance(answer, dict) and answer.get("text", _PLACEHOLDER) != _PLACEHOLDER
