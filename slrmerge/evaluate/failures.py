"""What the client of model servers reports, in slrmerge's words, and how long to put up with it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from slrmerge.errors import Problem, ServerError, first_line

if TYPE_CHECKING:
    from openai import APIStatusError
    from tenacity import RetryCallState

T = TypeVar("T")

PATIENCE_S = 300.0
"""A server that fails is asked again for so long, in growing intervals; one that only starts again has come back."""

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
SAID_FROM_S = 5.0

_log = logging.getLogger("slrmerge")

UNSOUND = (ValueError, ArithmeticError, RecursionError)
"""What the client raises for an answer that is no JSON, or none that one could read."""

AGAIN = "see to it, then run the same command again"


class UnsoundAnswerError(ValueError):
    """An answer that is not what the protocol says."""


async def patiently(
    call: Callable[[], Awaitable[T]],
    *,
    where: str,
    timeout_s: float,
    may_pass: Callable[[BaseException], bool] | None = None,
) -> T:
    """What `call` gives, tried again while what fails may pass; each try has `timeout_s`.

    Raises ServerError about `where`.
    """
    from openai import OpenAIError
    from tenacity import AsyncRetrying, retry_if_exception

    async def attempt() -> T:
        async with asyncio.timeout(timeout_s):
            return await call()

    def say(state: "RetryCallState") -> None:
        error, wait = state.outcome and state.outcome.exception(), state.upcoming_sleep
        if error and wait > SAID_FROM_S:
            _log.warning("%s %s: asked again in %.0f s", where, _said(error, timeout_s)[0], wait)

    retrying = AsyncRetrying(
        retry=retry_if_exception(may_pass or _may_pass),
        stop=out_of_patience(),
        wait=wait_s,
        before_sleep=say,
        reraise=True,
    )
    try:
        return await retrying(attempt)
    except (OpenAIError, TimeoutError, *UNSOUND) as error:
        what, remedy = _said(error, timeout_s)
        raise ServerError(Problem(where, what, remedy)) from error


def out_of_patience() -> "Callable[[RetryCallState], bool]":
    """Whether it is `PATIENCE_S` since the first failure; what an answer takes before it fails does not count."""
    first_failure_s: list[float] = []

    def stop(state: "RetryCallState") -> bool:
        failed_s = state.outcome_timestamp or 0.0
        first_failure_s.append(failed_s)
        return failed_s - first_failure_s[0] >= PATIENCE_S

    return stop


def wait_s(state: "RetryCallState") -> float:
    """How long to wait before the next try: twice as long each time, not in step with others, or as the server says."""
    from openai import APIStatusError
    from tenacity import wait_random_exponential

    error = state.outcome.exception() if state.outcome else None
    asked = error.response.headers.get("retry-after", "") if isinstance(error, APIStatusError) else ""
    own = wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S, min=FIRST_WAIT_S)(state)
    return max(own, min(float(asked), PATIENCE_S) if asked.isdecimal() else 0.0)


def is_loading(error: BaseException) -> bool:
    """Whether a server says that it is not ready yet."""
    from openai import APIStatusError

    return isinstance(error, APIStatusError) and error.status_code == 503


def _may_pass(error: BaseException) -> bool:
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code >= 500 or error.status_code in (408, 409, 429)
    return isinstance(error, (openai.APIConnectionError, TimeoutError, *UNSOUND))


def _said(error: BaseException, timeout_s: float) -> tuple[str, str]:
    """What happened, and what to do about it."""
    import openai

    if isinstance(error, openai.APITimeoutError | TimeoutError):
        return f"gave no answer within {timeout_s:g} s", f"{AGAIN}; --timeout allows more"
    if isinstance(error, openai.APIConnectionError):
        return (
            f"cannot be reached ({first_line(error.__cause__ or error)})",
            "start it, then run the same command again",
        )
    if not isinstance(error, openai.APIStatusError):
        return f"does not answer as OpenAI's protocol says ({first_line(error)})", AGAIN
    said = _words_of(error)
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return f"refuses the key ({said})", "set OPENAI_API_KEY"
    if isinstance(error, openai.NotFoundError):
        return f"has no such model or address ({said})", "the address of most ends in /v1"
    if isinstance(error, openai.RateLimitError):
        return f"asks for fewer questions at a time ({said})", "run again with a smaller --concurrency"
    if isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError):
        return f"refuses the question ({said})", "where it knows no min_p, give --min-p 0"
    return f"fails ({said})", AGAIN


def _words_of(error: "APIStatusError") -> str:
    """The client's words, and the server's own where the client leaves them out."""
    body = error.body if isinstance(error.body, dict) else {"error": error.body}
    own = next((str(body[key]) for key in ("detail", "error", "message") if isinstance(body.get(key), str)), "")
    said = first_line(error)
    return f"{said}: {' '.join(own.split())}" if own and own not in said else said
