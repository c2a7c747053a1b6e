"""What is sent to a model server, and what is made of whatever comes back."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import tenacity

from slrmerge.errors import ServerError
from slrmerge.evaluate import failures
from slrmerge.evaluate.models import Ask, Served
from slrmerge.evaluate.samples import Answer, Key, Settings
from slrmerge.evaluate.server import TEXTS_AT_A_TIME, ServerModel
from tests.evaluate import openai_server
from tests.evaluate.openai_server import (
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
from tests.hub.transport import Answer as Reply

SETTINGS = Settings("m", temperature=0.7, min_p=0.1, max_tokens=9)
PLAIN = SETTINGS._replace(min_p=0.0)
NO_MESSAGE = "does not answer as OpenAI's protocol says (an answer without a message)"
AGAIN = "see to it, then run the same command again"
START_IT = "start it, then run the same command again"


def model_at(server: OpenAIServer, *, concurrency: int = 1, timeout_s: float = PATIENCE_S) -> ServerModel:
    return ServerModel(Served("m", server.url), concurrency=concurrency, timeout_s=timeout_s)


def asks(count: int) -> list[Ask]:
    return [Ask(Key("post", f"id{number}", 0), f"Question {number}?", 100 + number) for number in range(count)]


def answers(model: ServerModel, wanted: Sequence[Ask], settings: Settings = SETTINGS) -> dict[Ask, Answer]:
    """What `model` answers to each."""
    kept: list[tuple[Ask, Answer]] = []
    model.answer(wanted, settings, lambda ask, answer: kept.append((ask, answer)))
    assert len(dict(kept)) == len(kept)  # none twice
    return dict(kept)


def right(wanted: Sequence[Ask]) -> dict[Ask, Answer]:
    """What an OpenAIServer says to these."""
    return {ask: Answer(f"{ask.prompt} {ask.seed}", "stop") for ask in wanted}


def refused(model: ServerModel, wanted: Sequence[Ask], settings: Settings = SETTINGS) -> tuple[str, list[Ask]]:
    """What is said when `model` fails, and which of `wanted` were kept until then."""
    kept: list[Ask] = []
    with pytest.raises(ServerError) as caught:
        model.answer(wanted, settings, lambda ask, answer: kept.append(ask))
    return str(caught.value), kept


def test_a_question_is_sent_with_its_own_seed_and_all_settings(server: OpenAIServer) -> None:
    assert answers(model_at(server), asks(2)) == right(asks(2))
    assert server.asked == [
        {
            "model": "m", "messages": [{"role": "user", "content": f"Question {number}?"}], "temperature": 0.7,
            "top_p": 1.0, "max_tokens": 9, "seed": 100 + number, "min_p": 0.1, "top_k": -1, "repetition_penalty": 1.0,
            "samplers": ["temperature", "min_p"],
        }
        for number in range(2)
    ]  # fmt: skip


def test_no_min_p_is_said_too_for_servers_have_one_of_their_own(server: OpenAIServer) -> None:
    answers(model_at(server), asks(1), PLAIN)
    assert server.asked[0]["min_p"] == 0


@pytest.mark.parametrize("status", [400, 422])
def test_without_min_p_a_server_that_knows_openais_settings_alone_will_do(server: OpenAIServer, status: int) -> None:
    model = model_at(server)
    server.misbehave(status, times=1 if status == 400 else 2)
    assert answers(model, asks(2), PLAIN) == right(asks(2))
    assert [body.keys() for body in server.asked[-2:]] == [
        {"model", "messages", "temperature", "top_p", "max_tokens", "seed"}
    ] * 2


def test_with_min_p_a_server_that_refuses_it_is_not_asked_without(server: OpenAIServer) -> None:
    server.misbehave(400, times=None, message="no min_p here")
    problem, _ = refused(model_at(server), asks(2))
    said = "refuses the question (Error code: 400 - no min_p here); where it knows no min_p, give --min-p 0"
    assert problem == f"m@{server.url}: {said}"
    assert len(server.asked) == 1


def test_a_server_that_has_answered_is_not_asked_otherwise_when_it_refuses(server: OpenAIServer) -> None:
    server.misbehave(422, times=None, skip=1)
    _, kept = refused(model_at(server), asks(3))
    assert (dialects(server), kept) == (["vllm"] * 2, asks(1))


def test_where_no_model_is_named_the_only_one_is_asked(server: OpenAIServer) -> None:
    model = ServerModel(Served(None, server.url), concurrency=1, timeout_s=PATIENCE_S)
    assert model.asked_of == "m"
    answers(model, asks(2))
    assert [body["model"] for body in server.asked] == ["m", "m"]
    assert [request.path for request in server.requests] == [MODELS, CHAT, CHAT]  # asked for its models once


@pytest.mark.parametrize(("count", "most"), [(12, 4), (3, 3), (1, 1)])
def test_as_many_questions_are_under_way_as_may_be_and_no_more(server: OpenAIServer, count: int, most: int) -> None:
    together = threading.Barrier(most)  # an answer waits until so many are asked for

    def say(prompt: str, seed: int, body: dict[str, Any]) -> str:
        together.wait(PATIENCE_S)
        return f"{prompt} {seed}"

    server.say = say
    assert answers(model_at(server, concurrency=4), asks(count)) == right(asks(count))
    assert server.at_once == most


def test_no_questions_are_no_requests(server: OpenAIServer) -> None:
    assert answers(model_at(server), []) == {}
    assert server.requests == []


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    "how",
    [408, 409, 429, 500, 502, 503, 504, "close", "malformed", "html", {}, {"choices": []}, {"choices": None}, reply(5)],
    ids=str,
)
def test_a_server_that_fails_now_and_then_is_asked_again(server: OpenAIServer, how: How) -> None:
    server.misbehave(how, times=2, skip=1)
    server.misbehave(how, times=3, skip=4, headers={"Retry-After": "0"})
    assert answers(model_at(server, concurrency=3), asks(6)) == right(asks(6))
    assert len(server.asked) == 6 + 5


@pytest.mark.usefixtures("hurried")
def test_a_question_that_hangs_is_asked_again(server: OpenAIServer) -> None:
    server.misbehave("hang", times=2, skip=1)
    assert answers(model_at(server, concurrency=2, timeout_s=0.5), asks(4)) == right(asks(4))
    assert len(server.asked) >= 4 + 2


@pytest.mark.usefixtures("three_tries")
@pytest.mark.parametrize(
    ("how", "said"),
    [
        (429, "asks for fewer questions at a time (Error code: 429 - told to); run again with a smaller --concurrency"),
        (500, f"fails (Error code: 500 - told to); {AGAIN}"),
        (503, f"fails (Error code: 503 - told to); {AGAIN}"),
        ("close", f"cannot be reached (Server disconnected without sending a response.); {START_IT}"),
        (
            "malformed",
            f"does not answer as OpenAI's protocol says (Expecting value: line 1 column 14 (char 13)); {AGAIN}",
        ),
        ("html", f"{NO_MESSAGE}; {AGAIN}"),
        ({"object": "list"}, f"{NO_MESSAGE}; {AGAIN}"),
        ({"choices": []}, f"{NO_MESSAGE}; {AGAIN}"),
        ({"choices": [None]}, f"{NO_MESSAGE}; {AGAIN}"),
        ({"choices": {"a": 1}}, f"{NO_MESSAGE}; {AGAIN}"),
        ({"choices": [{"finish_reason": "stop"}]}, f"{NO_MESSAGE}; {AGAIN}"),
        (reply(5), f"does not answer as OpenAI's protocol says (a message that is no text); {AGAIN}"),
        (reply(["a"]), f"does not answer as OpenAI's protocol says (a message that is no text); {AGAIN}"),
    ],
    ids=str,
)
def test_a_failure_that_lasts_is_said_in_words_and_what_was_answered_is_kept(
    server: OpenAIServer, how: How, said: str
) -> None:
    first, *_ = wanted = asks(5)
    done = answers(model_at(server), [first])
    server.misbehave(how, times=None, skip=2)
    problem, kept = refused(model_at(server), wanted[1:])
    assert problem == f"m@{server.url}: {said}"
    assert [*done, *kept] == wanted[:3]
    assert len(server.asked) == 3 + 3


@pytest.mark.usefixtures("three_tries")
def test_hanging_that_lasts_is_said_in_words(server: OpenAIServer) -> None:
    server.misbehave("hang", times=None)
    problem, kept = refused(model_at(server, timeout_s=0.2), asks(5))
    assert problem == f"m@{server.url}: gave no answer within 0.2 s; {AGAIN}; --timeout allows more"
    assert kept == []
    assert len(server.asked) <= 3


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "refuses the question (Error code: 400 - told to); where it knows no min_p, give --min-p 0"),
        (401, "refuses the key (Error code: 401 - told to); set OPENAI_API_KEY"),
        (403, "refuses the key (Error code: 403 - told to); set OPENAI_API_KEY"),
        (404, "has no such model or address (Error code: 404 - told to); the address of most ends in /v1"),
        (413, f"fails (Error code: 413 - told to); {AGAIN}"),
        (422, "refuses the question (Error code: 422 - told to); where it knows no min_p, give --min-p 0"),
    ],
)
def test_a_refusal_is_not_asked_again(server: OpenAIServer, status: int, said: str) -> None:
    wanted = asks(5)
    server.misbehave(status, times=None, skip=3)
    problem, kept = refused(model_at(server), wanted, PLAIN)
    assert problem == f"m@{server.url}: {said}"
    assert kept == wanted[:3]
    assert len(server.asked) == 3 + 1


def test_patience_ends(server: OpenAIServer, hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "PATIENCE_S", 0.01)
    server.misbehave(500, times=None)
    problem, kept = refused(model_at(server, concurrency=4), asks(8))
    assert problem == f"m@{server.url}: fails (Error code: 500 - told to); {AGAIN}"
    assert kept == []


def test_what_keeps_an_answer_from_being_written_ends_the_rest(server: OpenAIServer) -> None:
    def keep(ask: Ask, answer: Answer) -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match=r"^no room$"):
        model_at(server).answer(asks(5), SETTINGS, keep)
    assert len(server.asked) == 1


def wait_s(headers: dict[str, str], *, status: int = 429, tries: int = 1) -> float:
    """How long is waited after so many tries, the last answered like this."""
    request = httpx2.Request("POST", "http://127.0.0.1/v1/chat/completions")
    error = openai.APIStatusError("no", response=httpx2.Response(status, headers=headers, request=request), body=None)
    state = tenacity.RetryCallState(tenacity.AsyncRetrying(), None, (), {})
    state.attempt_number = tries
    state.set_exception((type(error), error, None))
    return failures.wait_s(state)


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_is_left_alone_for_as_long_as_it_says(status: int) -> None:
    assert wait_s({"Retry-After": "7"}, status=status) == 7.0
    assert wait_s({"retry-after": "1"}, status=status) >= 1.0
    assert wait_s({"Retry-After": "99999"}, status=status) == failures.PATIENCE_S


@pytest.mark.parametrize("said", [None, "0", "-5", "", "soon", "1e3", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_server_that_does_not_say_for_how_long_is_left_alone_ever_longer(said: str | None) -> None:
    headers = {} if said is None else {"Retry-After": said}
    for tries, longest in [
        (1, 0.5),
        (2, 1.0),
        (5, 8.0),
        (20, failures.LONGEST_WAIT_S),
        (5000, failures.LONGEST_WAIT_S),
    ]:
        waits = [wait_s(headers, tries=tries) for _ in range(50)]
        assert all(failures.FIRST_WAIT_S <= wait <= longest for wait in waits)
        assert tries == 1 or len(set(waits)) > 1  # not in step with others


def unnamed(url: str) -> ServerModel:
    return ServerModel(Served(None, url), concurrency=1, timeout_s=PATIENCE_S)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", [None, "m"])
def test_a_server_that_is_not_there_is_noticed_before_anything_is_asked(name: str | None) -> None:
    at = Served(name, f"http://127.0.0.1:{free_port()}/v1")
    model = ServerModel(at, concurrency=1, timeout_s=PATIENCE_S)
    with pytest.raises(ServerError) as caught:
        model.check()
    assert str(caught.value) == f"{at}: cannot be reached (All connection attempts failed); {START_IT}"
    if name is None:
        with pytest.raises(ServerError) as again:
            _ = model.asked_of
        assert str(again.value) == str(caught.value)
    else:
        assert model.asked_of == name


@pytest.mark.parametrize(
    ("models", "said"), [(["a", "b"], "serves a, b"), ([], "serves no model that it names")], ids=["several", "none"]
)
def test_a_model_has_to_be_named_where_there_is_not_just_one(
    server: OpenAIServer, models: list[str], said: str
) -> None:
    server.models = models
    with pytest.raises(ServerError) as caught:
        _ = unnamed(server.url).asked_of
    assert str(caught.value) == f"{server.url}: {said}; name one as LABEL=MODEL@{server.url}"


NO_PROTOCOL = "does not answer as OpenAI's protocol says"
LISTS: list[tuple[How, str]] = [
    ({}, "serves no model that it names; name one as LABEL=MODEL@{url}"),
    ({"data": [{"id": None}, {"id": ""}, {"id": 5}]}, "serves no model that it names; name one as LABEL=MODEL@{url}"),
    ({"data": {"a": 1}}, "serves no model that it names; name one as LABEL=MODEL@{url}"),
    ({"data": 5}, f"{NO_PROTOCOL} (an answer without models); {AGAIN}"),
    ("malformed", f"{NO_PROTOCOL} (Expecting value: line 1 column 14 (char 13)); {AGAIN}"),
    (404, "has no such model or address (Error code: 404 - told to); the address of most ends in /v1"),
    (405, f"fails (Error code: 405 - told to); {AGAIN}"),
]


@pytest.mark.parametrize(("how", "said"), LISTS, ids=str)
def test_a_server_that_does_not_tell_its_models_serves_one_that_is_named(
    server: OpenAIServer, how: How, said: str
) -> None:
    server.misbehave(how, path=MODELS, times=None)
    model_at(server).check()
    assert answers(model_at(server), asks(1)) == right(asks(1))
    with pytest.raises(ServerError) as caught:
        _ = unnamed(server.url).asked_of
    assert str(caught.value) == f"{server.url}: {said.format(url=server.url)}"


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_is_noticed_before_anything_is_asked(server: OpenAIServer, status: int) -> None:
    server.misbehave(status, path=MODELS, message="who is this?")
    with pytest.raises(ServerError) as caught:
        model_at(server).check()
    said = f"refuses the key (Error code: {status} - who is this?); set OPENAI_API_KEY"
    assert str(caught.value) == f"m@{server.url}: {said}"


@pytest.mark.parametrize(
    ("key", "sent"), [("sk-secret", "Bearer sk-secret"), ("", "Bearer none"), (None, "Bearer none")]
)
def test_the_key_is_sent(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, key: str | None, sent: str) -> None:
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    model = model_at(server)
    model.check()
    answers(model, asks(1))
    model.embed(["a"])
    assert [request.headers["authorization"] for request in server.requests] == [sent] * 3


def dialects(server: OpenAIServer) -> list[str]:
    return ["transformers" if "generation_config" in body else "vllm" for body in server.asked]


def test_a_server_that_refuses_min_p_is_told_in_its_own_way_from_then_on(server: OpenAIServer) -> None:
    server.strict = True
    model = model_at(server)
    assert answers(model, asks(3)) == right(asks(3))
    assert answers(model, asks(2)) == right(asks(2))
    assert dialects(server) == ["vllm"] + ["transformers"] * 5
    assert not {"min_p", "top_k", "repetition_penalty"} & server.asked[1].keys()
    assert json.loads(server.asked[1]["generation_config"]) == {
        "do_sample": True, "max_new_tokens": 9, "temperature": 0.7, "min_p": 0.1, "top_k": 0, "top_p": 1.0,
        "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    }  # fmt: skip


def test_greedy_decoding_is_told_in_its_own_way_too(server: OpenAIServer) -> None:
    server.strict = True
    answers(model_at(server), asks(1), SETTINGS._replace(temperature=0.0))
    assert json.loads(server.asked[1]["generation_config"]) == {
        "do_sample": False, "max_new_tokens": 9, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    }  # fmt: skip


def test_questions_under_way_when_the_dialect_turns_out_wrong_are_asked_in_the_other(server: OpenAIServer) -> None:
    server.strict = True
    assert answers(model_at(server, concurrency=4), asks(12)) == right(asks(12))
    assert 1 <= dialects(server).count("vllm") <= 4
    assert dialects(server).count("transformers") == 12


def test_a_server_that_refuses_every_dialect_is_asked_once_in_each(server: OpenAIServer) -> None:
    server.misbehave(422, times=None, message="no extras here")
    problem, kept = refused(model_at(server), asks(3))
    said = "refuses the question (Error code: 422 - no extras here); where it knows no min_p, give --min-p 0"
    assert problem == f"m@{server.url}: {said}"
    assert (dialects(server), kept) == (["vllm", "transformers"], [])


@pytest.mark.usefixtures("hurried")
def test_a_server_that_fails_is_not_taken_for_one_of_another_dialect(server: OpenAIServer) -> None:
    server.misbehave(500, times=2)
    server.misbehave(400, times=1, skip=1)
    _, kept = refused(model_at(server), asks(3))
    assert (dialects(server), kept) == (["vllm"] * 4, asks(1))


STRANGE = ["", " \n", "line\r\nline\u2028line", "\0", '"}]}', "<html>", "é👩‍👩‍👧ß", "\ud83d", "x" * 100_000]


def test_whatever_text_is_said_is_the_answer_but_for_half_a_letter(server: OpenAIServer) -> None:
    server.say = lambda prompt, seed, body: STRANGE[seed - 100]
    found = answers(model_at(server, concurrency=4), asks(len(STRANGE)))
    whole = [text.replace("\ud83d", "?") for text in STRANGE]
    assert [found[ask].text for ask in asks(len(STRANGE))] == whole


@pytest.mark.parametrize(
    "how", [reply(None), reply(""), {"choices": [{"message": {"role": "assistant"}, "finish_reason": "stop"}]}], ids=str
)
def test_no_content_is_an_empty_answer(server: OpenAIServer, how: How) -> None:
    server.misbehave(how)
    assert answers(model_at(server), asks(1)) == {asks(1)[0]: Answer("", "stop")}
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("said", "kept"),
    [("length", "length"), ("content_filter", "content_filter"), ("of its own", "of its own"), (None, "stop")],
)
def test_why_an_answer_ended_is_kept(server: OpenAIServer, said: str | None, kept: str) -> None:
    server.finish_reason = said
    assert [answer.finish_reason for answer in answers(model_at(server), asks(1)).values()] == [kept]


def test_a_prompt_comes_as_it_is(server: OpenAIServer) -> None:
    prompts = [text for text in STRANGE if text.isprintable() or text.isspace()]
    wanted = [Ask(Key("post", str(number), 0), prompt, number) for number, prompt in enumerate(prompts)]
    answers(model_at(server), wanted)
    assert server.prompts == prompts


@pytest.mark.parametrize("concurrency", [1, 3])
def test_embeddings_come_in_order_whatever_the_parts(server: OpenAIServer, concurrency: int) -> None:
    texts = [f"text {number}" for number in range(2 * TEXTS_AT_A_TIME + 1)]
    found = model_at(server, concurrency=concurrency).embed(texts)
    assert found.dtype == np.float32
    assert found.tolist() == [vector(text) for text in texts]
    assert sorted(len(body["input"]) for body in server.asked) == [1, TEXTS_AT_A_TIME, TEXTS_AT_A_TIME]
    assert all(body["model"] == "m" and body["encoding_format"] == "float" for body in server.asked)


UNSOUND: dict[str, tuple[How, str]] = {
    "too few": (embeddings([1.0, 2.0]), "embeddings of shape (1, 2) for 2 texts"),
    "too many": (embeddings([1.0], [2.0], [3.0]), "embeddings of shape (3, 1) for 2 texts"),
    "different widths": (embeddings([1.0, 2.0], [1.0]), "an answer without embeddings"),
    "no width": (embeddings([], []), "embeddings of shape (2, 0) for 2 texts"),
    "words": (embeddings(["x"], ["y"]), "embeddings that are no numbers"),
    "numbers as words": (embeddings(["1"], ["2"]), "embeddings that are no numbers"),
    "too large": (embeddings([1e39], [1.0]), "embeddings that are no numbers"),
    "base64": (embeddings("AACAPw==", "AACAPw=="), "embeddings of shape (2,) for 2 texts"),
    "null": (embeddings(None, None), "embeddings of shape (2,) for 2 texts"),
    "a number": (embeddings(1.0, 2.0), "embeddings of shape (2,) for 2 texts"),
    "no list": ({"object": "list"}, "an answer without embeddings"),
    "a page": ("html", "an answer without embeddings"),
}


@pytest.mark.usefixtures("three_tries")
@pytest.mark.parametrize("kind", UNSOUND)
def test_embeddings_that_are_none_are_asked_for_again_and_then_refused(server: OpenAIServer, kind: str) -> None:
    how, said = UNSOUND[kind]
    server.misbehave(how, path=EMBEDDINGS, times=2)
    assert model_at(server).embed(["a", "b"]).tolist() == [vector("a"), vector("b")]
    server.misbehave(how, path=EMBEDDINGS, times=None)
    with pytest.raises(ServerError) as caught:
        model_at(server).embed(["a", "b"])
    assert str(caught.value) == f"m@{server.url}: does not answer as OpenAI's protocol says ({said}); {AGAIN}"
    assert len(server.asked) == 3 + 3


def test_no_texts_have_no_embeddings(server: OpenAIServer) -> None:
    assert model_at(server).embed([]).shape == (0, 0)
    assert server.asked == []


@pytest.mark.usefixtures("three_tries")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_asked_for_again_and_then_refused(
    server: OpenAIServer, value: float
) -> None:
    server.misbehave(embeddings([1.0, value], [1.0, 2.0]), path=EMBEDDINGS, times=None)
    with pytest.raises(ServerError, match="does not answer as OpenAI's protocol says"):
        model_at(server).embed(["a", "b"])
    assert len(server.asked) == 3


def test_parts_of_embeddings_that_do_not_fit_together_are_refused(server: OpenAIServer) -> None:
    server.misbehave(embeddings([1.0]), path=EMBEDDINGS, skip=1)
    with pytest.raises(ServerError) as caught:
        model_at(server).embed(["a"] * (TEXTS_AT_A_TIME + 1))
    assert str(caught.value) == f"m@{server.url}: gave embeddings of different widths"


def test_ctrl_c_ends_at_once_and_keeps_what_was_answered(server: OpenAIServer, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"question": "A colour?", "answers": ["red", "blue"]}\n')
    server.misbehave("hang", times=None, skip=3)
    # Ctrl-C is ignored where the suite itself runs in the background, so the child listens to it again.
    body = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import slrmerge.__main__"
    options = ["--data", "data.jsonl", "--model", f"post=m@{server.url}", "--samples", "9", "--concurrency", "2"]
    command = [sys.executable, "-c", body, "eval", "open-qa", *options, "--out", "out"]
    root = str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": root}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as child:
        try:
            server.wait_for(5)  # two hang, so three answers have been taken
            child.send_signal(signal.SIGINT)
            _, said = child.communicate(timeout=PATIENCE_S)
        finally:
            child.kill()
    assert child.returncode == 130
    kept = f"3 answers are kept in {tmp_path / 'out'}; the same command goes on from there"
    assert said == f"\nstopped: {kept}\n"
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 3
    assert len(server.asked) == 5


def test_an_unnamed_model_can_be_asked_at_once(server: OpenAIServer) -> None:
    assert answers(unnamed(server.url), asks(1)) == right(asks(1))


def test_what_an_answer_takes_before_it_fails_is_not_counted_as_patience(
    server: OpenAIServer, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "PATIENCE_S", 0.01)
    server.misbehave("hang", times=1)
    assert answers(model_at(server, timeout_s=0.5), asks(1)) == right(asks(1))


@pytest.mark.usefixtures("three_tries")
def test_json_that_is_too_deep_is_no_json(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = Reply(b"[" * 200_000, 200, {"Content-Type": "application/json"})
    monkeypatch.setattr(openai_server, "_damage", lambda fault: deep)
    server.misbehave("malformed", times=None)
    problem, _ = refused(model_at(server), asks(1))
    assert problem.startswith(f"m@{server.url}: {NO_PROTOCOL} (maximum recursion depth exceeded")


@pytest.mark.parametrize("body", [{"detail": "no min_p"}, {"error": "no min_p"}, {"message": "no  min_p"}], ids=str)
def test_the_servers_own_words_are_passed_on(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, body: dict[str, str]
) -> None:
    monkeypatch.setattr(openai_server, "_refusal", lambda status, message: Reply.of(body, status))
    server.misbehave(400, times=None)
    problem, _ = refused(model_at(server), asks(1))
    assert "no min_p" in " ".join(problem.split())


@pytest.mark.parametrize("key", ["sk-secr\u00e9t", "sk-sec\x00ret"])
def test_a_key_that_cannot_be_sent_is_said_and_not_shown(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr("slrmerge.evaluate.server.os.environ", {"OPENAI_API_KEY": key})  # which takes no null byte
    problem, _ = refused(model_at(server), asks(1))
    what = "cannot be sent the key: it has characters that no header has"
    assert problem == f"m@{server.url}: {what}; set OPENAI_API_KEY anew"


def test_a_server_that_is_loading_its_model_is_waited_for(server: OpenAIServer, hurried: None) -> None:
    server.misbehave(503, path=MODELS, times=5, message="Loading model")
    assert unnamed(server.url).asked_of == "m"
