"""Requests to a model server, and what becomes of its responses."""

import gzip
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from openai import APITimeoutError

from slrmerge.errors import OptionError, Problem, ServerError
from slrmerge.evaluation import server as server_module
from slrmerge.evaluation.models import SampleRequest, ServerAddress
from slrmerge.evaluation.samples import Answer, SampleKey, Settings
from slrmerge.evaluation.server import EMBEDDINGS_PER_REQUEST, MAX_RETRIES, ServerModel
from slrmerge.evaluation.server_client import MAX_RESPONSE_BYTES
from tests import problems
from tests.checkpoint.hub.transport import Answer as Reply
from tests.evaluation import openai_server
from tests.evaluation.helpers import Kept
from tests.evaluation.openai_server import (
    CHAT,
    EMBEDDINGS,
    MODELS,
    PATIENCE_S,
    How,
    OpenAIServer,
    embeddings,
    free_port,
    reply,
    vector,
)
from tests.merging.faults import Recorder

SETTINGS = Settings("m", temperature=0.7, min_p=0.1, max_tokens=9)
PLAIN = SETTINGS._replace(min_p=0.0)


def model_at(
    server: OpenAIServer, *, concurrency: int = 1, timeout_s: float = PATIENCE_S, max_retries: int = MAX_RETRIES
) -> ServerModel:
    at = ServerAddress("m", server.url)
    return ServerModel(at, concurrency=concurrency, timeout_s=timeout_s, max_retries=max_retries)


def requests(count: int) -> list[SampleRequest]:
    return [
        SampleRequest(SampleKey("post", f"id{number}", 0), f"Question {number}?", 100 + number)
        for number in range(count)
    ]


def answers(
    model: ServerModel, wanted: Sequence[SampleRequest], settings: Settings = SETTINGS
) -> dict[SampleRequest, Answer]:
    """The answer of `model` to each request."""
    kept = Kept(raises=True)
    model.answer(wanted, settings, kept)
    return kept.answers


def right(wanted: Sequence[SampleRequest]) -> dict[SampleRequest, Answer]:
    """What an OpenAIServer answers."""
    return {request: Answer(f"{request.prompt} {request.seed}", "stop") for request in wanted}


def refused(
    model: ServerModel, wanted: Sequence[SampleRequest], settings: Settings = SETTINGS
) -> tuple[Problem, list[SampleRequest]]:
    """The problem when `model` fails, and which of `wanted` were kept until then."""
    kept = Kept(raises=True)
    with pytest.raises(ServerError) as caught:
        model.answer(wanted, settings, kept)
    (problem,) = caught.value.problems
    assert problem.where.startswith("m@http://127.0.0.1:")
    return problem, list(kept.answers)


def test_a_question_is_sent_with_its_own_seed_and_all_settings(server: OpenAIServer) -> None:
    assert answers(model_at(server), requests(2)) == right(requests(2))
    assert server.asked == [
        {
            "model": "m", "messages": [{"role": "user", "content": f"Question {number}?"}], "temperature": 0.7,
            "top_p": 1.0, "max_tokens": 9, "seed": 100 + number, "min_p": 0.1, "top_k": -1, "repetition_penalty": 1.0,
            "samplers": ["temperature", "min_p"],
        }
        for number in range(2)
    ]  # fmt: skip


def test_no_min_p_is_said_too_for_servers_have_one_of_their_own(server: OpenAIServer) -> None:
    answers(model_at(server), requests(1), PLAIN)
    assert server.asked[0]["min_p"] == 0


@pytest.mark.parametrize("status", [400, 422])
def test_without_min_p_a_server_that_knows_openais_settings_alone_will_do(server: OpenAIServer, status: int) -> None:
    model = model_at(server)
    server.misbehave(status, times=1 if status == 400 else 2)
    assert answers(model, requests(2), PLAIN) == right(requests(2))
    assert [body.keys() for body in server.asked[-2:]] == [
        {"model", "messages", "temperature", "top_p", "max_tokens", "seed"}
    ] * 2


