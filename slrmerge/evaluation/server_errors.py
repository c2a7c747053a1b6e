"""Errors of the client of model servers, as ServerErrors."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from slrmerge.errors import Problem, ServerError, first_line

if TYPE_CHECKING:
    from openai import APIStatusError

INVALID_JSON = (ValueError, RecursionError, OverflowError)
"""What the client raises for a response that is not JSON, or has numbers that it cannot convert."""

RETRYING_S = 300.0
"""One request and its retries may take as long as one answer, and this."""

MAX_DETAIL = 1000
"""Maximum number of characters of a server's own message."""

SHORTEST_SECRET = 5
"""A shorter word is part of other words."""

RUN_AGAIN = "check the server, then run the same command again"


class InvalidResponseError(ValueError):
    """A response that does not follow the protocol."""


@contextmanager
def translate_server_errors(where: str, timeout_s: float, secrets: Collection[str] = ()) -> Iterator[None]:
    """Raise ServerError about `where`, without `secrets`, for an error of the client in the block."""
    from openai import OpenAIError

    try:
        yield
    except (OpenAIError, TimeoutError, *INVALID_JSON) as error:
        problem = describe_error(error, where, timeout_s)
        for secret in secrets:
            if len(secret) >= SHORTEST_SECRET:
                problem = replace(problem, what=problem.what.replace(secret, "***"))
        raise ServerError(problem) from error


def describe_error(error: BaseException, where: str, timeout_s: float) -> Problem:
    """An error of the client as a Problem."""
    import openai

    if isinstance(error, openai.APITimeoutError | TimeoutError):
        retries = f", nor in {RETRYING_S:g} s of retries" if isinstance(error, TimeoutError) else ""
        what = f"did not answer within {timeout_s:g} s{retries}"
        return Problem("server-timeout", where, what, f"{RUN_AGAIN}, or increase the timeout")
    if isinstance(error, openai.APIConnectionError):
        what = f"cannot be reached ({first_line(error.__cause__ or error)})"
        return Problem("server-unreachable", where, what, "start it, then run the same command again")
    if not isinstance(error, openai.APIStatusError):
        what = f"the response does not follow OpenAI's protocol ({first_line(error)})"
        return Problem("invalid-response", where, what, RUN_AGAIN)
    detail = _detail(error)
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return Problem("key-rejected", where, f"rejected the API key ({detail})", "set OPENAI_API_KEY")
    if isinstance(error, openai.NotFoundError):
        return Problem("server-not-found", where, f"unknown model or address ({detail})", "most addresses end in /v1")
    if isinstance(error, openai.RateLimitError):
        return Problem("rate-limited", where, f"too many requests ({detail})", "run again with a smaller concurrency")
    if error.status_code in (400, 413, 422):
        remedy = "if the server does not support min_p, set min_p to 0"
        return Problem("request-rejected", where, f"rejected the request ({detail})", remedy)
    return Problem("server-failed", where, f"failed ({detail})", RUN_AGAIN)


def _detail(error: "APIStatusError") -> str:
    """The client's message, with the server's own where the client leaves it out."""
    body = error.body if isinstance(error.body, dict) else {"error": error.body}
    own = next((str(body[key]) for key in ("detail", "error", "message") if isinstance(body.get(key), str)), "")
    message = first_line(error)
    detail = f"{message}: {' '.join(own.split())}" if own and own not in message else message
    return detail if len(detail) <= MAX_DETAIL else f"{detail[:MAX_DETAIL]}…"
