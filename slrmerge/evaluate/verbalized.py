"""Verbalized sampling: several answers with their probabilities in one call (arXiv 2510.01171), in words of our own."""

from typing import Any

from slrmerge.evaluate.replies import json_values

_REQUEST = """{question}

Do not give one answer but {count} different ones, as you would if you were asked again and again, and with each the \
probability that you would give it. Reply with JSON in this form and with nothing else:
{{"answers": [{{"text": "…", "probability": 0.0}}, …]}}"""


def verbalize(question: str, count: int) -> str:
    """The prompt that asks for `count` answers to a question."""
    return _REQUEST.format(question=question, count=count)


def parse_verbalized(text: str, count: int) -> list[str | None]:
    """The answers in a reply, `count` of them: None for each that is missing, or has no text or no probability.

    The JSON may stand between other words; more answers than were asked for are left out.
    """
    found: list[str | None] = []
    for value in json_values(text):
        answers = value.get("answers") if isinstance(value, dict) else value
        if isinstance(answers, list):
            found = [_text(answer) for answer in answers[:count]]
        if any(answer is not None for answer in found):
            break
    return found + [None] * (count - len(found))


def _text(answer: Any) -> str | None:
    if not isinstance(answer, dict):
        return None
    text, probability = answer.get("text"), answer.get("probability")
    sound = isinstance(text, str) and isinstance(probability, int | float) and 0 <= probability <= 1
    return text if sound else None
