"""The prompts for a judge: one for each different text to grade."""

from collections.abc import Callable, Iterator, Mapping
from typing import Generic

from slrmerge.evaluation.questions import Q, prompt_id
from slrmerge.evaluation.tasks.base import ModelResponses


class JudgePrompts(Mapping[str, str], Generic[Q]):
    """Prompts by id. They contain the texts, which may be too many to hold in memory: each is made when asked for."""

    def __init__(self, make: Callable[[Q, str], str]) -> None:
        self._make = make
        self._places: dict[str, tuple[ModelResponses[Q], int]] = {}

    def add(self, responses: ModelResponses[Q], number: int, text: str) -> str:
        """Add the prompt about `text`, which is `number` of the responses; returns its id."""
        found = prompt_id(self._make(responses.question, text))
        self._places.setdefault(found, (responses, number))
        return found

    def question(self, prompt: str) -> Q:
        """The question that the text of a prompt answers."""
        return self._places[prompt][0].question

    def __getitem__(self, prompt: str) -> str:
        responses, number = self._places[prompt]
        return self._make(responses.question, responses.texts[number] or "")

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
