"""Which model a server has, and the key that it wants."""

import pytest

from slrmerge.errors import OptionError, ServerError
from slrmerge.evaluation.models import ServerAddress
from slrmerge.evaluation.server import ServerModel
from tests import problems
from tests.evaluation.openai_server import CHAT, MODELS, PATIENCE_S, How, OpenAIServer, free_port
from tests.evaluation.server_model import answers, model_at, requests, right, unnamed


def test_where_no_model_is_named_the_only_one_is_asked(server: OpenAIServer) -> None:
    model = ServerModel(ServerAddress(None, server.url), concurrency=1, timeout_s=PATIENCE_S)
    assert model.model_id == "m"
    answers(model, requests(2))
    assert [body["model"] for body in server.asked] == ["m", "m"]
    assert [request.path for request in server.requests] == [MODELS, CHAT, CHAT]  # asked for its models once


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


def test_an_unnamed_model_can_be_asked_at_once(server: OpenAIServer) -> None:
    assert answers(unnamed(server.url), requests(1)) == right(requests(1))


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
