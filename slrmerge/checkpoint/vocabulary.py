"""Which rows of two vocabularies of different size have the same meaning.

A tokenizer.json is scanned, not parsed: as Python objects it would take up to twenty times its size.
"""

import json
import re
from array import array
from typing import Any, NamedTuple

import xxhash

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.files import unreadable
from slrmerge.errors import CheckpointError, Problem
from slrmerge.io.files import read_file

TOKENIZER_NAME = "tokenizer.json"
MAX_TOKENIZER_BYTES = 100_000_000
"""The largest tokenizer.json that is read; Gemma 3's has 33 MB."""

_MAX_TOKENS = 5_000_000
"""Ids past this are those of no tokenizer, and are ignored."""

_MAX_ADDED_BYTES = 10_000_000

_STRING = rb'"(?:[^"\\]|\\.)*"'
_BEGIN = re.compile(rb'"vocab"\s*:\s*([\[{])')
_NUMBERED = re.compile(rb"[\s,]*(%b)\s*:\s*(\d{1,9})" % _STRING)
_LISTED = re.compile(rb"[\s,]*\[\s*(%b)\s*,[^\],\"]*\]" % _STRING)
_ADDED = re.compile(rb'"added_tokens"\s*:\s*(?=\[)')


class SharedVocabulary(NamedTuple):
    """The first ids that both tokenizers have; None where a side has no tokenizer.json that lists its tokens.

    `difference` is the first id that means another token on either side.
    """

    tokens: int | None
    difference: int | None


def compare_vocabularies(pretrained: Checkpoint, posttrained: Checkpoint) -> SharedVocabulary:
    """Compare two tokenizers, id by id. Raises CheckpointError for one that cannot be read, and HubError."""
    pre, post = _tokens_of(pretrained), _tokens_of(posttrained)
    if not pre or not post:
        return SharedVocabulary(None, None)
    shared = min(len(pre), len(post))
    difference = next((number for number in range(shared) if pre[number] != post[number]), None)
    return SharedVocabulary(shared, difference)


def _tokens_of(checkpoint: Checkpoint) -> "array[int]":
    source = checkpoint.side_files.get(TOKENIZER_NAME)
    if source is None:
        return array("Q")
    path = source.fetch()
    try:
        data = read_file(path, MAX_TOKENIZER_BYTES)
    except OSError as error:
        raise unreadable(path, error) from error
    if not data.lstrip().startswith(b"{"):
        raise CheckpointError(Problem("invalid-json", str(path), "invalid JSON", "download it again"))
    return scan_tokens(data)


def scan_tokens(data: bytes) -> "array[int]":
    """A digest of each token in a tokenizer.json, by its id; 0 for an id without a token."""
    digests = array("Q")

    def put(number: int, token: bytes) -> None:
        if number < _MAX_TOKENS:
            if number >= len(digests):
                digests.frombytes(bytes(8 * (number + 1 - len(digests))))
            digests[number] = xxhash.xxh3_64_intdigest(token) | 1

    begin = _BEGIN.search(data)
    if begin:
        is_numbered = begin[1] == b"{"
        scanner = (_NUMBERED if is_numbered else _LISTED).scanner(data, begin.end())  # type: ignore[attr-defined]
        for place, found in enumerate(iter(scanner.match, None)):
            put(int(found[2]) if is_numbered else place, _plain(found[1]))
    for entry in _added(data):
        if isinstance(entry, dict) and type(entry.get("id")) is int and entry["id"] >= 0:
            put(entry["id"], str(entry.get("content")).encode("utf-8", "surrogatepass"))
    return digests


def _plain(string: bytes) -> bytes:
    """A JSON string without its quotes and escapes."""
    if b"\\" not in string:
        return string[1:-1]
    try:
        return str(json.loads(string)).encode("utf-8", "surrogatepass")
    except ValueError:
        return string


def _added(data: bytes) -> list[Any]:
    """The tokens that were added to the vocabulary, such as the special ones; none where they are not JSON."""
    begin = _ADDED.search(data)
    if begin is None:
        return []
    try:
        text = data[begin.end() : begin.end() + _MAX_ADDED_BYTES].decode("utf-8", "ignore")
        found, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []
