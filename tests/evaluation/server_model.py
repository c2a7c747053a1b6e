"""Questions to a model on a server, and what is expected of it."""

from collections.abc import Sequence

import pytest

from slrmerge.errors import Problem, ServerError
from slrmerge.evaluation.models import SampleRequest, ServerAddress
from slrmerge.evaluation.samples import Answer, SampleKey, Settings
from slrmerge.evaluation.server import MAX_RETRIES, ServerModel
from tests.evaluation.helpers import Kept
from tests.evaluation.openai_server import PATIENCE_S, OpenAIServer

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


def unnamed(url: str) -> ServerModel:
    return ServerModel(ServerAddress(None, url), concurrency=1, timeout_s=PATIENCE_S)


def dialects(server: OpenAIServer) -> list[str]:
    return ["transformers" if "generation_config" in body else "vllm" for body in server.asked]
