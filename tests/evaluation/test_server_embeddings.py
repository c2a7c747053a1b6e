"""Embeddings from a server."""

import numpy as np
import pytest

from slrmerge.errors import ServerError
from slrmerge.evaluation.server import EMBEDDINGS_PER_REQUEST
from tests import problems
from tests.evaluation.openai_server import EMBEDDINGS, How, OpenAIServer, embeddings, vector
from tests.evaluation.server_model import model_at


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
