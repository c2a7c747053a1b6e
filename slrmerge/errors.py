"""Errors: what went wrong, where, and what to do about it.

Every error that a caller can cause is a `SlrmergeError`: a list of `Problem`s and an exit code.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import islice
from typing import TypeVar

D = TypeVar("D")
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where, what, and what to do. `code` is stable across releases; the words are not.

    The credentials of URLs are hidden, and long texts cut.
    """

    code: str
    where: str
    what: str
    remedy: str = ""

    def __post_init__(self) -> None:
        for name in ("where", "what", "remedy"):
            object.__setattr__(self, name, cut(without_credentials(getattr(self, name))))

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"; {self.remedy}" if self.remedy else "")


MAX_PROBLEMS = 1000
"""More than anyone reads: a damaged file can have one in every line."""


class SlrmergeError(Exception):
    """The base of all errors that slrmerge raises on purpose; `problems` holds what was found, in order.

    These are at most `MAX_PROBLEMS`, and one that says that there are more.
    """

    exit_code = 1

    def __init__(self, *problems: Problem) -> None:
        if len(problems) > MAX_PROBLEMS and problems[-1].code != "more-problems":
            more = Problem("more-problems", "…", f"there are more than {MAX_PROBLEMS:,} problems")
            problems = (*problems[:MAX_PROBLEMS], more)
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class OptionError(SlrmergeError):
    """An option or argument has a value that cannot be used."""

    exit_code = 2


class RecipeError(SlrmergeError):
    """The recipe cannot be read or is not valid."""

    exit_code = 3


class CheckpointError(SlrmergeError):
    """A checkpoint is missing, damaged, or in a format that is not supported."""

    exit_code = 4


class PlanError(SlrmergeError):
    """The recipe does not fit the two checkpoints."""

    exit_code = 5


class OutputError(SlrmergeError):
    """The output cannot be written, or must not be replaced."""

    exit_code = 6


class NoSpaceError(OutputError):
    """The disk is full, or would be."""

    exit_code = 7


class BusyError(SlrmergeError):
    """Another process is writing to the same output."""

    exit_code = 8


class SourceChangedError(SlrmergeError):
    """A source file was changed, replaced or truncated while it was being read."""

    exit_code = 9


class VerificationError(SlrmergeError):
    """A merged checkpoint does not match its manifest or its sources."""

    exit_code = 10


class BlendError(SlrmergeError):
    """A blended value does not fit the output dtype."""

    exit_code = 11


class UnsupportedModelError(SlrmergeError):
    """A search or an evaluation does not support this model."""

    exit_code = 12


class MissingExtraError(SlrmergeError):
    """An optional dependency is not installed."""

    exit_code = 13


class HubError(SlrmergeError):
    """A request to the Hugging Face Hub failed."""

    exit_code = 14


class DataError(SlrmergeError):
    """The questions of an evaluation or of a proxy task cannot be read, or are not valid."""

    exit_code = 15


class ServerError(SlrmergeError):
    """A request to a model server failed."""

    exit_code = 16


class ClusterError(SlrmergeError):
    """A Ray cluster cannot be reached, or its workers died."""

    exit_code = 17


class LimitError(SlrmergeError):
    """The system has too few threads or too little memory."""

    exit_code = 18


def raise_all(problems: Iterable[Problem], error: type[SlrmergeError]) -> None:
    """Raise `error` with `problems`, of which it takes no more than an error holds; do nothing when there are none."""
    found = tuple(islice(problems, MAX_PROBLEMS + 1))
    if found:
        raise error(*found)


def open_all(open_one: Callable[[S], T], values: Iterable[S], *expected: type[SlrmergeError]) -> list[T]:
    """Call `open_one` for each value; raise the problems of all calls together where some raise `expected`."""
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


def collect(problems: list[Problem], call: Callable[[], T], otherwise: D) -> T | D:
    """The result of `call`; where it raises CheckpointError, `otherwise`, with its problems added to `problems`."""
    try:
        return call()
    except CheckpointError as error:
        problems.extend(error.problems)
        return otherwise


