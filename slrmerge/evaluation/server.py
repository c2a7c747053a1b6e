"""A model behind an OpenAI-compatible server: vLLM, llama.cpp, `transformers serve`, or a commercial one."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from slrmerge.errors import OptionError, Problem, ServerError
from slrmerge.evaluation.embeddings import Embedder
from slrmerge.evaluation.models import MOST_REFUSED, AnswerSink, ChatModel, SampleRequest, ServerAddress
from slrmerge.evaluation.samples import Answer, Settings
from slrmerge.evaluation.server_dialects import DIALECTS, Dialect
from slrmerge.evaluation.server_errors import (
    INVALID_JSON,
    RETRYING_S,
    InvalidResponseError,
    translate_server_errors,
)
from slrmerge.io.progress import Progress
from slrmerge.io.sizes import shorten
from slrmerge.io.threads import ThreadPool, require_thread

if TYPE_CHECKING:
    from openai import AsyncOpenAI

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0

MAX_RETRIES = 24
"""Retries of the client: their pauses grow from 0.5 s to 8 s, so a server may be down for two minutes at least."""

INVALID_RESPONSES = 3
"""So many invalid responses in a row are an error: one in thousands is not."""

EMBEDDINGS_PER_REQUEST = 64

_MODELS_SHOWN = 100

NO_KEY = "none"
"""The API key for servers that need none; OPENAI_API_KEY takes precedence."""


class ServerModel(ChatModel, Embedder):
    """A ChatModel and Embedder behind a server, with at most `concurrency` requests at a time, each for one sample.

    The client retries connection errors, timeouts, 408, 409, 429 and 5xx, and honours Retry-After. Each attempt has
    `timeout_s`. An invalid response is requested again, and an error the third time.
    """

    def __init__(
        self,
        at: ServerAddress,
        *,
        concurrency: int,
        timeout_s: float,
        max_retries: int = MAX_RETRIES,
        progress: Progress | None = None,
    ) -> None:
        self._at, self._concurrency, self._timeout_s, self._max_retries = at, concurrency, timeout_s, max_retries
        self._progress = progress or Progress()
        self._reported = False
        self._dialect: Dialect | None = None

    @cached_property
    def model_id(self) -> str:
        """The name of the served model, without its address. Raises ServerError."""
        if self._at.model:
            return self._at.model
        served = self._served()
        if len(served) != 1:
            shown = ", ".join(served[:_MODELS_SHOWN]) + (", …" if len(served) > _MODELS_SHOWN else "")
            what = f"serves {shown}" if served else "does not name the models that it serves"
            raise ServerError(Problem("model-not-named", str(self._at), what, f"name one: LABEL=MODEL@{self._at}"))
        return served[0]

    def check(self) -> None:
        """See `ChatModel`; waits for a server that is loading its model."""
        self._served()

    def answer(self, requests: Sequence[SampleRequest], settings: Settings, sink: AnswerSink) -> None:
        """See `ChatModel`. Raises ServerError when the server rejects the key, or retries do not help.

        Requests no further samples of a prompt that the server rejects.
        """
        model = self.model_id
        rejected: dict[str, ServerError] = {}

        async def one(client: "AsyncOpenAI", request: SampleRequest) -> None:
            if request.prompt not in rejected:
                try:
                    answer = await self._bounded(_valid(lambda: self._complete(client, model, request, settings)))
                except ServerError as error:
                    if error.problems[0].code != "request-rejected":
                        raise
                    rejected[request.prompt] = error
                else:
                    return sink.keep(request, answer)
            return sink.refuse(request, rejected[request.prompt])

        self._run_all(requests, one)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See `Embedder`. Raises ServerError like `answer`, and where the server rejects all texts, or the first 20."""
        model = self.model_id
        starts = range(0, len(texts), EMBEDDINGS_PER_REQUEST)
        found: dict[int, NDArray[np.float32]] = {}
        rejected: dict[int, ServerError] = {}

        async def one(client: "AsyncOpenAI", start: int) -> None:
            waiting = [range(start, min(start + EMBEDDINGS_PER_REQUEST, len(texts)))]
            while waiting:
                part = waiting.pop()
                try:
                    request = partial(_embed, client, model, [texts[number] for number in part])
                    found.update(zip(part, await self._bounded(_valid(request)), strict=True))
                except ServerError as error:
                    if error.problems[0].code != "request-rejected":
                        raise
                    if len(part) > 1:  # one of the texts, or all of them together, may be too long
                        half = len(part) // 2
                        waiting += [part[half:], part[:half]]
                        continue
                    rejected[part[0]] = error
                    if not found and len(rejected) >= MOST_REFUSED:
                        raise

        self._run_all(starts, one)
        if rejected and not found:
            raise next(iter(rejected.values()))
        widths = {vector.shape[0] for vector in found.values()}
        if len(widths) > 1:
            raise ServerError(Problem("invalid-response", str(self._at), "returned embeddings of different widths"))
        vectors = np.full((len(texts), *(widths or {0})), np.nan, np.float32)
        for number, vector in found.items():
            vectors[number] = vector
        return vectors

    def _run_all(self, jobs: Sequence[T], one: "Callable[[AsyncOpenAI, T], Awaitable[None]]") -> None:
        """Run all jobs, `concurrency` at a time; the first error cancels the rest."""

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

    async def _bounded(self, call: Awaitable[T]) -> T:
        """The result of a request, with a limit on all its attempts together."""
        with translate_server_errors(str(self._at), self._timeout_s, {*self._at.secrets, _api_key()}):
            async with asyncio.timeout(self._timeout_s + RETRYING_S):
                return await call

    def _client(self) -> "AsyncOpenAI":
        from openai import AsyncOpenAI, Timeout

        key = _api_key()
        if not (key.isascii() and key.isprintable()):
            what = "has characters that an HTTP header cannot contain"
            raise OptionError(Problem("invalid-key", "OPENAI_API_KEY", what, "set it again"))
        from slrmerge.evaluation.server_client import LimitedClient

        timeout = Timeout(self._timeout_s, connect=min(CONNECT_TIMEOUT_S, self._timeout_s))
        return AsyncOpenAI(
            base_url=self._at.url.partition("?")[0],
            default_query=self._at.query,
            api_key=key,
            timeout=timeout,
            max_retries=self._max_retries,
            http_client=LimitedClient(self._report_retries, timeout=timeout),
        )

    def _report_retries(self, failure: str) -> None:
        """Report once that requests are retried for long."""
        if not self._reported:
            self._reported = True
            limit = f"retrying for up to {self._timeout_s + RETRYING_S:g} s"
            self._progress.message(f"{self._at} does not answer ({failure}); {limit}")

    def _served(self) -> list[str]:
        """The models that the server lists; none where it lists none, unless it has to name the model."""
        from openai import APIStatusError, AuthenticationError, InternalServerError, PermissionDeniedError

        async def list_models() -> list[str]:
            async with self._client() as client:
                try:  # a server that cannot be reached at the start is an error at once
                    return await _list(client.with_options(max_retries=0))
                except InternalServerError as error:
                    if error.status_code != 503:  # it is loading its model
                        raise
                    return await _list(client)

        try:
            return _run(self._bounded(list_models()))
        except ServerError as error:
            is_unlisted = isinstance(error.__cause__, (APIStatusError, *INVALID_JSON))
            is_rejected = isinstance(error.__cause__, AuthenticationError | PermissionDeniedError)
            if self._at.model and is_unlisted and not is_rejected:
                return []
            raise

    async def _complete(self, client: "AsyncOpenAI", model: str, request: SampleRequest, settings: Settings) -> Answer:
        completion = await self._chat_completion(client, model, request, settings)
        try:
            choice = completion.choices[0]
            text, finish_reason = choice.message.content, choice.finish_reason
        except (AttributeError, LookupError, TypeError) as error:
            own = getattr(completion, "error", None)  # some servers send their errors with the status 200
            raise InvalidResponseError("no message" + (f", but {shorten(own)}" if own else "")) from error
        if not isinstance(text, str | None):
            raise InvalidResponseError("a message that is not text")
        return Answer(text or "", str(finish_reason or "stop"))

    async def _chat_completion(
        self, client: "AsyncOpenAI", model: str, request: SampleRequest, settings: Settings
    ) -> Any:
        """The server's response in the first dialect that it accepts, which is then used for all requests."""
        from openai import BadRequestError, UnprocessableEntityError

        rejection: BadRequestError | UnprocessableEntityError | None = None
        fitting = [dialect for dialect in DIALECTS if dialect.has_min_p or not settings.min_p]
        for dialect in (self._dialect,) if self._dialect in fitting else fitting:
            if rejection and rejection.status_code not in dialect.tried_after:
                continue
            try:
                completion = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": request.prompt}],
                    temperature=settings.temperature,
                    top_p=1.0,
                    max_tokens=settings.max_tokens,
                    seed=request.seed,
                    extra_body=dialect.extras(settings),
                )
            except (BadRequestError, UnprocessableEntityError) as error:
                rejection = rejection or error
            else:
                self._dialect = dialect
                return completion
        assert rejection is not None  # the first dialect is always tried
        raise rejection


