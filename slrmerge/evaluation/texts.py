"""The texts of an evaluation, which may be too many to hold in memory.

In verbalized sampling (arXiv 2510.01171), one reply has several of them, with their probabilities.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, overload

from slrmerge.evaluation.replies import json_values
from slrmerge.evaluation.samples import Answer, SampleFile, SampleKey, sample_keys

VERBALIZED_TOKENS = 1024
"""Minimum length of a reply with several answers (paper, appendix A.1)."""

_REQUEST = """{question}

Do not give one answer but {count} different ones, as you would if you were asked again and again, and with each the \
probability that you would give it. Reply with JSON in this form and with nothing else:
{{"answers": [{{"text": "…", "probability": 0.0}}, …]}}"""

_PLACEHOLDER = "…"
"""The text in the requested form, which is not an answer where a reply repeats it."""


def texts_of(answer: Answer, verbalized: int | None) -> Sequence[str | None]:
    """The samples in an answer: one, or `verbalized`; None for a refusal, and where verbalized sampling failed."""
    if answer.is_refusal:
        return [None] * (verbalized or 1)
    return parse_verbalized(answer.text, verbalized) if verbalized else [answer.text]


class StoredTexts(Sequence[str | None]):
    """The samples of one model for one prompt, read from the sample file at each iteration, also when it is closed.

    None for a refusal, and where verbalized sampling failed. Raises OutputError where the file was changed or deleted.
    """

    def __init__(self, file: SampleFile, model: str, prompt: str, *, requests: int, verbalized: int | None) -> None:
        self._file, self._model, self._prompt = file, model, prompt
        self._requests, self._verbalized = requests, verbalized

    def __len__(self) -> int:
        return self._requests * (self._verbalized or 1)

    def __iter__(self) -> Iterator[str | None]:
        for answer in self._file.answers(sample_keys(self._model, [self._prompt], self._requests)):
            yield from texts_of(answer, self._verbalized)

    @overload
    def __getitem__(self, at: int) -> str | None: ...
    @overload
    def __getitem__(self, at: slice) -> list[str | None]: ...
    def __getitem__(self, at: int | slice) -> str | list[str | None] | None:
        if isinstance(at, slice):
            return list(self)[at]
        request, number = divmod(range(len(self))[at], self._verbalized or 1)
        answer = self._file.answer(SampleKey(self._model, self._prompt, request))
        return texts_of(answer, self._verbalized)[number]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and not isinstance(other, str) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # compared by content, like a list

    def __repr__(self) -> str:
        return f"<{len(self)} texts of {self._model}: {list(islice(self, 2))!r}, …>"


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