def require_extra(extra: str, *packages: str) -> None:
    """Raise MissingExtraError unless all `packages`, which the optional dependency `extra` installs, are there.

    Raises HubError where they cannot be imported; see `require_hub_settings`.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        what, remedy = f"requires {' and '.join(missing)}", f"pip install {' '.join(missing)}"
        raise MissingExtraError(Problem("missing-extra", f"slrmerge[{extra}]", what, remedy))
    if not _HUB_USERS.isdisjoint(packages):
        require_hub_settings()


_HUB_USERS = {"transformers", "datasets", "sentence_transformers"}


def require_hub_settings() -> None:
    """Raise HubError where the Hub's client, which some packages import, cannot use its environment variables."""
    from urllib.parse import urlsplit

    try:
        from huggingface_hub.constants import ENDPOINT

        address = urlsplit(ENDPOINT)
        is_valid, why = address.scheme in ("http", "https") and bool(address.hostname), "not an address on the web"
    except ValueError as error:
        is_valid, why = False, first_line(error)
    if not is_valid:
        where = "HF_ENDPOINT, HF_HUB_ETAG_TIMEOUT or HF_HUB_DOWNLOAD_TIMEOUT"
        raise HubError(Problem("invalid-setting", where, f"cannot be used ({why})", "correct or unset it"))


def require_type(name: str, value: object, kind: type | tuple[type, ...], remedy: str) -> None:
    """Raise OptionError where the argument `name` has another type."""
    if not isinstance(value, kind):
        raise OptionError(Problem("wrong-type", name, f"{type(value).__name__} is not accepted", remedy))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A remedy that names the nearest known word, or all of them where none is near."""
    choices = list(known)
    near = get_close_matches(word, choices, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(choices)}"


def cut(text: str, length: int = 1000) -> str:
    """`text` without its middle where it is longer than anyone reads: a path or a number in a file has any length."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-length // 2 :]}"


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, cut where it is long."""
    return cut(next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__))


_URL = re.compile(r"(\w\w:/+)(\S+)")  # one slash where the URL was taken for a path
_PARAMETER = re.compile(r"([?&;#][\w.-]+=)([^\s&;#'\"]*[^\s&;#'\":])")
_SECRET_NAME = re.compile(r"key|token|secret|sig|passw|pwd|auth|cred", re.IGNORECASE)


def without_credentials(text: str) -> str:
    """`text` with the user, the password and the query of every URL in it replaced by `***`.

    Where a URL has no scheme, only its password, with the user, and parameters that have the name of a secret.
    """
    if "@" in text:
        text = re.sub(r"\S+", _without_user, text)
    text = _URL.sub(_without_user_and_query, text)
    return _PARAMETER.sub(lambda match: f"{match[1]}***" if _SECRET_NAME.search(match[1]) else match[0], text)


def _without_user_and_query(match: "re.Match[str]") -> str:
    """A URL. A password may contain what it should not, such as a slash; a path may contain an @."""
    scheme, rest = match.groups()
    head = re.split("[?#]", rest, maxsplit=1)[0]
    if "@" in head and "@" in rest[len(head) :]:  # a password may end at either
        return f"{scheme}***"
    before, _, after = rest.rpartition("@")
    place, has_query, query = (f"***@{after}" if before and _has_user(before) else rest).partition("?")
    path, _, fragment = place.partition("#")
    place = f"{path}#***" if "=" in fragment else place
    hidden = query if query.startswith("***") else "***"  # hidden already, with what follows it
    return f"{scheme}{place}?{hidden}" if has_query else f"{scheme}{place}"


def _without_user(match: "re.Match[str]") -> str:
    """A word, which may be an address without a scheme; a drive's letter has no password after its colon."""
    word = match[0]
    before, _, after = word.rpartition("@")
    has_password = re.search(r":[^/\\]", before) and _has_user(before) and not _URL.search(word)
    return f"***@{after}" if has_password else word


def _has_user(before: str) -> bool:
    """Whether what is before the last @ of an address is a user, or ends in one; else it is a part of the path."""
    authority = re.split(r"[/?#]", before, maxsplit=1)[0]
    return authority == before or "@" in authority or (":" in authority and not authority.split(":")[-1].isdigit())