def test_with_min_p_a_server_that_refuses_it_is_not_asked_without(server: OpenAIServer) -> None:
    server.misbehave(400, times=None, message="no min_p here")
    problem, _ = refused(model_at(server), requests(2))
    assert problem.code == "request-rejected"
    assert "no min_p here" in problem.what
    assert len(server.asked) == 1


def test_a_server_that_has_answered_is_not_asked_otherwise_when_it_refuses(server: OpenAIServer) -> None:
    server.misbehave(422, times=None, skip=1)
    _, kept = refused(model_at(server), requests(3))
    assert (dialects(server), kept) == (["vllm"] * 2, requests(1))


def test_where_no_model_is_named_the_only_one_is_asked(server: OpenAIServer) -> None:
    model = ServerModel(ServerAddress(None, server.url), concurrency=1, timeout_s=PATIENCE_S)
    assert model.model_id == "m"
    answers(model, requests(2))
    assert [body["model"] for body in server.asked] == ["m", "m"]
    assert [request.path for request in server.requests] == [MODELS, CHAT, CHAT]  # asked for its models once


@pytest.mark.parametrize(("count", "most"), [(12, 4), (3, 3), (1, 1)])
def test_as_many_questions_are_under_way_as_may_be_and_no_more(server: OpenAIServer, count: int, most: int) -> None:
    together = threading.Barrier(most)  # an answer waits until so many are asked for

    def say(prompt: str, seed: int, body: dict[str, Any]) -> str:
        together.wait(PATIENCE_S)
        return f"{prompt} {seed}"

    server.say = say
    assert answers(model_at(server, concurrency=4), requests(count)) == right(requests(count))
    assert server.at_once == most


def test_no_questions_are_no_requests(server: OpenAIServer) -> None:
    assert answers(model_at(server), []) == {}
    assert server.requests == []


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("how", [408, 409, 429, 500, 502, 503, 504, "close"])
def test_a_failure_that_may_pass_is_retried(server: OpenAIServer, how: How) -> None:
    server.misbehave(how, times=2, skip=1)
    server.misbehave(how, times=3, skip=4, headers={"Retry-After": "0"})
    assert answers(model_at(server, concurrency=3), requests(6)) == right(requests(6))
    assert len(server.asked) == 6 + 5


def test_retries_outlast_a_restart_of_two_minutes(server: OpenAIServer, pauses: list[float]) -> None:
    server.misbehave(503, times=None)
    problem, _ = refused(model_at(server), requests(1))
    assert problem.code == "server-failed"
    assert len(pauses) == MAX_RETRIES
    assert 120 <= sum(pauses) <= server_module.RETRYING_S


def test_retry_after_is_honoured(server: OpenAIServer, pauses: list[float]) -> None:
    for status, wait_s in ((429, "7"), (503, "60")):
        server.misbehave(status, headers={"Retry-After": wait_s})
    assert answers(model_at(server), requests(1)) == right(requests(1))
    assert pauses == [7, 60]


@pytest.mark.usefixtures("hurried")
def test_a_question_that_hangs_is_asked_again(server: OpenAIServer) -> None:
    server.misbehave("hang", times=2, skip=1)
    assert answers(model_at(server, concurrency=2, timeout_s=0.5), requests(4)) == right(requests(4))
    assert len(server.asked) >= 4 + 2


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("how", "code"),
    [
        (429, "rate-limited"),
        (500, "server-failed"),
        (503, "server-failed"),
        ("close", "server-unreachable"),
    ],
)
def test_a_lasting_failure_is_an_error_and_earlier_answers_are_kept(server: OpenAIServer, how: How, code: str) -> None:
    first, *_ = wanted = requests(5)
    done = answers(model_at(server), [first])
    server.misbehave(how, times=None, skip=2)
    problem, kept = refused(model_at(server, max_retries=2), wanted[1:])
    assert problem.code == code
    assert [*done, *kept] == wanted[:3]
    assert len(server.asked) == 3 + 3


@pytest.mark.usefixtures("hurried")
def test_a_lasting_timeout_is_an_error(server: OpenAIServer) -> None:
    server.misbehave("hang", times=None)
    problem, kept = refused(model_at(server, timeout_s=0.2, max_retries=2), requests(5))
    assert problem.code == "server-timeout"
    assert "0.2 s" in problem.what
    assert kept == []
    assert len(server.asked) <= 3


