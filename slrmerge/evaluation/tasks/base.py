"""The interface of a task."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import ClassVar, Generic, Literal

from slrmerge.evaluation.embeddings import Embedder
from slrmerge.evaluation.metrics import Metric
from slrmerge.evaluation.options import EvaluationOptions
from slrmerge.evaluation.questions import Q
from slrmerge.evaluation.requesting import Judge

Plot = Literal["bars", "curves"]
"""How a task's metrics are drawn: bars for each, or one curve over k."""


@dataclass(frozen=True, slots=True)
class ModelResponses(Generic[Q]):
    """One model's responses to a question, in the order of its samples; there may be none.

    None for a refusal, and where verbalized sampling failed.
    """

    model: str
    question: Q
    texts: Sequence[str | None]


@dataclass(frozen=True, slots=True)
class Score:
    """The metrics of one ModelResponses, NaN where undefined, and a mark for each text, such as the matched answer.

    `right` says for each text whether it is right; None for a task that has no right and wrong.
    """

    metrics: Mapping[str, float]
    marks: Sequence[str]
    right: Sequence[bool] | None = None

    def verdicts(self) -> Iterator[tuple[str, bool | None]]:
        """The mark of each text, and whether the text is right."""
        right = repeat(None, len(self.marks)) if self.right is None else self.right
        return zip(self.marks, right, strict=True)


@dataclass(frozen=True, slots=True)
class TaskScores:
    """A Score for each ModelResponses, and notes for the reader of the results."""

    scores: Sequence[Score]
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class ChosenQuestions(Generic[Q]):
    """The questions to ask, and a note on how they were chosen."""

    questions: Sequence[Q]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Helpers:
    """What a task may score with. `samples` is the number of samples per question."""

    samples: int
    judge: Judge | None = None
    embedder: Embedder | None = None


class Task(ABC, Generic[Q]):
    """Questions of one form, and how answers to them are scored. `samples` and `max_tokens` are the paper's."""

    name: ClassVar[str]
    samples: ClassVar[int]
    max_tokens: ClassVar[int]
    plot: ClassVar[Plot] = "bars"
    question: type[Q]

    def __init__(self, options: EvaluationOptions | None = None) -> None:
        self.options = options or EvaluationOptions()

    def choose(
        self,
        questions: Sequence[Q],
        wanted: int | None,
        greedy: Callable[[Sequence[Q]], list[str]],  # noqa: ARG002 (for overriding)
    ) -> ChosenQuestions[Q]:
        """Choose `wanted` of the questions, or all; `greedy` returns the first model's answers by greedy decoding."""
        return ChosenQuestions(questions[:wanted])

    @abstractmethod
    def metrics(self, samples: int) -> tuple[Metric, ...]:
        """The metrics for this number of samples per prompt, in the order of the table."""

    @abstractmethod
    def score(self, responses: Sequence[ModelResponses[Q]], helpers: Helpers) -> TaskScores:
        """Score each of `responses`."""
