"""Which rows of two vocabularies of different size have the same meaning."""

from typing import Any, NamedTuple

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.files import unreadable
from slrmerge.errors import CheckpointError, Problem
from slrmerge.io.files import read_file
from slrmerge.io.strict_json import InvalidJsonError, parse_json

TOKENIZER_NAME = "tokenizer.json"
MAX_TOKENIZER_BYTES = 100_000_000
"""The largest tokenizer.json that is read; Gemma 3's has 33 MB."""


class SharedVocabulary(NamedTuple):
    """The first ids that both tokenizers have; None where a side has no tokenizer.json that lists its tokens.

    `difference` is the first id that means another token on either side.
    """

    tokens: int | None
    difference: int | None


def compare_vocabularies(pretrained: Checkpoint, posttrained: Checkpoint) -> SharedVocabulary:
    """Compare two tokenizers, id by id. Raises CheckpointError for one that cannot be read, and HubError."""
    pre, post = _tokens(pretrained), _tokens(posttrained)
    if not pre or not post:
        return SharedVocabulary(None, None)
    shared = min(max(pre), max(post)) + 1
    difference = next((number for number in range(shared) if pre.get(number) != post.get(number)), None)
    return SharedVocabulary(shared, difference)


def _tokens(checkpoint: Checkpoint) -> dict[int, str]:
    """The tokens of tokenizer.json by id; none where there is no such file."""
    source = checkpoint.side_files.get(TOKENIZER_NAME)
    if source is None:
        return {}
    path = source.fetch()
    try:
        content: Any = parse_json(read_file(path, MAX_TOKENIZER_BYTES), allow_nan=True)
    except OSError as error:
        raise unreadable(path, error) from error
    except InvalidJsonError as error:
        raise CheckpointError(
            Problem("invalid-json", str(path), f"invalid JSON ({error})", "download it again")
        ) from None
    model = content.get("model") if isinstance(content, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    found: dict[int, str] = {}
    if isinstance(vocabulary, dict):
        found = {number: token for token, number in vocabulary.items() if type(number) is int}
    elif isinstance(vocabulary, list):
        found = {number: str(entry[0]) for number, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    added = content.get("added_tokens") if isinstance(content, dict) else None
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and type(entry.get("id")) is int:
            found[entry["id"]] = str(entry.get("content"))
    return found