@pytest.mark.usefixtures("hurried")
def test_a_request_and_its_retries_end_in_time(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "RETRYING_S", 0.3)
    server.misbehave("hang", times=None)
    problem, _ = refused(model_at(server, timeout_s=0.2), requests(1))
    assert problem.code == "server-timeout"
    assert len(server.asked) < MAX_RETRIES


@pytest.mark.parametrize(
    "how",
    [
        "malformed",
        "html",
        {"object": "list"},
        {"choices": []},
        {"choices": None},
        {"choices": [None]},
        {"choices": {"a": 1}},
        {"choices": [{"finish_reason": "stop"}]},
        reply(5),
        reply(["a"]),
    ],
    ids=str,
)
def test_a_response_without_an_answer_is_requested_again_twice(server: OpenAIServer, how: How) -> None:
    wanted = requests(5)
    server.misbehave(how, skip=1, times=2)
    assert answers(model_at(server), wanted) == right(wanted)
    server.misbehave(how, skip=2, times=3)
    problem, kept = refused(model_at(server), wanted)
    assert problem.code == "invalid-response"
    assert kept == wanted[:2]
    assert len(server.asked) == 5 + 2 + 2 + 3


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "request-rejected"),
        (401, "key-rejected"),
        (403, "key-rejected"),
        (404, "server-not-found"),
        (413, "request-rejected"),
        (422, "request-rejected"),
    ],
)
def test_a_rejection_is_not_retried(server: OpenAIServer, pauses: list[float], status: int, code: str) -> None:
    wanted = requests(5)
    server.misbehave(status, times=None, skip=3)
    problem, kept = refused(model_at(server), wanted, PLAIN)
    assert problem.code == code
    assert f"{status} - told to" in problem.what
    assert kept == wanted[:3]
    assert len(server.asked) == 3 + 1
    assert pauses == []


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_is_rejected_is_refused_once_and_the_rest_is_answered(server: OpenAIServer, status: int) -> None:
    wanted = [each._replace(prompt=f"Question {number // 3}?") for number, each in enumerate(requests(9))]
    server.misbehave(status, skip=3, message="too long")
    kept = Kept()
    model_at(server).answer(wanted, PLAIN, kept)
    assert list(kept.answers) == [*wanted[:3], *wanted[6:]]
    assert list(kept.refusals) == wanted[3:6]
    for error in kept.refusals.values():
        (problem,) = error.problems
        assert problem.code == "request-rejected"
        assert "too long" in problem.what
    assert len(server.asked) == 7


def test_what_keeps_an_answer_from_being_written_ends_the_rest(server: OpenAIServer) -> None:
    class Full(Kept):
        def keep(self, request: SampleRequest, answer: Answer) -> None:
            raise OSError("no room")

    with pytest.raises(OSError, match=r"^no room$"):
        model_at(server).answer(requests(5), SETTINGS, Full())
    assert len(server.asked) == 1


def unnamed(url: str) -> ServerModel:
    return ServerModel(ServerAddress(None, url), concurrency=1, timeout_s=PATIENCE_S)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", [None, "m"])
def test_an_unreachable_server_is_noticed_at_once(pauses: list[float], name: str | None) -> None:
    at = ServerAddress(name, f"http://127.0.0.1:{free_port()}/v1")
    model = ServerModel(at, concurrency=1, timeout_s=PATIENCE_S)
    with problems.refused(ServerError, "server-unreachable") as caught:
        model.check()
    assert caught.value.problems[0].where == str(at)
    if name is None:
        with problems.refused(ServerError, "server-unreachable"):
            _ = model.model_id
    else:
        assert model.model_id == name
    assert pauses == []


@pytest.mark.parametrize("models", [["a", "b"], []], ids=["several", "none"])
def test_a_model_must_be_named_unless_the_server_has_exactly_one(server: OpenAIServer, models: list[str]) -> None:
    server.models = models
    with problems.refused(ServerError, "model-not-named") as caught:
        _ = unnamed(server.url).model_id
    assert all(name in caught.value.problems[0].what for name in models)


