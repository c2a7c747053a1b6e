"""Verbalized sampling: several answers with their probabilities in one call (arXiv 2510.01171), in words of our own."""

from typing import Any

from slrmerge.evaluate.replies import json_values

_REQUEST = """{question}

Do not give one answer but {count} different ones, as you would if you were asked again and again, and with each the \
probability that you would give it. Reply with JSON in this form and with nothing else:
{{"answers": [{{"text": "…", "probability": 0.0}}, …]}}"""

_EXAMPLE = "…"
"""What the form has for a text, which is no answer where a reply repeats it."""


def verbalize(question: str, count: int) -> str:
    """The prompt that asks for `count` answers to a question."""
    return _REQUEST.format(question=question, count=count)


def parse_verbalized(text: str, count: int) -> list[str | None]:
    """The answers in a reply, `count` of them: None for each that is missing, or has no text.

    The JSON may stand between other words, and may be cut off: what is whole of it counts. More answers than were asked
    for are left out. What probabilities they are given does not matter to any metric, nor whether they are.
    """
    found = [answer for value in json_values(text) for answer in _answers(value)][:count]
    return found + [None] * (count - len(found))


def _answers(value: Any) -> list[str | None]:
    if isinstance(value, dict) and "answers" in value:
        value = value["answers"]
    answers = value if isinstance(value, list) else [value]
    return [text if isinstance(text := answer["text"], str) else None for answer in answers if _has_text(answer)]


def _has_text(answer: Any) -> bool:
    return isinstance(answer, dict) and answer.get("text", _EXAMPLE) != _EXAMPLE
