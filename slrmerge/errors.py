"""What can go wrong, said so that a person can act on it.

Every expected failure is a `SlrmergeError`: a list of problems, each with where, what and a remedy, and an exit code.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where it is, what it is, and what to do about it."""

    where: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"; {self.remedy}" if self.remedy else "")


class SlrmergeError(Exception):
    """The base of all errors that slrmerge expects; `problems` holds everything found, in order."""

    exit_code = 1
    summary = "slrmerge failed"

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class RecipeError(SlrmergeError):
    """The recipe cannot be read, or says something that no checkpoint could satisfy."""

    exit_code = 3
    summary = "the recipe is not valid"


class CheckpointError(SlrmergeError):
    """A source folder is missing, broken, or not a checkpoint that slrmerge reads."""

    exit_code = 4
    summary = "a checkpoint cannot be used"


class PlanError(SlrmergeError):
    """The recipe and the two checkpoints do not fit together."""

    exit_code = 5
    summary = "this recipe does not fit these checkpoints"


class OutputError(SlrmergeError):
    """The target cannot be written, or must not be."""

    exit_code = 6
    summary = "the output cannot be written"


class NoSpaceError(OutputError):
    """The disk is full, or would be."""

    exit_code = 7
    summary = "not enough disk space"


class BusyError(SlrmergeError):
    """Another run is working on the same target."""

    exit_code = 8
    summary = "the target is in use"


class SourceChangedError(SlrmergeError):
    """A source file was changed, replaced or shortened while it was being read."""

    exit_code = 9
    summary = "a source changed while it was read"


class VerificationError(SlrmergeError):
    """A written checkpoint is not what its manifest, or its sources, say it should be."""

    exit_code = 10
    summary = "verification failed"


class BlendError(SlrmergeError):
    """A value cannot be held in the output dtype."""

    exit_code = 11
    summary = "the result does not fit the output dtype"


class UnsupportedModelError(SlrmergeError):
    """A model is one that a search or an evaluation cannot serve, or a search not exactly."""

    exit_code = 12
    summary = "this model cannot be used here"


class MissingExtraError(SlrmergeError):
    """A package is not installed that only some commands need."""

    exit_code = 13
    summary = "a package is missing"


class HubError(SlrmergeError):
    """A repository on the Hub is not there, not for everyone, or did not answer as it should."""

    exit_code = 14
    summary = "the Hub did not give what was asked"


class DataError(SlrmergeError):
    """The questions of an evaluation cannot be read, or are not what its task needs."""

    exit_code = 15
    summary = "the questions cannot be used"


class ServerError(SlrmergeError):
    """A model server is not there, does not serve what was asked for, or does not answer as it should."""

    exit_code = 16
    summary = "a model server did not give what was asked"


def raise_all(problems: Iterable[Problem], error: type[SlrmergeError]) -> None:
    """Raise `error` with all of `problems`, or return when there are none."""
    found = tuple(problems)
    if found:
        raise error(*found)


def open_all(open_one: Callable[[S], T], values: Iterable[S], *expected: type[SlrmergeError]) -> list[T]:
    """What `open_one` gives for each of `values`; raises the problems of all together where it raises `expected`."""
    opened: list[T] = []
    failed: list[SlrmergeError] = []
    for value in values:
        try:
            opened.append(open_one(value))
        except expected as error:
            failed.append(error)
    if failed:
        raise type(failed[0])(*(problem for error in failed for problem in error.problems))
    return opened


def require_extra(extra: str, *packages: str) -> None:
    """Raise MissingExtraError unless all `packages`, which slrmerge's `extra` brings, are installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        remedy = f"pip install 'slrmerge[{extra}]'"
        raise MissingExtraError(Problem(f"slrmerge {extra}", f"needs {' and '.join(missing)}", remedy))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A remedy that names the nearest known word, or all of them where none is near."""
    choices = list(known)
    near = get_close_matches(word, choices, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(choices)}"


def first_line(error: BaseException) -> str:
    """What another library's error says, as far as it fits in a sentence."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