def test_models_are_listed_up_to_a_limit_and_only_by_names_that_print(server: OpenAIServer) -> None:
    server.models = [f"model-{number}" for number in range(2000)]
    with problems.refused(ServerError, "model-not-named") as caught:
        _ = unnamed(server.url).model_id
    assert len(caught.value.problems[0].what) < 2000
    server.models = ["m", "\x1b[31m", "\ud800"]
    assert unnamed(server.url).model_id == "m"


def test_an_error_with_the_status_of_an_answer_is_reported(server: OpenAIServer) -> None:
    server.misbehave({"error": {"message": "quota exceeded"}}, times=None)
    problem, _ = refused(model_at(server), requests(1))
    assert (problem.code, "quota exceeded" in problem.what) == ("invalid-response", True)


LISTS: list[tuple[How, str]] = [
    ({}, "model-not-named"),
    ({"data": [{"id": None}, {"id": ""}, {"id": 5}]}, "model-not-named"),
    ({"data": {"a": 1}}, "model-not-named"),
    ({"data": 5}, "invalid-response"),
    ("malformed", "invalid-response"),
    (404, "server-not-found"),
    (405, "server-failed"),
    (500, "server-failed"),
]


@pytest.mark.parametrize(("how", "code"), LISTS, ids=str)
def test_a_server_that_lists_no_models_serves_one_that_is_named(
    server: OpenAIServer, pauses: list[float], how: How, code: str
) -> None:
    server.misbehave(how, path=MODELS, times=None)
    model_at(server).check()
    assert answers(model_at(server), requests(1)) == right(requests(1))
    with problems.refused(ServerError, code):
        _ = unnamed(server.url).model_id
    assert pauses == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_rejected_key_is_noticed_before_any_request(server: OpenAIServer, status: int) -> None:
    server.misbehave(status, path=MODELS, message="who is this?")
    with problems.refused(ServerError, "key-rejected") as caught:
        model_at(server).check()
    assert "who is this?" in caught.value.problems[0].what


@pytest.mark.parametrize(
    ("key", "sent"), [("sk-secret", "Bearer sk-secret"), ("", "Bearer none"), (None, "Bearer none")]
)
def test_the_key_is_sent(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, key: str | None, sent: str) -> None:
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    model = model_at(server)
    model.check()
    answers(model, requests(1))
    model.embed(["a"])
    assert [request.headers["authorization"] for request in server.requests] == [sent] * 3


def dialects(server: OpenAIServer) -> list[str]:
    return ["transformers" if "generation_config" in body else "vllm" for body in server.asked]


