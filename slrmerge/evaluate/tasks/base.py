"""What a task is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from slrmerge.evaluate.embeddings import Embedder
from slrmerge.evaluate.judge import Judge
from slrmerge.evaluate.questions import Question

Plot = Literal["bars", "curves"]
"""How a task's metrics are drawn: side by side, or as one that grows with k."""


class Metric(NamedTuple):
    """A number that a model gets for each prompt: its name, and what it is in words. More is better."""

    name: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Answered:
    """A question and what one model said to it, in the order of its samples; None for what verbalized sampling did not
    give. There may be no texts at all."""

    model: str
    question: Any
    texts: Sequence[str | None]


@dataclass(frozen=True, slots=True)
class Scored:
    """The metrics of one Answered, NaN where one has no value, and for every text what a reader should know of it."""

    metrics: Mapping[str, float]
    marks: Sequence[str]


@dataclass
class Helpers:
    """What a task may be given to measure with, and the remarks that a report is to make. `samples` are asked for."""

    samples: int
    judge: Judge | None = None
    embedder: Embedder | None = None
    notes: list[str] = field(default_factory=list)


class Task(ABC):
    """Questions of one form, and what answers to them are worth. `samples` and `max_tokens` are the paper's."""

    name: ClassVar[str]
    samples: ClassVar[int]
    max_tokens: ClassVar[int]
    question: ClassVar[type[Question]]
    plot: ClassVar[Plot] = "bars"

    def choose(
        self,
        questions: Sequence[Any],
        wanted: int | None,
        greedy: Callable[[Sequence[Any]], list[str]],  # noqa: ARG002 (a hook)
    ) -> tuple[list[Any], str]:
        """Which questions to ask, `wanted` of them or all, and what a reader has to know of that.

        `greedy` gives the first model's answers without chance.
        """
        return list(questions[:wanted]), ""

    @abstractmethod
    def metrics(self, samples: int) -> tuple[Metric, ...]:
        """The metrics, in the order of the table, for so many samples a prompt."""

    @abstractmethod
    def score(self, answered: Sequence[Answered], helpers: Helpers) -> list[Scored]:
        """What each of `answered` is worth."""