def _api_key() -> str:
    return os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY


def _run(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, also where this thread already runs an event loop, as in a notebook."""
    require_thread()  # for names of hosts
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPool(1) as thread:
        return thread.submit(asyncio.run, work).result()


async def _valid(request: Callable[[], Awaitable[T]]) -> T:
    """The result of `request`, which is repeated where the response is invalid."""
    for _ in range(INVALID_RESPONSES - 1):
        try:
            return await request()
        except INVALID_JSON:
            continue
    return await request()


async def _list(client: "AsyncOpenAI") -> list[str]:
    """The names of the models that a server lists."""
    try:
        names = [getattr(model, "id", None) async for model in client.models.list()]
    except (AttributeError, TypeError) as error:
        raise InvalidResponseError("no list of models") from error
    return [name for name in names if isinstance(name, str) and name and name.isprintable()]


async def _embed(client: "AsyncOpenAI", model: str, texts: Sequence[str]) -> NDArray[np.float32]:
    response = await client.embeddings.create(model=model, input=list(texts), encoding_format="float")
    try:
        vectors = [entry.embedding for entry in sorted(response.data, key=lambda entry: entry.index)]
        found = np.array(vectors)
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidResponseError("no embeddings") from error
    if found.ndim != 2 or len(found) != len(texts) or not found.shape[1]:
        raise InvalidResponseError(f"embeddings of shape {found.shape} for {len(texts)} texts")
    with np.errstate(over="ignore"):
        narrow = found.astype(np.float32) if found.dtype.kind in "fi" else None
    if narrow is None or not np.isfinite(narrow).all():
        raise InvalidResponseError("embeddings that are not finite numbers")
    return narrow