def test_a_server_that_refuses_min_p_is_told_in_its_own_way_from_then_on(server: OpenAIServer) -> None:
    server.strict = True
    model = model_at(server)
    assert answers(model, requests(3)) == right(requests(3))
    assert answers(model, requests(2)) == right(requests(2))
    assert dialects(server) == ["vllm"] + ["transformers"] * 5
    assert not {"min_p", "top_k", "repetition_penalty"} & server.asked[1].keys()
    assert json.loads(server.asked[1]["generation_config"]) == {
        "do_sample": True, "max_new_tokens": 9, "temperature": 0.7, "min_p": 0.1, "top_k": 0, "top_p": 1.0,
        "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    }  # fmt: skip


def test_greedy_decoding_is_told_in_its_own_way_too(server: OpenAIServer) -> None:
    server.strict = True
    answers(model_at(server), requests(1), SETTINGS._replace(temperature=0.0))
    assert json.loads(server.asked[1]["generation_config"]) == {
        "do_sample": False, "max_new_tokens": 9, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    }  # fmt: skip


def test_questions_under_way_when_the_dialect_turns_out_wrong_are_asked_in_the_other(server: OpenAIServer) -> None:
    server.strict = True
    assert answers(model_at(server, concurrency=4), requests(12)) == right(requests(12))
    assert 1 <= dialects(server).count("vllm") <= 4
    assert dialects(server).count("transformers") == 12


def test_a_server_that_refuses_every_dialect_is_asked_once_in_each(server: OpenAIServer) -> None:
    server.misbehave(422, times=None, message="no extras here")
    problem, kept = refused(model_at(server), requests(3))
    assert problem.code == "request-rejected"
    assert "no extras here" in problem.what
    assert (dialects(server), kept) == (["vllm", "transformers"], [])


@pytest.mark.usefixtures("hurried")
def test_a_server_that_fails_is_not_taken_for_one_of_another_dialect(server: OpenAIServer) -> None:
    server.misbehave(500, times=2)
    server.misbehave(400, times=1, skip=1)
    _, kept = refused(model_at(server), requests(3))
    assert (dialects(server), kept) == (["vllm"] * 4, requests(1))


STRANGE = ["", " \n", "line\r\nline\u2028line", "\0", '"}]}', "<html>", "é👩‍👩‍👧ß", "\ud83d", "x" * 100_000]


def test_whatever_text_is_said_is_the_answer(server: OpenAIServer) -> None:
    server.say = lambda prompt, seed, body: STRANGE[seed - 100]
    found = answers(model_at(server, concurrency=4), requests(len(STRANGE)))
    assert [found[request].text for request in requests(len(STRANGE))] == STRANGE


@pytest.mark.parametrize(
    "how", [reply(None), reply(""), {"choices": [{"message": {"role": "assistant"}, "finish_reason": "stop"}]}], ids=str
)
def test_no_content_is_an_empty_answer(server: OpenAIServer, how: How) -> None:
    server.misbehave(how)
    assert answers(model_at(server), requests(1)) == {requests(1)[0]: Answer("", "stop")}
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("said", "kept"),
    [("length", "length"), ("content_filter", "content_filter"), ("of its own", "of its own"), (None, "stop")],
)
def test_why_an_answer_ended_is_kept(server: OpenAIServer, said: str | None, kept: str) -> None:
    server.finish_reason = said
    assert [answer.finish_reason for answer in answers(model_at(server), requests(1)).values()] == [kept]


def test_a_prompt_comes_as_it_is(server: OpenAIServer) -> None:
    prompts = [text for text in STRANGE if text.isprintable() or text.isspace()]
    wanted = [SampleRequest(SampleKey("post", str(number), 0), prompt, number) for number, prompt in enumerate(prompts)]
    answers(model_at(server), wanted)
    assert server.prompts == prompts


@pytest.mark.parametrize("concurrency", [1, 3])
def test_embeddings_come_in_order_whatever_the_parts(server: OpenAIServer, concurrency: int) -> None:
    texts = [f"text {number}" for number in range(2 * EMBEDDINGS_PER_REQUEST + 1)]
    found = model_at(server, concurrency=concurrency).embed(texts)
    assert found.dtype == np.float32
    assert found.tolist() == [vector(text) for text in texts]
    assert sorted(len(body["input"]) for body in server.asked) == [1, EMBEDDINGS_PER_REQUEST, EMBEDDINGS_PER_REQUEST]
    assert all(body["model"] == "m" and body["encoding_format"] == "float" for body in server.asked)


INVALID_EMBEDDINGS: dict[str, How] = {
    "too few": embeddings([1.0, 2.0]),
    "too many": embeddings([1.0], [2.0], [3.0]),
    "different widths": embeddings([1.0, 2.0], [1.0]),
    "no width": embeddings([], []),
    "words": embeddings(["x"], ["y"]),
    "numbers as words": embeddings(["1"], ["2"]),
    "too large": embeddings([1e39], [1.0]),
    "a huge integer": embeddings([10**400], [1.0]),
    "base64": embeddings("AACAPw==", "AACAPw=="),
    "null": embeddings(None, None),
    "a number": embeddings(1.0, 2.0),
    "not a number": embeddings([1.0, float("nan")], [1.0, 2.0]),
    "infinite": embeddings([1.0, float("inf")], [1.0, 2.0]),
    "no list": {"object": "list"},
    "a page": "html",
}


