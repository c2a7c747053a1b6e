"""Proxy tasks: cheap questions whose answers measure a model's quality and diversity (paper, section 3.2).

CRC is a class, the other tasks are YAML files: those in `tasks`, and any that a user writes.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, Field

from slrmerge.errors import DataError, SlrmergeError
from slrmerge.io.model import InvalidValue, Model, validate_as
from slrmerge.io.sizes import shorten
from slrmerge.io.strict_yaml import TASK_FILE, read_mapping
from slrmerge.searching.options import TASK_NAMES

SHORTEST_RANGE = 4
"""The minimum number of characters in a range; shorter ones leave little diversity to measure."""

DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ONLY = "Do not include anything else in your reply."
DIGIT_TEXT = "Generate a random integer in the range [{first}, {last}]. " + _ONLY
LETTER_TEXT = "Generate a random letter from {first} to {last} (inclusive). " + _ONLY
"""The paper's prompts, with places for the first and the last character of a range."""

HELD_OUT_DIGIT_TEXTS = (
    "Pick a random number from {first} to {last}. Reply with the number only.",
    "Give me any integer in [{first}, {last}]. " + _ONLY,
    "Choose a random digit between {first} and {last} (both included). Reply with the digit only.",
)
HELD_OUT_LETTER_TEXTS = (
    "Pick a random letter from {first} to {last}. Reply with the letter only.",
    "Give me any letter in [{first}, {last}]. " + _ONLY,
    "Choose a random capital letter between {first} and {last} (both included). Reply with the letter only.",
)
"""Other wordings, for prompts that are not used to select."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its valid answers, each of one token or more."""

    text: str
    answers: tuple[str, ...]


class Scores(NamedTuple):
    """Quality and diversity, each of shape (candidates, prompts), float64."""

    quality: NDArray[np.float64]
    diversity: NDArray[np.float64]


class ProxyTask(Protocol):
    """Questions, and scores from the probabilities of their valid answers."""

    def questions(self) -> tuple[Question, ...]: ...

    def held_out_questions(self) -> tuple[Question, ...]:
        """Other questions of the same kind, which are not used to select; none where the task has none."""
        ...

    def score(self, log_probs: NDArray[np.float64]) -> Scores:
        """Scores from the log-probabilities of valid answers.

        `log_probs` has the shape (candidates, prompts, answers), NaN past a prompt's own answers.
        """
        ...


def score(log_probs: NDArray[np.float64]) -> Scores:
    """Q is the probability of a valid answer, D the entropy (nats) of the distribution over valid answers."""
    probabilities = np.exp(log_probs)
    quality = np.nansum(probabilities, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):  # without probability on valid answers diversity is 0
        share = probabilities / quality[..., None]
        diversity = -np.nansum(np.where(share > 0, share * np.log(share), 0.0), axis=-1)
    return Scores(quality, diversity)


class ConstrainedRandomCharacter:
    """CRC: a random digit or letter from a range; 20 prompts of each kind, the same in every run.

    Every answer is one token of any usual tokenizer, so Q is the probability that the first token is valid, as in the
    paper.
    """

    prompts_per_kind = 20

    def questions(self) -> tuple[Question, ...]:
        rng = random.Random(0)
        return tuple(question for kind in self._kinds() for question in kind.questions(rng))

    def held_out_questions(self) -> tuple[Question, ...]:
        """As many questions of each kind, about other ranges in other words; digits have eight other ranges."""
        rng = random.Random(0)
        return tuple(question for kind in self._kinds() for question in kind.held_out_questions(rng))

    def _kinds(self) -> Iterator["RangeQuestions"]:
        for values, text, others in (
            (DIGITS, DIGIT_TEXT, HELD_OUT_DIGIT_TEXTS),
            (LETTERS, LETTER_TEXT, HELD_OUT_LETTER_TEXTS),
        ):
            yield RangeQuestions(text=text, values=tuple(values), count=self.prompts_per_kind, held_out_texts=others)

    def score(self, log_probs: NDArray[np.float64]) -> Scores:
        return score(log_probs)


@dataclass(frozen=True)
class ListedTask:
    """A task whose questions are listed."""

    listed: tuple[Question, ...]
    held_out: tuple[Question, ...] = ()

    def questions(self) -> tuple[Question, ...]:
        return self.listed

    def held_out_questions(self) -> tuple[Question, ...]:
        return self.held_out

    def score(self, log_probs: NDArray[np.float64]) -> Scores:
        return score(log_probs)


def _check_text(value: object) -> object:
    if isinstance(value, int | float) or value is None:
        raise InvalidValue("wrong-type", f"expected a string, got {shorten(value)}", "put it in quotes")
    if isinstance(value, str) and value.strip() != value:
        raise InvalidValue("invalid-value", f"{shorten(value)} starts or ends with a space", "leave the space out")
    return value


def _check_distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    for value, count in Counter(values).items():
        if count > 1:
            raise InvalidValue("duplicate", f"{shorten(value)} is listed {count} times", "list it once")
    if len(values) < 2:
        raise InvalidValue("too-few-answers", "needs two answers or more", "one answer has no diversity")
    return values


_Text = Annotated[str, BeforeValidator(_check_text), Field(min_length=1, strict=True)]
_Answers = Annotated[tuple[_Text, ...], AfterValidator(_check_distinct)]


