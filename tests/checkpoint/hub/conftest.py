"""A Hub for a test, this process's client pointed at it, and a pair of models on it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from huggingface_hub import close_session, constants, file_download
from huggingface_hub.utils import _http

from slrmerge.checkpoint.hub import errors
from tests.checkpoint.hub.server import HubServer, use
from tests.checkpoints import Tensor, llama_tensors, write_checkpoint
from tests.conftest import Pair
from tests.merging.faults import snapshot

BASE, CHAT = "org/base", "org/chat"
CARD = "---\nlicense: mit\n---\nA model."


@dataclass(frozen=True)
class HubPair(Pair):
    """A pair of models, in folders below `folder` and on the hub, `pre` as one file and `post` as two."""

    sides: ClassVar = {"pretrained": BASE, "posttrained": CHAT}

    hub: HubServer

    def mixed(self, *layers: int) -> dict[str, Tensor]:
        """The tensors of the post-trained model, some layers restored."""
        restored = tuple(f"model.layers.{layer}." for layer in layers)
        return {name: (self.pre if name.startswith(restored) else self.post)[name] for name in self.post}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the client upload without Xet: it passes a file to httpx2 in a way that is deprecated there."""
    for item in items:
        if "hub" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub; retries, ours and the client's, are as many as ever, but do not wait."""
    monkeypatch.setattr(errors, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(errors, "LONGEST_WAIT_S", 0.001)
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    with HubServer() as server:
        use(monkeypatch, server, tmp_path / "cache")
        yield server
        close_session()


@pytest.fixture
def pair(hub: HubServer, tmp_path: Path) -> HubPair:
    pre, post = _weights("pre"), _weights("post")
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "post", post, shards=2, side_files={"tokenizer.json": "{}", "README.md": CARD})
    for repository, side in ((BASE, "pre"), (CHAT, "post")):
        hub.commit(repository, snapshot(tmp_path / side))
    return HubPair(tmp_path, pre, post, hub)


@cache
def _weights(seed: str) -> dict[str, Tensor]:
    """Large enough for their headers to be little beside them."""
    return llama_tensors(seed, hidden=64, vocabulary=256)
