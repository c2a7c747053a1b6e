"""Questions to a model server, and its answers."""

import threading
from typing import Any

import pytest

from slrmerge.evaluation.models import SampleRequest
from slrmerge.evaluation.samples import Answer, SampleKey
from tests.evaluation.openai_server import PATIENCE_S, How, OpenAIServer, reply
from tests.evaluation.server_model import answers, model_at, requests, right


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