class ListedQuestion(Model):
    """A question with its valid answers."""

    text: _Text = Field(description="The question, as the user asks it.")
    answers: _Answers = Field(description="The valid answers.")


class RangeQuestions(Model):
    """Questions about ranges of an ordered list: from one value to another, both included."""

    text: _Text = Field(description="The question, with {first} and {last} in the place of the ends of a range.")
    values: _Answers = Field(description="All values, in their order; the valid answers are those in the range.")
    shortest: int = Field(default=SHORTEST_RANGE, ge=2, strict=True, description="Minimum number of values in a range.")
    count: int = Field(default=20, ge=1, le=1000, strict=True, description="Number of questions.")
    held_out_texts: tuple[_Text, ...] = Field(
        default=(), description="Other wordings, for held-out questions about other ranges; default: the same text."
    )

    def model_post_init(self, _: Any) -> None:
        for text, place in product((self.text, *self.held_out_texts), ("{first}", "{last}")):
            if place not in text:
                what, remedy = f"the text {shorten(text)} has no {place}", f"write {place} where the range is named"
                raise InvalidValue("no-place", what, remedy)
        if self.shortest > len(self.values):
            what = f"there are only {len(self.values)} values for ranges of {self.shortest} or more"
            raise InvalidValue("out-of-range", what, "give a smaller number as shortest")

    def questions(self, rng: random.Random) -> Iterator[Question]:
        for pair in _ranges(len(self.values), self.shortest, self.count, rng):
            yield self._question(self.text, pair)

    def held_out_questions(self, rng: random.Random) -> Iterator[Question]:
        """Questions about other ranges than those of `questions` with an equal generator."""
        asked = set(_ranges(len(self.values), self.shortest, self.count, rng))
        others = [pair for pair in _all_ranges(len(self.values), self.shortest) if pair not in asked]
        for pair, text in _in_turn(others, self.held_out_texts or (self.text,), self.count):
            yield self._question(text, pair)

    def _question(self, text: str, pair: tuple[int, int]) -> Question:
        answers = self.values[pair[0] : pair[1] + 1]
        return Question(text.replace("{first}", answers[0]).replace("{last}", answers[-1]), answers)


class TaskFile(Model):
    """A proxy task as YAML: questions, and templates of questions."""

    error: ClassVar[type[SlrmergeError]] = DataError

    questions: tuple[ListedQuestion, ...] = Field(default=(), description="Questions with their valid answers.")
    ranges: tuple[RangeQuestions, ...] = Field(default=(), description="Templates with ranges.")
    held_out: tuple[ListedQuestion, ...] = Field(
        default=(), description="Questions that are not used to select; the selection answers them afterwards."
    )

    def model_post_init(self, _: Any) -> None:
        task = self.task()
        if not task.listed:
            raise InvalidValue("empty", "contains no questions", "list questions or ranges")
        _check_distinct_texts(question.text for question in (*task.listed, *task.held_out))

    def task(self) -> ListedTask:
        listed, held_out = (
            [Question(each.text, each.answers) for each in questions] for questions in (self.questions, self.held_out)
        )
        return ListedTask(
            (*listed, *(question for each in self.ranges for question in each.questions(random.Random(0)))),
            (*held_out, *(question for each in self.ranges for question in each.held_out_questions(random.Random(0)))),
        )


def load_task(path: Path) -> ListedTask:
    """The task in a YAML file. Raises DataError with every problem, each with its place in the file."""
    return validate_as(TaskFile, read_mapping(path, TASK_FILE), str(path)).task()


def make_task(name: str) -> ProxyTask:
    """The task of this name, or the one in this file. Raises DataError."""
    return TASKS[name]() if name in TASKS else load_task(Path(name))


def _all_ranges(values: int, shortest: int) -> list[tuple[int, int]]:
    """The places of the first and the last value of every range."""
    return [(first, last) for first in range(values) for last in range(first + shortest - 1, values)]


def _ranges(values: int, shortest: int, count: int, rng: random.Random) -> Sequence[tuple[int, int]]:
    """`count` ranges, or all where there are fewer."""
    ends = _all_ranges(values, shortest)
    return sorted(rng.sample(ends, min(count, len(ends))))


def _in_turn(
    ends: Sequence[tuple[int, int]], texts: Sequence[str], count: int
) -> Iterator[tuple[tuple[int, int], str]]:
    """`count` ranges with a text each, both in turn; where ranges are few, each comes with several of the texts."""
    chosen = sorted(random.Random(1).sample(ends, min(count, len(ends))))
    for number in range(min(count, len(chosen) * len(texts))):
        turn, place = divmod(number, len(chosen))
        yield chosen[place], texts[(place + turn) % len(texts)]


def _check_distinct_texts(texts: Iterable[str]) -> None:
    for text, count in Counter(texts).items():
        if count > 1:
            raise InvalidValue("duplicate", f"the question {shorten(text)} is asked {count} times", "ask it once")


_FOLDER = Path(__file__).with_name("tasks")

TASKS: dict[str, Callable[[], ProxyTask]] = {
    name: ConstrainedRandomCharacter if name == "crc" else partial(load_task, _FOLDER / f"{name}.yaml")
    for name in TASK_NAMES
}
"""The tasks by the names that options give them."""
