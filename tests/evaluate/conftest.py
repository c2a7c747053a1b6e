"""A model server for a test, and nothing of the machine's own settings."""

from collections.abc import Iterator

import pytest
import tenacity

from slrmerge.evaluate import failures
from tests.evaluate.openai_server import OpenAIServer


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process and those it starts talk to loopback without a proxy, with no key of anybody's."""
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
    """What fails is asked again at once, and for as long as ever."""
    monkeypatch.setattr(failures, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(failures, "LONGEST_WAIT_S", 0.001)


@pytest.fixture
def three_tries(hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience is over after three tries of each question, however fast the machine."""
    monkeypatch.setattr(failures, "out_of_patience", lambda: tenacity.stop_after_attempt(3))
