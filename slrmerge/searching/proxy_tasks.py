"""Proxy tasks: cheap questions whose answers measure a model's quality and diversity (paper, section 3.2).

A task is one class, registered in `TASKS`.
"""

import random
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

SHORTEST_RANGE = 4
"""The minimum number of characters in a range; shorter ones leave little diversity to measure."""

DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ONLY = "Do not include anything else in your reply."
DIGIT_TEXT = "Generate a random integer in the range [{}, {}]. " + _ONLY
LETTER_TEXT = "Generate a random letter from {} to {} (inclusive). " + _ONLY
"""The paper's prompts, with places for the first and the last character of a range."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its valid answers, each of which must be a single token."""

    text: str
    answers: tuple[str, ...]


class Scores(NamedTuple):
    """Quality and diversity, each of shape (candidates, prompts), float64."""

    quality: NDArray[np.float64]
    diversity: NDArray[np.float64]


class ProxyTask(Protocol):
    """Questions, and scores from the probabilities of their valid answers."""

    def questions(self) -> tuple[Question, ...]: ...

    def score(self, log_probs: NDArray[np.float64]) -> Scores:
        """Scores from the log-probabilities of valid answers.

        `log_probs` has the shape (candidates, prompts, answers), NaN past a prompt's own answers.
        """
        ...


class ConstrainedRandomCharacter:
    """CRC: a random digit or letter from a range; 20 prompts of each kind, the same in every run.

    Q is the probability that the first token is valid, D the entropy (nats) of the distribution over valid tokens.
    """

    prompts_per_kind = 20

    def questions(self) -> tuple[Question, ...]:
        rng = random.Random(0)
        questions = []
        for text, alphabet in ((DIGIT_TEXT, DIGITS), (LETTER_TEXT, LETTERS)):
            ends = [(a, b) for a in range(len(alphabet)) for b in range(a + SHORTEST_RANGE - 1, len(alphabet))]
            for a, b in sorted(rng.sample(ends, self.prompts_per_kind)):
                questions.append(Question(text.format(alphabet[a], alphabet[b]), tuple(alphabet[a : b + 1])))
        return tuple(questions)

    def score(self, log_probs: NDArray[np.float64]) -> Scores:
        probabilities = np.exp(log_probs)
        quality = np.nansum(probabilities, axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):  # without probability on valid answers diversity is 0
            share = probabilities / quality[..., None]
            diversity = -np.nansum(np.where(share > 0, share * np.log(share), 0.0), axis=-1)
        return Scores(quality, diversity)


TASKS: dict[str, type[ProxyTask]] = {"crc": ConstrainedRandomCharacter}
"""The tasks by the names that options give them."""
