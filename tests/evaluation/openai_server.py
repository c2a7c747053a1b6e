"""A small OpenAI-compatible server on loopback, which fails on demand.

Tests run the real `openai` client, not a mock of it: what it sends, reads, gives up and raises is its own.
"""

import hashlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from tests.checkpoint.hub.transport import Answer, Asked, Fault, Kind, Listener, Request

CHAT, EMBEDDINGS, MODELS = "/v1/chat/completions", "/v1/embeddings", "/v1/models"
OWN_FIELDS = {"min_p", "top_k", "repetition_penalty"}
"""What is not OpenAI's, and what `transformers serve` refuses."""

PATIENCE_S = 60.0
"""How long a test waits for what must happen before it fails."""

Words = Callable[[str, int, dict[str, Any]], str | None]
How = int | Literal["hang", "close", "malformed", "html"] | dict[str, Any]


def repeat(prompt: str, seed: int, body: dict[str, Any]) -> str | None:
    """What a server says unless it is given other words."""
    return f"{prompt} {seed}"


def vector(text: str) -> list[float]:
    """A text's embedding, of width 3: another for another text."""
    return [byte / 256 for byte in hashlib.sha256(text.encode()).digest()[:3]]


def reply(text: object, finish_reason: str | None = "stop") -> dict[str, Any]:
    """A chat completion."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


def embeddings(*vectors: object) -> dict[str, Any]:
    """An answer with these embeddings, the last first: only their index tells which is which."""
    data = [{"object": "embedding", "index": number, "embedding": each} for number, each in enumerate(vectors)]
    return {"object": "list", "model": "m", "data": data[::-1], "usage": {"prompt_tokens": 1, "total_tokens": 1}}


def free_port() -> int:
    """A port of loopback that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


@dataclass
class _Misbehaviour:
    how: How
    path: str
    skip: int
    left: int | None
    message: str
    headers: dict[str, str] = field(default_factory=dict)


class OpenAIServer:
    """A model server, from `with` to the end of it.

    It serves `models`, and answers with what `say` makes of (prompt, seed, request) and with `finish_reason`. In
    `asked` are the JSON bodies of all questions as they came, in `at_once` how many of them were under way at a time at
    most, in `requests` every request with its headers that got an answer. It rejects embeddings of texts with more than
    `embeds_up_to` characters. With `strict` it knows only the fields that `transformers serve` knows.
    """

    def __init__(self, *models: str, say: Words = repeat, strict: bool = False) -> None:
        self.models, self.say, self.strict = list(models), say, strict
        self.finish_reason: str | None = "stop"
        self.embeds_up_to: int | None = None
        self.asked: list[dict[str, Any]] = []
        self.requests: list[Request] = []
        self.connections: list[str] = []
        self.closing = threading.Event()
        self.at_once = 0
        self._under_way = 0
        self._faults: list[_Misbehaviour] = []
        self._changed = threading.Condition()
        self._listener = Listener(self, "models")
        self.url = f"http://127.0.0.1:{self._listener.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def prompts(self) -> list[str]:
        """The prompts of all questions, as they came."""
        return [body["messages"][0]["content"] for body in self.asked if "messages" in body]

    def misbehave(
        self, how: How, *, times: int | None = 1, skip: int = 0, path: str = CHAT, message: str = "told to",
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Do `how` to the next `times` requests (None: all) of a `path` after the next `skip`.

        A number is a status with a `message`, a map JSON instead of an answer. `hang` waits for `release` and then
        answers, `close` ends the connection, `malformed` is no JSON though it says so, `html` a page with status 200.
        """
        self._faults.append(_Misbehaviour(how, path, skip, times, message, headers or {}))

    def behave(self) -> None:
        """Forget what `misbehave` was told."""
        with self._changed:
            self._faults.clear()

    def release(self) -> None:
        """End all hanging, now and later."""
        self.closing.set()

    def stop(self) -> None:
        """Be gone: whoever asks is refused a connection. It may be gone already."""
        self.release()
        self._listener.stop()

    def wait_for(self, count: int) -> None:
        """Wait until so many questions have come."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.asked) >= count, PATIENCE_S), f"{len(self.asked)} came"

    def take_fault(self, line: str, kinds: tuple[Kind, ...]) -> Fault | None:
        """None of the transport's own: they are chosen in `answer`."""
        return None

    def answer(self, host: str, asked: Asked) -> Answer:
        """See `Site`."""
        with self._changed:
            if asked.body:
                self.asked.append(asked.json())
                self._under_way += 1
                self.at_once = max(self.at_once, self._under_way)
            fault = self._fault(asked.path)
            self._changed.notify_all()
        try:
            if fault and fault.how == "hang":
                self.closing.wait()
            elif fault:
                return _damage(fault)
            return self._answer(asked)
        finally:
            if asked.body:
                with self._changed:
                    self._under_way -= 1

    def _fault(self, path: str) -> _Misbehaviour | None:
        """What is to be done to this request, counted."""
        for fault in [fault for fault in self._faults if fault.path == path and fault.left != 0]:
            if fault.skip == 0:
                fault.left = None if fault.left is None else fault.left - 1
                return fault
            fault.skip -= 1
        return None

    def _answer(self, asked: Asked) -> Answer:
        if asked.path == MODELS:
            return Answer.of({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})
        body = asked.json()
        if self.strict and (unknown := sorted(OWN_FIELDS & body.keys())):
            return _refusal(422, f"Unexpected fields in the request: {', '.join(unknown)}")
        if asked.path == EMBEDDINGS and self.embeds_up_to and max(map(len, body["input"])) > self.embeds_up_to:
            return _refusal(400, "a text is too long")
        if asked.path == EMBEDDINGS:
            return Answer.of(embeddings(*map(vector, body["input"])))
        return Answer.of(reply(self.say(body["messages"][0]["content"], body["seed"], body), self.finish_reason))


def _refusal(status: int, message: str) -> Answer:
    return Answer.of({"error": {"message": message, "type": "error", "code": None}}, status)


def _damage(fault: _Misbehaviour) -> Answer:
    if fault.how == "close":
        raise ConnectionAbortedError("told to")  # which the listener takes for a client that went away
    if isinstance(fault.how, int):
        answer = _refusal(fault.how, fault.message)
    elif fault.how == "malformed":
        answer = Answer(b'{"choices": [', 200, {"Content-Type": "application/json"})
    elif fault.how == "html":
        answer = Answer(b"<html>Welcome</html>", 200, {"Content-Type": "text/html"})
    else:
        answer = Answer.of(fault.how)
    answer.headers |= fault.headers
    return answer