@pytest.mark.parametrize("kind", INVALID_EMBEDDINGS)
def test_invalid_embeddings_are_refused(server: OpenAIServer, kind: str) -> None:
    server.misbehave(INVALID_EMBEDDINGS[kind], path=EMBEDDINGS, times=4)
    with problems.refused(ServerError, "invalid-response"):
        model_at(server).embed(["a", "b"])
    assert len(server.asked) == 3
    assert model_at(server).embed(["a", "b"]).tolist() == [vector("a"), vector("b")]


@pytest.mark.usefixtures("hurried")
def test_requests_for_embeddings_are_retried(server: OpenAIServer) -> None:
    server.misbehave(500, path=EMBEDDINGS, times=2)
    assert model_at(server).embed(["a", "b"]).tolist() == [vector("a"), vector("b")]


def test_no_texts_have_no_embeddings(server: OpenAIServer) -> None:
    assert model_at(server).embed([]).shape == (0, 0)
    assert server.asked == []


def test_parts_of_embeddings_that_do_not_fit_together_are_refused(server: OpenAIServer) -> None:
    server.misbehave(embeddings([1.0]), path=EMBEDDINGS, skip=1)
    with problems.refused(ServerError, "invalid-response"):
        model_at(server).embed(["a"] * (EMBEDDINGS_PER_REQUEST + 1))


def test_an_unnamed_model_can_be_asked_at_once(server: OpenAIServer) -> None:
    assert answers(unnamed(server.url), requests(1)) == right(requests(1))


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


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(("how", "why"), [(503, "503"), ("close", "RemoteProtocolError")])
def test_long_retries_are_reported_once(server: OpenAIServer, how: How, why: str) -> None:
    progress = Recorder()
    model = ServerModel(
        ServerAddress("m", server.url), concurrency=3, timeout_s=PATIENCE_S, max_retries=9, progress=progress
    )
    server.misbehave(how, times=2)
    answers(model, requests(6))
    assert progress.said == []
    server.misbehave(how, times=None)
    refused(model, requests(6))
    (message,) = progress.said
    assert f"({why})" in message


def test_a_long_message_of_a_server_is_shortened(server: OpenAIServer) -> None:
    server.misbehave(400, times=None, message="no " * 100_000)
    problem, _ = refused(model_at(server), requests(1))
    assert len(problem.what) < 2000


@pytest.mark.parametrize("body", [{"detail": "no min_p"}, {"error": "no min_p"}, {"message": "no  min_p"}], ids=str)
def test_the_servers_own_words_are_passed_on(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, body: dict[str, str]
) -> None:
    monkeypatch.setattr(openai_server, "_refusal", lambda status, message: Reply.of(body, status))
    server.misbehave(400, times=None)
    problem, _ = refused(model_at(server), requests(1))
    assert "no min_p" in " ".join(problem.what.split())


@pytest.mark.parametrize("key", ["sk-secr\u00e9t", "sk-sec\x00ret"])
def test_a_key_that_cannot_be_sent_is_said_and_not_shown(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr("slrmerge.evaluation.server.os.environ", {"OPENAI_API_KEY": key})  # which takes no null byte
    with problems.refused(OptionError, "invalid-key") as caught:
        answers(model_at(server), requests(1))
    assert key not in str(caught.value)


def test_a_server_that_is_loading_its_model_is_waited_for(server: OpenAIServer, hurried: None) -> None:
    server.misbehave(503, path=MODELS, times=5, message="Loading model")
    assert unnamed(server.url).model_id == "m"


def test_credentials_are_sent_and_not_repeated(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sekret-key")
    at = ServerAddress("m", server.url.replace("://", "://user:sekret-word@") + "?api_key=sekret-query")
    model = ServerModel(at, concurrency=1, timeout_s=PATIENCE_S)
    assert answers(model, requests(1)) == right(requests(1))
    assert server.requests[-1].path == CHAT
    server.misbehave(401, message="not sekret-key, sekret-word or sekret-query")
    with problems.refused(ServerError, "key-rejected") as caught:
        answers(model, requests(1))
    assert "sekret" not in str(caught.value)
    assert "not ***, *** or ***" in str(caught.value)
