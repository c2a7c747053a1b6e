"""What the Hub's client reports, in slrmerge's words, and how long to put up with it."""

import errno
import logging
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from threading import Event
from typing import TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from slrmerge.errors import HubError, NoSpaceError, Problem, first_line

T = TypeVar("T")

TRIES = 6
"""So often in a row may something fail that may pass."""

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 300.0
_SAID_FROM_S = 10.0

FAILURES = (HTTPError, ConnectionError, TimeoutError, RuntimeError)
"""What may go wrong on the way: HTTP's own, and what the client's uploads and its other transport (Xet) raise."""

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

_log = logging.getLogger("slrmerge")


class UnsoundAnswerError(HTTPError):
    """An answer that is not what was asked for, though its status says so."""


class ExpiredAddressError(UnsoundAnswerError):
    """The Hub sent on to an address that was good once, or for another range."""


class Patience:
    """Waits between tries, longer each time; ends when `given_up` is set."""

    def __init__(self, given_up: Event | None = None, *, tries: int = TRIES) -> None:
        self._given_up = given_up or Event()
        self._failures, self._tries = 0, tries

    def progressed(self) -> None:
        """Something came: what fails next fails for the first time."""
        self._failures = 0

    def wait(self, error: Exception, *, seconds: float | None = None) -> None:
        """Wait for the next try after `error`; raises it where that would not help, or was tried often enough."""
        self._failures += 1
        if self._failures >= self._tries or not _may_pass(error):
            raise error
        if seconds is None:
            seconds = max(FIRST_WAIT_S * 2 ** (self._failures - 1), min(_asked_to_wait_s(error), LONGEST_WAIT_S))
        if seconds > _SAID_FROM_S:
            _log.warning("the Hub is asked again in %.0f s", seconds)
        if self._given_up.wait(seconds):
            raise error


def patiently(
    call: Callable[[], T],
    *,
    where: str,
    given_up: Event | None = None,
    tries: int = TRIES,
    statuses: Container[int] | None = None,
    remedy: str = "",
) -> T:
    """What `call` gives, tried again where that may help: after any failure, or only after answers of some `statuses`.

    Raises HubError about `where`, and NoSpaceError; `remedy` as in `in_words`.
    """
    patience = Patience(given_up, tries=tries)
    with in_words(where, remedy=remedy):
        while True:
            try:
                return call()
            except (*FAILURES, LocalEntryNotFoundError) as error:
                if statuses is not None and _answer(error)[0] not in statuses:
                    raise
                patience.wait(error)


