"""The texts of an evaluation, which may be too many to hold in memory."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import overload

from slrmerge.evaluation.samples import Answer, SampleFile, SampleKey, sample_keys
from slrmerge.evaluation.verbalized import parse_verbalized


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
