"""A model behind an OpenAI-compatible server: vLLM, llama.cpp's, `transformers serve`, or a paid one."""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from slrmerge.errors import Problem, ServerError, first_line
from slrmerge.evaluate.models import Ask, Served
from slrmerge.evaluate.samples import Answer, Settings

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAIError
    from tenacity import RetryCallState

T = TypeVar("T")

PATIENCE_S = 300.0
"""A server that fails is asked again for so long, in growing intervals; one that only starts again has come back."""

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
CONNECT_TIMEOUT_S = 10.0
TEXTS_AT_A_TIME = 64
"""How many texts a request for embeddings holds."""

NO_KEY = "none"
"""What servers of one's own are told for a key; OPENAI_API_KEY comes first."""


class UnsoundAnswerError(Exception):
    """An answer that is not what the protocol says."""


def _extras_of_vllm(settings: Settings) -> dict[str, Any]:
    """vLLM's and llama.cpp's own settings: min_p, and nothing else that would cut or bend the distribution."""
    return {"min_p": settings.min_p, "top_k": -1, "repetition_penalty": 1.0}


def _extras_of_transformers(settings: Settings) -> dict[str, Any]:
    greedy = not settings.temperature
    sampling = (
        {} if greedy else {"temperature": settings.temperature, "min_p": settings.min_p, "top_k": 0, "top_p": 1.0}
    )
    config = {"do_sample": not greedy, "max_new_tokens": settings.max_tokens, **sampling}
    return {"generation_config": json.dumps(config)}


_DIALECTS = (_extras_of_vllm, _extras_of_transformers)
"""How servers take what is not OpenAI's; the next is tried where one is answered by 422."""


