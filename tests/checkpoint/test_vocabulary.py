"""Tokenizers are scanned for their tokens without being parsed."""

import json
import tracemalloc
from typing import Any

import pytest

from slrmerge.checkpoint.vocabulary import scan_tokens

WORDS = ["a", 'qu"ote', "back\\slash", "é", "Ġ", "\n", '"vocab": {', "}", "]", "123", '","x":9', "🙂", ""]


def numbered(words: list[str], first: int = 0) -> dict[str, Any]:
    return {"version": "1.0", "model": {"type": "BPE", "vocab": {word: k for k, word in enumerate(words, first)}}}


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("kind", ["numbered", "listed", "added"])
def test_tokens_are_the_same_however_the_file_is_written(kind: str, indent: int | None, ascii_only: bool) -> None:
    contents = {
        "numbered": numbered(WORDS),
        "listed": {"model": {"vocab": [[word, -1.5e-3 * k] for k, word in enumerate(WORDS)], "unk_id": 0}},
        "added": {"added_tokens": [{"id": k, "content": word, "special": True} for k, word in enumerate(WORDS)]},
    }
    found = scan_tokens(json.dumps(contents[kind], indent=indent, ensure_ascii=ascii_only).encode())
    assert found == scan_tokens(json.dumps(numbered(WORDS)).encode())
    assert (len(found), len(set(found))) == (len(WORDS), len(WORDS))


def test_added_tokens_take_the_place_of_others_and_gaps_are_no_tokens() -> None:
    added = {"added_tokens": [{"id": 1, "content": "new"}, {"id": 5, "content": "far"}]}
    found = scan_tokens(json.dumps(added | numbered(["a", "b", "c"])).encode())
    plain = scan_tokens(json.dumps(numbered(["a", "new", "c"])).encode())
    assert list(found[:3]) == list(plain)
    assert list(found[3:5]) == [0, 0]
    assert len(found) == 6


@pytest.mark.parametrize(
    "data", [b"", b"{}", b'{"model": {"vocab": {"a', b'{"vocab": 3}', b'{"added_tokens": [[[', b"\xff"]
)
def test_what_is_no_tokenizer_has_no_tokens(data: bytes) -> None:
    assert not scan_tokens(data)


def test_an_id_that_no_tokenizer_has_takes_no_memory() -> None:
    assert not scan_tokens(b'{"vocab": {"a": 999999999}, "added_tokens": [{"id": 99999999999999, "content": "b"}]}')


def test_a_scan_takes_less_memory_than_the_file_has_bytes() -> None:
    data = json.dumps(numbered([f"token number {k}" for k in range(100_000)])).encode()
    tracemalloc.start()
    scan_tokens(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(data)
