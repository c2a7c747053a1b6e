"""A model behind an OpenAI-compatible server: vLLM, llama.cpp's, `transformers serve`, or a paid one."""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from slrmerge.errors import Problem, ServerError
from slrmerge.evaluate.failures import UNSOUND, UnsoundAnswerError, is_loading, patiently
from slrmerge.evaluate.models import Ask, Served
from slrmerge.evaluate.samples import Answer, Settings

if TYPE_CHECKING:
    from openai import AsyncOpenAI

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0
TEXTS_AT_A_TIME = 64
"""How many texts a request for embeddings holds."""

NO_KEY = "none"
"""What servers of one's own are told for a key; OPENAI_API_KEY comes first."""


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
        """See `Model`: waits for a server that is loading its model. Raises ServerError."""
        self._served()

    def close(self) -> None:
        """See `Model`: connections end with each round of questions."""

    def answer(self, asks: Sequence[Ask], settings: Settings, keep: Callable[[Ask, Answer], None]) -> None:
        """See `Model`. Raises ServerError where the server fails for too long, or refuses."""
        model = self.asked_of

        async def one(client: "AsyncOpenAI", ask: Ask) -> None:
            keep(ask, await self._patiently(lambda: self._complete(client, model, ask, settings)))

        self._all(asks, one)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings of `texts`, shape (texts, width). Raises as `answer` does."""
        model = self.asked_of
        parts = [texts[start : start + TEXTS_AT_A_TIME] for start in range(0, len(texts), TEXTS_AT_A_TIME)]
        found: dict[int, NDArray[np.float32]] = {}

        async def one(client: "AsyncOpenAI", number: int) -> None:
            found[number] = await self._patiently(lambda: _embed(client, model, parts[number]))

        self._all(range(len(parts)), one)
        if len({part.shape[1] for part in found.values()}) > 1:
            raise ServerError(Problem(str(self._at), "gave embeddings of different widths"))
        return np.concatenate([found[number] for number in range(len(parts))] or [np.empty((0, 0), np.float32)])

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

    async def _patiently(
        self, call: Callable[[], Awaitable[T]], *, may_pass: Callable[[BaseException], bool] | None = None
    ) -> T:
        return await patiently(call, where=str(self._at), timeout_s=self._timeout_s, may_pass=may_pass)

    def _client(self) -> "AsyncOpenAI":
        from openai import AsyncOpenAI, Timeout

        key = os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY
        if not (key.isascii() and key.isprintable()):
            what = "cannot be sent the key: it has characters that no header has"
            raise ServerError(Problem(str(self._at), what, "set OPENAI_API_KEY anew"))
        timeout = Timeout(None, connect=CONNECT_TIMEOUT_S)  # for the rest there is a limit on the whole
        return AsyncOpenAI(base_url=self._at.url, api_key=key, timeout=timeout, max_retries=0)

    def _served(self) -> list[str]:
        """The models that the server names; that it does not tell is an error only where none was named."""
        from openai import APIStatusError, AuthenticationError, PermissionDeniedError

        async def ask() -> list[str]:
            async with self._client() as client:
                return await self._patiently(lambda: _list(client), may_pass=is_loading)

        try:
            return asyncio.run(ask())
        except ServerError as error:
            untold = isinstance(error.__cause__, (APIStatusError, *UNSOUND))
            refused = isinstance(error.__cause__, AuthenticationError | PermissionDeniedError)
            if self._at.model and untold and not refused:
                return []
            raise

    async def _complete(self, client: "AsyncOpenAI", model: str, ask: Ask, settings: Settings) -> Answer:
        from openai import UnprocessableEntityError

        dialect = self._dialect
        try:
            said: Any = await client.chat.completions.create(
                model=model,
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
            return await self._complete(client, model, ask, settings)
        try:
            choice = said.choices[0]
            text, finish_reason = choice.message.content, choice.finish_reason
        except (AttributeError, LookupError, TypeError) as error:
            raise UnsoundAnswerError("an answer without a message") from error
        if not isinstance(text, str | None):
            raise UnsoundAnswerError("a message that is no text")
        whole = (text or "").encode("utf-8", "replace").decode()  # half a letter could be written down nowhere
        return Answer(whole, str(finish_reason or "stop"))


async def _list(client: "AsyncOpenAI") -> list[str]:
    """The models that have a name."""
    try:
        names = [getattr(model, "id", None) async for model in client.models.list()]
    except (AttributeError, TypeError) as error:
        raise UnsoundAnswerError("an answer without models") from error
    return [name for name in names if isinstance(name, str) and name]


async def _embed(client: "AsyncOpenAI", model: str, texts: Sequence[str]) -> NDArray[np.float32]:
    said = await client.embeddings.create(model=model, input=list(texts), encoding_format="float")
    try:
        vectors = [entry.embedding for entry in sorted(said.data, key=lambda entry: entry.index)]
        found = np.array(vectors)
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsoundAnswerError("an answer without embeddings") from error
    if found.ndim != 2 or len(found) != len(texts) or not found.shape[1]:
        raise UnsoundAnswerError(f"embeddings of shape {found.shape} for {len(texts)} texts")
    with np.errstate(over="ignore"):
        narrow = found.astype(np.float32) if found.dtype.kind in "fi" else None
    if narrow is None or not np.isfinite(narrow).all():
        raise UnsoundAnswerError("embeddings that are no numbers")
    return narrow