class ServerModel:
    """A Model behind a server. Up to `concurrency` questions are under way at a time, each for one sample.

    `timeout_s` is for one answer.
    """

    def __init__(self, at: Served, *, concurrency: int, timeout_s: float) -> None:
        self._at, self._concurrency, self._timeout_s = at, concurrency, timeout_s
        self._dialect = 0

    @cached_property
    def asked_of(self) -> str:
        """The name of the model that is served; on which machine and port does not matter. Raises ServerError."""
        if self._at.model:
            return self._at.model
        served = self._served()
        if len(served) != 1:
            what = f"serves {', '.join(served) or 'no model that it names'}"
            raise ServerError(Problem(self._at.url, what, f"name one as LABEL=MODEL@{self._at.url}"))
        return served[0]

    def check(self) -> None:
        """See `Model`. Raises ServerError."""
        self._served()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def answer(self, asks: Sequence[Ask], settings: Settings, keep: Callable[[Ask, Answer], None]) -> None:
        """See `Model`. Raises ServerError where the server fails for longer than PATIENCE_S, or refuses."""

        async def one(client: "AsyncOpenAI", ask: Ask) -> None:
            keep(ask, await self._patiently(self._complete, client, ask, settings))

        self._all(asks, one)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings of `texts`, shape (texts, width). Raises as `answer` does."""
        parts = [texts[start : start + TEXTS_AT_A_TIME] for start in range(0, len(texts), TEXTS_AT_A_TIME)]
        found: dict[int, NDArray[np.float32]] = {}

        async def one(client: "AsyncOpenAI", number: int) -> None:
            found[number] = await self._patiently(self._embed, client, parts[number])

        self._all(range(len(parts)), one)
        if len({part.shape[1] for part in found.values()}) > 1:
            raise ServerError(Problem(str(self._at), "gave embeddings of different widths"))
        return np.concatenate([found[number] for number in range(len(parts))])

    def _all(self, jobs: Sequence[T], one: "Callable[[AsyncOpenAI, T], Awaitable[None]]") -> None:
        """Carry out all jobs, as many at a time as may be; the first error ends the rest."""

        async def work() -> None:
            waiting = iter(jobs)

            async def worker(client: "AsyncOpenAI") -> None:
                for job in waiting:
                    await one(client, job)

            async with self._client() as client, asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(jobs))):
                    group.create_task(worker(client))

        try:
            asyncio.run(work())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group.exceptions[0].__cause__

    def _client(self) -> "AsyncOpenAI":
        from openai import AsyncOpenAI, Timeout

        timeout = Timeout(self._timeout_s, connect=min(CONNECT_TIMEOUT_S, self._timeout_s))
        key = os.environ.get("OPENAI_API_KEY") or NO_KEY
        return AsyncOpenAI(base_url=self._at.url, api_key=key, timeout=timeout, max_retries=0)

    def _served(self) -> list[str]:
        """The models that the server names; none where it does not tell, which is no error if one was named."""
        from openai import APIStatusError, AuthenticationError, OpenAIError, PermissionDeniedError

        async def ask() -> list[str]:
            async with self._client() as client:
                return [model.id async for model in client.models.list()]

        try:
            return asyncio.run(ask())
        except (AuthenticationError, PermissionDeniedError) as error:
            raise self._in_words(error) from error
        except (APIStatusError, ValueError, AttributeError, TypeError):
            return []
        except OpenAIError as error:
            raise self._in_words(error) from error

    async def _complete(self, client: "AsyncOpenAI", ask: Ask, settings: Settings) -> Answer:
        from openai import UnprocessableEntityError

        dialect = self._dialect
        try:
            said: Any = await client.chat.completions.create(
                model=self.asked_of,
                messages=[{"role": "user", "content": ask.prompt}],
                temperature=settings.temperature,
                top_p=1.0,
                max_tokens=settings.max_tokens,
                seed=ask.seed,
                extra_body=_DIALECTS[dialect](settings) if settings.min_p else None,
            )
        except UnprocessableEntityError:
            if not settings.min_p or dialect + 1 == len(_DIALECTS):
                raise
            self._dialect = max(self._dialect, dialect + 1)
            return await self._complete(client, ask, settings)
        try:
            choice = said.choices[0]
            text, finish_reason = choice.message.content, choice.finish_reason
        except (AttributeError, LookupError, TypeError) as error:
            raise UnsoundAnswerError("an answer without a message") from error
        if not isinstance(text, str | None):
            raise UnsoundAnswerError("a message that is no text")
        return Answer(text or "", str(finish_reason or "stop"))

    async def _embed(self, client: "AsyncOpenAI", texts: Sequence[str]) -> NDArray[np.float32]:
        said = await client.embeddings.create(model=self.asked_of, input=list(texts), encoding_format="float")
        try:
            vectors = [entry.embedding for entry in sorted(said.data, key=lambda entry: entry.index)]
            found = np.array(vectors, dtype=np.float32)
        except (AttributeError, TypeError, ValueError) as error:
            raise UnsoundAnswerError("an answer without embeddings") from error
        if found.ndim != 2 or len(found) != len(texts) or not np.isfinite(found).all():
            raise UnsoundAnswerError(f"embeddings of shape {found.shape} for {len(texts)} texts")
        return found

    async def _patiently(self, call: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """What `call` gives, tried again while what fails may pass."""
        from openai import OpenAIError
        from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay

        retrying = AsyncRetrying(
            retry=retry_if_exception(_may_pass), stop=stop_after_delay(PATIENCE_S), wait=_wait_s, reraise=True
        )
        try:
            return await retrying(call, *arguments)
        except (OpenAIError, UnsoundAnswerError, ValueError) as error:
            raise self._in_words(error) from error

    def _in_words(self, error: "OpenAIError | UnsoundAnswerError | ValueError") -> ServerError:
        """What happened, and what to do about it."""
        import openai

        again = "see to it, then run the same command again"
        said = first_line(error)
        if isinstance(error, openai.APITimeoutError):
            what, remedy = f"gave no answer within {self._timeout_s:g} s", f"{again}; --timeout allows more"
        elif isinstance(error, openai.APIConnectionError):
            what = f"cannot be reached ({first_line(error.__cause__ or error)})"
            remedy = "start it, then run the same command again"
        elif isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            what, remedy = f"refuses the key ({said})", "set OPENAI_API_KEY"
        elif isinstance(error, openai.NotFoundError):
            what, remedy = f"has no such model or address ({said})", "the address of most ends in /v1"
        elif isinstance(error, openai.RateLimitError):
            what, remedy = f"asks for fewer questions at a time ({said})", "run again with a smaller --concurrency"
        elif isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError):
            what, remedy = f"refuses the question ({said})", "where it knows no min_p, give --min-p 0"
        elif isinstance(error, openai.APIStatusError):
            what, remedy = f"fails ({said})", again
        else:
            what, remedy = f"does not answer as OpenAI's protocol says ({said})", again
        return ServerError(Problem(str(self._at), what, remedy))


def _may_pass(error: BaseException) -> bool:
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code >= 500 or error.status_code in (408, 409, 429)
    return isinstance(error, openai.APIConnectionError | UnsoundAnswerError | ValueError)


def _wait_s(state: "RetryCallState") -> float:
    """How long to wait before the next try: twice as long each time, not in step with others, or as the server says."""
    from openai import APIStatusError
    from tenacity import wait_random_exponential

    error = state.outcome.exception() if state.outcome else None
    asked = error.response.headers.get("retry-after", "") if isinstance(error, APIStatusError) else ""
    own = wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S, min=FIRST_WAIT_S)(state)
    return max(own, min(float(asked), PATIENCE_S) if asked.isdecimal() else 0.0)
