"""Settings in the words that a server knows: vLLM's and llama.cpp's, OpenAI's alone, transformers'."""

import json

import pytest

from tests.evaluation.openai_server import OpenAIServer
from tests.evaluation.server_model import PLAIN, SETTINGS, answers, dialects, model_at, refused, requests, right


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
