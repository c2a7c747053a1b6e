"""A model server for a test, independent of this machine's settings, and an evaluation by it."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.evaluation.openai_server import OpenAIServer
from tests.evaluation.work import QUESTIONS, Work


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process and its children connect to loopback without a proxy and without an API key."""
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.fixture
def server(alone: None) -> Iterator[OpenAIServer]:
    """A server with the one model `m`."""
    with OpenAIServer("m") as made:
        yield made


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client pauses for a millisecond between retries, as many as ever."""
    for name in ("INITIAL_RETRY_DELAY", "MAX_RETRY_DELAY"):
        monkeypatch.setattr(openai._base_client, name, 0.001)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of the client between retries, in seconds; they are recorded, not made."""
    made: list[float] = []

    async def sleep(seconds: float) -> None:
        made.append(seconds)

    monkeypatch.setattr("anyio.sleep", sleep)
    return made


@pytest.fixture
def drawn() -> None:
    """Draws real charts."""


@pytest.fixture
def work(server: OpenAIServer, tmp_path: Path, request: pytest.FixtureRequest) -> Work:
    if "drawn" not in request.fixturenames:
        request.getfixturevalue("sketched")
    data = tmp_path / "questions.json"
    data.write_text(json.dumps(QUESTIONS))
    return Work(server, data, tmp_path / "out")
