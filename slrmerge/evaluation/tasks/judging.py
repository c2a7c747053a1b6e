"""The judgement of texts: a prompt for each different one, and the grades in the replies."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from slrmerge.evaluation.questions import Q, prompt_id
from slrmerge.evaluation.requesting import Judge
from slrmerge.evaluation.tasks.base import ModelResponses

G = TypeVar("G")


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


@dataclass(frozen=True, slots=True)
class Judgements(Generic[Q, G]):
    """Grades by the key of a text, which texts that are judged alike share; None where the reply was invalid."""

    judge: str
    key: Callable[[Q, str], str | None]
    grades: Mapping[str, G | None]

    def grade(self, question: Q, text: str) -> G | None:
        """The grade of a text; None also for one that was not judged."""
        key = self.key(question, text)
        return None if key is None else self.grades.get(key)

    def notes(self, noun: str, consequence: str) -> list[str]:
        """A note on invalid replies, if there are any."""
        invalid = sum(grade is None for grade in self.grades.values())
        what = f"judged {len(self.grades):,} {noun}; {invalid:,} of its replies were invalid, and those {noun}"
        return [f"{self.judge} {what} {consequence}"] if invalid else []


def judge_texts(
    judge: Judge,
    responses: Sequence[ModelResponses[Q]],
    *,
    key: Callable[[Q, str], str | None],
    prompt: Callable[[Q, str], str],
    read: Callable[[Q, str], G | None],
) -> Judgements[Q, G]:
    """Ask the judge about one text of each key; a text whose key is None needs no judge. `read` reads a reply."""
    prompts = JudgePrompts(prompt)
    asked: dict[str, str] = {}
    for each in responses:
        for number, text in enumerate(each.texts):
            found = None if text is None else key(each.question, text)
            if text is not None and found is not None and found not in asked:
                asked[found] = prompts.add(each, number, text)
    grades = judge.grades(prompts, lambda asked_by, reply: read(prompts.question(asked_by), reply))
    return Judgements(judge.model_id, key, {found: grades[asked_by] for found, asked_by in asked.items()})
