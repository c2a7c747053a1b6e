"""A model behind an OpenAI-compatible server: vLLM, llama.cpp's, `transformers serve`, or a paid one."""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

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


def _usual_extras(settings: Settings) -> dict[str, Any]:
    """vLLM's and llama.cpp's own settings: min_p, after temperature, and nothing else that bends the distribution."""
    off = {"top_k": -1, "repetition_penalty": 1.0}
    return {"min_p": settings.min_p, **off, "samplers": ["temperature", "min_p"]}


def _extras_of_transformers(settings: Settings) -> dict[str, Any]:
    """`transformers serve` takes what is not OpenAI's as a generation config."""
    config: dict[str, Any] = {"do_sample": bool(settings.temperature), "max_new_tokens": settings.max_tokens}
    config |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    if settings.temperature:
        config |= {"temperature": settings.temperature, "min_p": settings.min_p, "top_k": 0, "top_p": 1.0}
    return {"generation_config": json.dumps(config)}


def _no_extras(settings: Settings) -> dict[str, Any]:  # noqa: ARG001 (a dialect's)
    return {}


class Dialect(NamedTuple):
    """How a server takes what is not OpenAI's, and by which refusals of the dialects before it may be guessed."""

    extras: Callable[[Settings], dict[str, Any]]
    guessed_by: tuple[int, ...] = ()
    has_min_p: bool = True


_DIALECTS = (
    Dialect(_usual_extras),
    Dialect(_extras_of_transformers, guessed_by=(422,)),
    Dialect(_no_extras, guessed_by=(400, 422), has_min_p=False),
)


class ServerModel:
    """A Model behind a server. Up to `concurrency` questions are under way at a time, each for one sample.

    `timeout_s` is for one answer.
    """

    def __init__(self, at: Served, *, concurrency: int, timeout_s: float) -> None:
        self._at, self._concurrency, self._timeout_s = at, concurrency, timeout_s
        self._dialect: Dialect | None = None

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
            _run(work())
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
            return _run(ask())
        except ServerError as error:
            untold = isinstance(error.__cause__, (APIStatusError, *UNSOUND))
            refused = isinstance(error.__cause__, AuthenticationError | PermissionDeniedError)
            if self._at.model and untold and not refused:
                return []
            raise

    async def _complete(self, client: "AsyncOpenAI", model: str, ask: Ask, settings: Settings) -> Answer:
        said = await self._said(client, model, ask, settings)
        try:
            choice = said.choices[0]
            text, finish_reason = choice.message.content, choice.finish_reason
        except (AttributeError, LookupError, TypeError) as error:
            raise UnsoundAnswerError("an answer without a message") from error
        if not isinstance(text, str | None):
            raise UnsoundAnswerError("a message that is no text")
        whole = (text or "").encode("utf-8", "replace").decode()  # half a letter could be written down nowhere
        return Answer(whole, str(finish_reason or "stop"))

    async def _said(self, client: "AsyncOpenAI", model: str, ask: Ask, settings: Settings) -> Any:
        """The server's reply in the first dialect that it takes, which is then the one for all that follows."""
        from openai import BadRequestError, UnprocessableEntityError

        refusal: BadRequestError | UnprocessableEntityError | None = None
        fitting = [dialect for dialect in _DIALECTS if dialect.has_min_p or not settings.min_p]
        for dialect in (self._dialect,) if self._dialect in fitting else fitting:
            if refusal and refusal.status_code not in dialect.guessed_by:
                continue
            try:
                said = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": ask.prompt}],
                    temperature=settings.temperature,
                    top_p=1.0,
                    max_tokens=settings.max_tokens,
                    seed=ask.seed,
                    extra_body=dialect.extras(settings),
                )
            except (BadRequestError, UnprocessableEntityError) as error:
                refusal = refusal or error
            else:
                self._dialect = dialect
                return said
        assert refusal is not None  # the first is always tried
        raise refusal


def _run(work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives, also where this thread is in the middle of other such work, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


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
