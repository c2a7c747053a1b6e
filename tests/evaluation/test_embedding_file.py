"""Embeddings are computed once for each text and model; files that are cut off or of another model do no harm."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from slrmerge.errors import OutputError, ServerError
from slrmerge.evaluation import embedding_file
from slrmerge.evaluation.embedding_file import KeptEmbeddings
from slrmerge.evaluation.embeddings import LocalEmbeddings
from slrmerge.evaluation.run import evaluate
from tests.evaluation.openai_server import EMBEDDINGS, OpenAIServer, vector
from tests.problems import refused

pytestmark = pytest.mark.usefixtures("sketched")

TEXTS = ["a", "", "größer\n", "a", "\ud83d", "x" * 10_000]


class Counting:
    """An embedder that records what it is asked."""

    def __init__(self, identity: str = "org/m@abc", width: int = 3) -> None:
        self.model_id = self.identity = identity
        self.width = width
        self.asked: list[str] = []
        self.fails_after: int | None = None

    def check(self) -> None:
        pass

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if self.fails_after is not None and len(self.asked) >= self.fails_after:
            raise ServerError
        self.asked += texts
        return expected(texts, self.width)

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        return np.array([len(text) > 100 for text in texts], bool)


def expected(texts: Sequence[str], width: int = 3) -> NDArray[np.float32]:
    return np.array([(vector(ascii(text)) * width)[:width] for text in texts], np.float32)


def test_each_text_is_embedded_once(tmp_path: Path) -> None:
    embedder = Counting()
    kept = KeptEmbeddings(embedder, tmp_path)
    assert kept.embed(TEXTS).tolist() == expected(TEXTS).tolist()
    assert embedder.asked == ["a", "", "größer\n", "\ud83d", "x" * 10_000]
    assert kept.embed(["b", *reversed(TEXTS)]).tolist() == expected(["b", *reversed(TEXTS)]).tolist()
    assert embedder.asked[5:] == ["b"]
    assert kept.truncated(["x" * 10_000, "b"]).tolist() == [True, False]


def test_another_run_computes_nothing_again(tmp_path: Path) -> None:
    KeptEmbeddings(Counting(), tmp_path).embed(TEXTS)
    again = Counting()
    kept = KeptEmbeddings(again, tmp_path)
    assert kept.embed(TEXTS).tolist() == expected(TEXTS).tolist()
    assert kept.truncated(TEXTS).tolist() == [False] * 5 + [True]
    assert again.asked == []
    assert kept.embed([]).shape == (0, 3)


def test_no_texts_have_no_embeddings(tmp_path: Path) -> None:
    kept = KeptEmbeddings(Counting(), tmp_path)
    assert len(kept.embed([])) == len(kept.truncated([])) == 0
    assert list(tmp_path.iterdir()) == []


def test_each_model_has_a_file_of_its_own(tmp_path: Path) -> None:
    one, two = Counting("one"), Counting("two", width=5)
    for _ in range(2):
        for embedder in (one, two):
            assert KeptEmbeddings(embedder, tmp_path).embed(["a"]).shape == (1, embedder.width)
    assert (one.asked, two.asked) == (["a"], ["a"])
    assert len(list(tmp_path.iterdir())) == 2


def test_what_was_embedded_before_an_error_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_file, "TEXTS_AT_ONCE", 2)
    embedder = Counting()
    embedder.fails_after = 4
    texts = list("abcdefg")
    with pytest.raises(ServerError):
        KeptEmbeddings(embedder, tmp_path).embed(texts)
    again = Counting()
    assert KeptEmbeddings(again, tmp_path).embed(texts).tolist() == expected(texts).tolist()
    assert again.asked == list("efg")


@pytest.mark.parametrize("cut", [1, 12, 28, 29, 30, 58])
def test_a_file_that_is_cut_off_keeps_whole_records(tmp_path: Path, cut: int) -> None:
    kept = KeptEmbeddings(Counting(), tmp_path)
    kept.embed(list("abc"))
    size = kept.path.stat().st_size
    os.truncate(kept.path, size - cut)
    again = Counting()
    assert KeptEmbeddings(again, tmp_path).embed(list("abcd")).tolist() == expected(list("abcd")).tolist()
    record = 16 + 1 + 3 * 4
    assert again.asked == list("abcd")[3 - -(-cut // record) :]
    assert kept.path.stat().st_size == size + record


OTHER = b'{"embeddings": "other", "width": 3}\n' + bytes(29)


@pytest.mark.parametrize("content", [b"", b"\n", b"x" * 100, OTHER, b"[]\n"])
def test_a_file_that_begins_otherwise_is_written_anew(tmp_path: Path, content: bytes) -> None:
    kept = KeptEmbeddings(Counting(), tmp_path)
    kept.embed(["a"])
    valid = kept.path.read_bytes()
    kept.path.write_bytes(content)
    again = Counting()
    KeptEmbeddings(again, tmp_path).embed(["a"])
    assert again.asked == ["a"]
    assert kept.path.read_bytes() == valid


def test_another_width_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    kept = KeptEmbeddings(Counting(), tmp_path)
    kept.embed(["a"])
    with refused(OutputError, "embeddings-changed") as caught:
        KeptEmbeddings(Counting(width=4), tmp_path).embed(["b"])
    assert caught.value.problems[0].where == str(kept.path)


def test_a_local_model_is_identified_by_its_files(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    (tmp_path / "modules.json").write_text("[]")
    before = LocalEmbeddings(tmp_path, device="cpu").identity
    assert LocalEmbeddings(tmp_path, device="cpu").identity == before
    (tmp_path / "modules.json").write_text("[ ]")
    assert LocalEmbeddings(tmp_path, device="cpu").identity != before


def test_a_second_report_of_an_evaluation_embeds_nothing_again(server: OpenAIServer, tmp_path: Path) -> None:
    data = tmp_path / "prompts.txt"
    data.write_text("Tell me a joke.\nWrite a poem.\n")
    at = f"m@{server.url}"
    first = evaluate("creative", data, {"post": at}, tmp_path / "eval", samples=3, max_tokens=9, embeddings=at)
    before = [request.path for request in server.requests].count(EMBEDDINGS)
    assert before
    again = evaluate("creative", data, {"post": at}, tmp_path / "eval", samples=3, max_tokens=9, embeddings=at)
    assert [request.path for request in server.requests].count(EMBEDDINGS) == before
    assert repr(again.cells) == repr(first.cells)
    assert {cell.metric for cell in first.cells} >= {"diversity", "vendi", "distinct-1", "distinct-2"}
    assert 1 < first.cell("post", "vendi").mean <= 3
    assert len(list((tmp_path / "eval").glob("embeddings-*.bin"))) == 1