@contextmanager
def in_words(where: str, *, remedy: str = "") -> Iterator[None]:
    """Turn what the Hub's client raises into a HubError about `where`; a full disk into a NoSpaceError.

    `remedy` is what to do about what may pass, where that is not just to try again.
    """
    try:
        yield
    except (*FAILURES, LocalTokenNotFoundError, HFValidationError, EntryNotFoundError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # a bug
        cause = _underlying(error)
        what, usual_remedy = _said(cause, where)
        raise HubError(Problem(where, what, (remedy if _may_pass(cause) else "") or usual_remedy)) from cause
    except UnicodeEncodeError as error:
        raise HubError(
            Problem(where, "cannot be asked for: the token has characters that none has", _LOG_IN)
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        what = f"got an answer that makes no sense ({type(error).__name__}: {first_line(error)})"
        raise HubError(Problem(where, what, f"see whether {constants.ENDPOINT} is the Hub")) from error
    except ImportError as error:
        raise HubError(Problem(where, f"cannot be reached ({first_line(error)})", "install what that names")) from error
    except OSError as error:
        place = str(error.filename or constants.HF_HUB_CACHE)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space, or set HF_HUB_CACHE to a folder on another disk"
            raise NoSpaceError(Problem(place, "the disk is full", remedy)) from error
        what = f"cannot be written or read ({error.strerror or first_line(error)})"
        raise HubError(Problem(place, what, f"needed for {where}; HF_HUB_CACHE may name a folder of yours")) from error


def _said(error: Exception, where: str) -> tuple[str, str]:
    """What happened, and what to do about it."""
    repository = where.partition("@")[0]
    logged_in = get_token() is not None
    page = f"{constants.ENDPOINT}/{repository}"
    if isinstance(error, GatedRepoError):
        remedy = f"ask for access on {page}" + ("" if logged_in else f", then {_LOG_IN}")
        return "is gated: its owner decides who may read it", remedy
    if isinstance(error, DisabledRepoError):
        return "was disabled on the Hub", f"see {page}"
    if isinstance(error, RepositoryNotFoundError):
        if logged_in:
            return "is no folder here, and no repository on the Hub that your token may see", "check the name"
        return "is no folder here, and no public repository on the Hub", f"check the name; if it is private, {_LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return "has no such revision", f"the branches and tags are on {page}/refs"
    if isinstance(error, LocalTokenNotFoundError):
        return "needs a token", _LOG_IN
    if isinstance(error, OfflineModeIsEnabled):
        return "cannot be reached while HF_HUB_OFFLINE is set", "unset it"
    if isinstance(error, HFValidationError):
        return f"is no name of a repository ({first_line(error)})", "write organisation/name"
    if isinstance(error, UnsoundAnswerError):
        return str(error), "try again later, or fetch whole files: --download full"
    if isinstance(error, HfHubHTTPError):
        return _said_status(error, page, logged_in=logged_in)
    if isinstance(error, EntryNotFoundError):
        return f"has no such file ({first_line(error)})", f"see {page}/tree"
    if isinstance(error, RuntimeError):
        return f"failed on the way ({first_line(error)})", "try again later; the same command goes on where it was"
    name = type(error).__name__
    what = "does not answer in time" if "Timeout" in name else "cannot be reached"
    offline = "check the network; HF_HUB_OFFLINE=1 takes what is in the Hub's cache"
    return f"{what} at {constants.ENDPOINT} ({name}: {first_line(error)})", offline


def _said_status(error: HfHubHTTPError, page: str, *, logged_in: bool) -> tuple[str, str]:
    status = error.response.status_code
    why = f": {error.server_message}" if error.server_message else ""
    if status == 401:
        return ("got a token that the Hub does not accept" if logged_in else "needs a token"), _LOG_IN
    if status == 403:
        return f"is not for your token (403{why})", f"give it a token with the right to do this; see {page}"
    if status == 412:
        return "was changed by somebody else meanwhile (412)", "look at what they did, and run again"
    if status == 429:
        return "is asked too often from here (429)", f"wait some minutes, or {_LOG_IN} for a higher limit"
    return f"got the answer {status} from the Hub{why}", "try again later; the same command goes on where it was"


def _underlying(error: Exception) -> Exception:
    """What the client wrapped: why a file is not even in the cache, why an upload failed."""
    cause = error.__cause__
    wraps = isinstance(error, LocalEntryNotFoundError | RuntimeError)
    return cause if wraps and isinstance(cause, Exception) else error


def may_pass(status: int) -> bool:
    """Whether a server that answered so may answer otherwise a little later."""
    return status in (408, 429) or status >= 500


def _may_pass(error: Exception) -> bool:
    error = _underlying(error)
    if isinstance(error, HfHubHTTPError):
        return may_pass(error.response.status_code)
    if isinstance(error, RuntimeError):
        return type(error) is RuntimeError
    return isinstance(error, FAILURES) and not isinstance(error, OfflineModeIsEnabled)


def _answer(error: Exception) -> tuple[int, Mapping[str, str]]:
    """The status and the headers of the answer that an error tells of; 0 and none where there was no answer."""
    response = getattr(_underlying(error), "response", None)
    return (0, {}) if response is None else (response.status_code, response.headers)


def _asked_to_wait_s(error: Exception) -> float:
    """How long the answer says to wait. It may name the window of a limit even where no limit was hit."""
    status, headers = _answer(error)
    if status not in (429, 503):
        return 0.0
    after = headers.get("Retry-After", "")
    limit = parse_ratelimit_headers(headers) if status == 429 else None
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    return float(after if after.isdecimal() else 0)
