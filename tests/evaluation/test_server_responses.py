"""Responses that harm: too large, too deep, compressed, redirected, without end."""

import gzip
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from openai import APITimeoutError

from slrmerge.errors import ServerError
from slrmerge.evaluation import server as server_module
from slrmerge.evaluation.models import ServerAddress
from slrmerge.evaluation.samples import Answer
from slrmerge.evaluation.server import ServerModel
from slrmerge.evaluation.server_client import MAX_RESPONSE_BYTES
from tests import problems
from tests.checkpoint.hub.transport import Answer as Reply
from tests.evaluation import openai_server
from tests.evaluation.helpers import Kept
from tests.evaluation.openai_server import CHAT, MODELS, PATIENCE_S, OpenAIServer, reply
from tests.evaluation.server_model import SETTINGS, answers, model_at, refused, requests, right, unnamed


def test_an_error_with_the_status_of_an_answer_is_reported(server: OpenAIServer) -> None:
    server.misbehave({"error": {"message": "quota exceeded"}}, times=None)
    problem, _ = refused(model_at(server), requests(1))
    assert (problem.code, "quota exceeded" in problem.what) == ("invalid-response", True)


def test_json_that_is_too_deep_is_no_json(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = Reply(b"[" * 200_000, 200, {"Content-Type": "application/json"})
    monkeypatch.setattr(openai_server, "_damage", lambda fault: deep)
    server.misbehave("malformed", times=None)
    problem, _ = refused(model_at(server), requests(1))
    assert problem.code == "invalid-response"


@pytest.mark.parametrize("path", [CHAT, MODELS])
@pytest.mark.parametrize("status", [200, 404])
def test_a_gzip_bomb_is_not_unpacked(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, path: str, status: int
) -> None:
    packed = gzip.compress(bytes(MAX_RESPONSE_BYTES + 1), 1)
    bomb = Reply(packed, status, {"Content-Type": "application/json", "Content-Encoding": "gzip"})
    monkeypatch.setattr(openai_server, "_damage", lambda fault: bomb)
    server.misbehave("malformed", path=path, times=None)
    if path == CHAT:
        problem, _ = refused(model_at(server), requests(1))
        assert problem.code == "invalid-response"
    else:
        with problems.refused(ServerError, "invalid-response"):
            _ = unnamed(server.url).model_id


def test_a_response_that_is_compressed_twice_is_not_unpacked(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = gzip.compress(gzip.compress(json.dumps(reply("packed")).encode()))
    answer = Reply(twice, 200, {"Content-Type": "application/json", "Content-Encoding": "gzip, gzip"})
    monkeypatch.setattr(openai_server, "_damage", lambda fault: answer)
    server.misbehave("malformed", times=None)
    assert refused(model_at(server), requests(1))[0].code == "invalid-response"


def test_a_compressed_response_is_read(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(json.dumps(reply("packed")).encode())
    answer = Reply(packed, 200, {"Content-Type": "application/json", "Content-Encoding": "gzip"})
    monkeypatch.setattr(openai_server, "_damage", lambda fault: answer)
    server.misbehave("malformed")
    assert answers(model_at(server), requests(1)) == {requests(1)[0]: Answer("packed", "stop")}


@pytest.fixture
def endless(alone: None) -> Iterator[Callable[..., str]]:
    """Starts a server that sends `piece` every `pause_s` for ever, after a head; returns its URL."""
    stopped = threading.Event()

    def serve(listener: socket.socket, piece: bytes, pause_s: float, head: str) -> None:
        with listener:
            while not stopped.is_set():
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.recv(1 << 16)
                    connection.sendall(f"HTTP/1.1 {head}\r\n\r\n".encode())
                    while not stopped.wait(pause_s):
                        connection.sendall(piece)

    threads: list[tuple[threading.Thread, int]] = []

    def start(piece: bytes, pause_s: float, head: str = "200 OK\r\nContent-Type: application/json") -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        thread = threading.Thread(target=serve, args=(listener, piece, pause_s, head))
        thread.start()
        threads.append((thread, port))
        return f"http://127.0.0.1:{port}/v1"

    yield start
    stopped.set()
    for thread, port in threads:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
        thread.join()


def test_a_redirect_without_end_is_followed_without_being_read(
    server: OpenAIServer, endless: Callable[..., str]
) -> None:
    url = endless(b"x" * 100_000, 0, f"307 Away\r\nLocation: {server.url}/chat/completions")
    model = ServerModel(ServerAddress("m", url), concurrency=1, timeout_s=PATIENCE_S)
    assert answers(model, requests(1)) == right(requests(1))


def test_redirects_in_a_circle_are_an_error(server: OpenAIServer) -> None:
    server.misbehave(307, times=None, headers={"Location": f"{server.url}/chat/completions"})
    problem, _ = refused(model_at(server), requests(1))
    assert problem.code == "invalid-response"


def test_a_response_without_end_is_cut_off(endless: Callable[..., str]) -> None:
    model = ServerModel(ServerAddress("m", endless(b"x" * 100_000, 0)), concurrency=1, timeout_s=PATIENCE_S)
    problem, _ = refused(model, requests(1))
    assert problem.code == "invalid-response"


def test_a_response_byte_by_byte_has_the_time_of_one_answer(
    endless: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "RETRYING_S", PATIENCE_S)
    model = ServerModel(ServerAddress("m", endless(b"x", 0.02)), concurrency=1, timeout_s=0.3, max_retries=0)
    with pytest.raises(ServerError) as caught:
        model.answer(requests(1), SETTINGS, Kept(raises=True))
    assert caught.value.problems[0].code == "server-timeout"
    assert isinstance(caught.value.__cause__, APITimeoutError)
