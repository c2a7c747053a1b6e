"""Failures that may pass are retried, for a time; others end the run."""

import pytest

from slrmerge.evaluation import server as server_module
from slrmerge.evaluation.models import SampleRequest, ServerAddress
from slrmerge.evaluation.samples import Answer
from slrmerge.evaluation.server import MAX_RETRIES, ServerModel
from tests.checkpoint.hub.transport import Answer as Reply
from tests.evaluation import openai_server
from tests.evaluation.helpers import Kept
from tests.evaluation.openai_server import PATIENCE_S, How, OpenAIServer, reply
from tests.evaluation.server_model import PLAIN, SETTINGS, answers, model_at, refused, requests, right
from tests.merging.faults import Recorder


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
