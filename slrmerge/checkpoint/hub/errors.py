"""One retry policy for requests to the Hub, and the errors of its client in slrmerge's words.

The client retries listings and most of a download by itself. Ours is for the calls that it does not retry, and for
ranges: it resumes them, can be cancelled, and does not close the session that other threads are reading from.
"""

import errno
import logging
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Event
from typing import Any, TypeVar

from httpx2 import ConnectError, ConnectTimeout, InvalidURL, TooManyRedirects, UnsupportedProtocol
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

MAX_ATTEMPTS = 6
"""Consecutive failures after which a request is given up."""

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 300.0
_REPORTED_WAIT_S = 5.0
_MAX_SLOW, _FORGIVING_BYTES = 3, 1_000_000
"""Slow responses after which a request is given up, and the bytes received after which they are forgotten."""

_MAX_CONNECTS = 2
"""Failed attempts to connect after which the Hub is reported as unreachable; waiting for it rarely helps."""

CONNECTION_ERRORS = (HTTPError, ConnectionError, TimeoutError)

_PERMANENT = (OfflineModeIsEnabled, TooManyRedirects, UnsupportedProtocol)

_GONE = (404, 410)

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_RUN_AGAIN = "run the same command again later: it resumes"

_log = logging.getLogger("slrmerge")


class InvalidResponseError(HTTPError):
    """A response whose status or body is not what the request asked for."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class SlowResponseError(HTTPError):
    """A response whose body arrives too slowly to wait for its end."""


class Backoff:
    """Waits between attempts: twice as long each time, or as long as the Hub asks; `cancelled` ends the waiting."""

    def __init__(self, cancelled: Event | None = None, *, attempts: int = MAX_ATTEMPTS) -> None:
        self._cancelled = cancelled or Event()
        self._failures, self._attempts = 0, attempts
        self._slow, self._arrived = 0, 0

    def progress(self, count: int) -> None:
        """Forget earlier failures, since bytes arrived; slow responses only after many bytes."""
        self._arrived += count
        if self._arrived >= _FORGIVING_BYTES:
            self._slow = 0
        self._failures = self._slow

    def wait(self, error: Exception) -> None:
        """Wait until the next attempt after `error`.

        Raises `error` itself where another attempt cannot help, after the last attempt, and when cancelled.
        """
        self._failures += 1
        if isinstance(error, SlowResponseError):
            self._slow, self._arrived = self._slow + 1, 0
        given_up = self._failures >= self._attempts or self._slow >= _MAX_SLOW
        if given_up or not _is_transient(error):
            raise error
        seconds = max(FIRST_WAIT_S * 2 ** (self._failures - 1), min(_requested_wait_s(error), LONGEST_WAIT_S))
        if seconds > _REPORTED_WAIT_S:
            reason = f"HTTP {status}" if (status := _status(error)) else first_line(error)
            attempt = f"attempt {self._failures + 1} of {self._attempts}"
            _log.warning("cannot reach the Hub (%s); retrying in %.0f s (%s)", reason, seconds, attempt)
        if self._cancelled.wait(seconds):
            raise error


def with_retries(
    call: Callable[[], T],
    *,
    where: str,
    cancelled: Event | None = None,
    attempts: int = MAX_ATTEMPTS,
    statuses: Container[int] | None = None,
    remedy: str = "",
) -> T:
    """The result of `call`, a single call of the Hub's client, retried after failures that may be transient.

    Where no connection can be made, one more attempt follows, and none where waiting for it took too long. With
    `statuses`, only responses with one of them are retried. `remedy` is as in `translate_hub_errors`. Raises
    HubError about `where`, and NoSpaceError.
    """
    backoff, unreachable = Backoff(cancelled, attempts=attempts), 0
    with translate_hub_errors(where, remedy=remedy), translate_parse_errors(where):
        while True:
            try:
                return call()
            except CONNECTION_ERRORS as error:
                if statuses is not None and _status(error) not in statuses:
                    raise
                unreachable += isinstance(error, ConnectError)
                if unreachable >= _MAX_CONNECTS or isinstance(error, ConnectTimeout):
                    raise
                backoff.wait(error)


@contextmanager
def translate_hub_errors(where: str, *, remedy: str = "") -> Iterator[None]:
    """Turn the errors of the Hub's client into a HubError about `where`; a full disk into a NoSpaceError.

    `remedy` replaces the usual remedy for transient failures.
    """
    try:
        yield
    except (*CONNECTION_ERRORS, LocalTokenNotFoundError, HFValidationError, EntryNotFoundError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # a bug; Xet raises plain ones for failed transfers
        cause = _underlying(error)
        problem = describe_error(cause, where)
        raise HubError(replace(problem, remedy=remedy) if remedy and _is_transient(cause) else problem) from cause
    except OSError as error:
        if error.errno is None:  # the client's own, for a file of another size than the Hub said
            raise HubError(Problem("transfer-failed", where, first_line(error), _RUN_AGAIN)) from error
        place = str(error.filename or constants.HF_HUB_CACHE)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space, or set HF_HUB_CACHE to a folder on another disk"
            raise NoSpaceError(Problem("no-space", place, "the disk is full", remedy)) from error
        what = f"cannot be read or written ({error.strerror or first_line(error)})"
        remedy = f"it is needed for {where}; set HF_HUB_CACHE to a folder that you can write to"
        raise HubError(Problem("cache-unusable", place, what, remedy)) from error


@contextmanager
def translate_parse_errors(where: str) -> Iterator[None]:
    """Turn what the client raises for JSON that is not the Hub's into a HubError; for use around a single request."""
    try:
        yield
    except (HTTPError, HFValidationError):
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, InvalidURL) as error:
        what = f"the response is not what the Hub sends ({type(error).__name__}: {first_line(error)})"
        remedy = f"check that {constants.ENDPOINT} is a Hugging Face Hub"
        raise HubError(Problem("unexpected-response", where, what, remedy)) from error


def describe_error(error: Exception, where: str) -> Problem:
    """What an error of the Hub's client about `where` means, and what to do."""
    logged_in = get_token() is not None
    page = f"{constants.ENDPOINT}/{where.partition('@')[0]}"
    if isinstance(error, GatedRepoError):
        remedy = f"request access on {page}" + ("" if logged_in else f", then {LOG_IN}")
        return Problem("gated-repository", where, "is gated: its owner must grant you access", remedy)
    if isinstance(error, DisabledRepoError):
        return Problem("disabled-repository", where, "was disabled on the Hub", f"see {page}")
    if isinstance(error, RepositoryNotFoundError):
        kind = "a repository on the Hub that your token can read" if logged_in else "a public repository on the Hub"
        remedy = "check the spelling" + ("" if logged_in else f"; if it is private, {LOG_IN}")
        return Problem("repository-not-found", where, f"is neither a local folder nor {kind}", remedy)
    if isinstance(error, RevisionNotFoundError):
        return Problem("revision-not-found", where, "has no such revision", f"its branches and tags are on {page}/refs")
    if isinstance(error, LocalTokenNotFoundError):
        return _not_logged_in(where)
    if isinstance(error, OfflineModeIsEnabled):
        return Problem("offline", where, "cannot be reached while HF_HUB_OFFLINE is set", "unset it")
    if isinstance(error, HFValidationError):
        what = f"is not the name of a repository ({first_line(error)})"
        return Problem("invalid-repository", where, what, "use organisation/name")
    if isinstance(error, EntryNotFoundError) or (isinstance(error, InvalidResponseError) and error.status in _GONE):
        return _file_not_found(where, page)
    if isinstance(error, InvalidResponseError):
        remedy = 'try again later, or download whole files with download="full"'
        return Problem("invalid-response", where, str(error), remedy)
    if isinstance(error, SlowResponseError):
        what = f"{constants.ENDPOINT} responds too slowly ({error})"
        return Problem("hub-timeout", where, what, _RUN_AGAIN)
    if isinstance(error, HfHubHTTPError):
        return _describe_status(error, where, page, logged_in=logged_in)
    if isinstance(error, RuntimeError):
        return Problem("transfer-failed", where, f"the transfer failed ({first_line(error)})", _RUN_AGAIN)
    name = type(error).__name__
    remedy = "check the network; HF_HUB_OFFLINE=1 uses only the Hub's cache"
    if "Timeout" in name:
        what = f"{constants.ENDPOINT} does not respond in time ({name}: {first_line(error)})"
        return Problem("hub-timeout", where, what, remedy)
    what = f"cannot reach {constants.ENDPOINT} ({name}: {first_line(error)})"
    return Problem("hub-unreachable", where, what, remedy)


def _describe_status(error: HfHubHTTPError, where: str, page: str, *, logged_in: bool) -> Problem:
    status = error.response.status_code
    reason = f": {error.server_message}" if error.server_message else ""
    if status == 401 and not logged_in:
        return _not_logged_in(where)
    if status == 401:
        return Problem("invalid-token", where, "the Hub does not accept your token", LOG_IN)
    if status == 403:
        what, remedy = f"your token does not permit this (403{reason})", f"give it the permission; see {page}"
        return Problem("forbidden", where, what, remedy)
    if status == 412:
        what, remedy = "has a new commit since this run read it (412)", "review that commit, and run again"
        return Problem("changed-meanwhile", where, what, remedy)
    if status == 429:
        remedy = f"wait some minutes, or {LOG_IN} for a higher limit"
        return Problem("rate-limited", where, "too many requests (429)", remedy)
    if status in _GONE and "/api/" not in error.response.url.path:
        return _file_not_found(where, page)
    remedy = _RUN_AGAIN if is_transient_status(status) else f"see {page}"
    return Problem("hub-error", where, f"the Hub request failed ({status}{reason})", remedy)


def _not_logged_in(where: str) -> Problem:
    return Problem("not-logged-in", where, "requires a token", LOG_IN)


def _file_not_found(where: str, page: str) -> Problem:
    return Problem("file-not-found", where, "has no such file or folder", f"see {page}")


def is_transient_status(status: int) -> bool:
    """Whether the same request may succeed later."""
    return status in (408, 429) or status >= 500


def is_refused(error: BaseException | None) -> bool:
    """Whether the Hub answered that it does not do what was asked, for another reason than a newer commit."""
    status = _status(error) if isinstance(error, Exception) else 0
    return 400 <= status < 500 and status != 412


def _is_transient(error: Exception) -> bool:
    status = _status(error)
    if status:
        return is_transient_status(status)
    return isinstance(error, (*CONNECTION_ERRORS, RuntimeError)) and not isinstance(error, _PERMANENT)


def _underlying(error: Exception) -> Exception:
    """The error that the client wrapped: why a file is not in the cache either, why an upload failed."""
    wraps = isinstance(error, LocalEntryNotFoundError | RuntimeError)
    return error.__cause__ if wraps and isinstance(error.__cause__, Exception) else error


def _status(error: Exception) -> int:
    """The status of the response that an error reports; 0 where there was none."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else 0


def _requested_wait_s(error: Exception) -> float:
    """How long the response asks to wait: until its rate limit ends where that was reached, else by Retry-After."""
    if not isinstance(error, HfHubHTTPError) or _status(error) not in (429, 503):
        return 0.0
    headers: Any = error.response.headers
    limit = parse_ratelimit_headers(headers) if _status(error) == 429 else None
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    after = headers.get("Retry-After", "")
    return float(after) if after.isdecimal() else 0.0
