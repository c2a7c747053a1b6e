"""Whether the embedding has a row for every token that the tokenizer gives, and rows of the same tokens meet."""

from collections.abc import Iterable, Iterator
from contextlib import suppress

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.files import SourceFile, unreadable
from slrmerge.checkpoint.pair import ModelPair, Side
from slrmerge.checkpoint.vocabulary import MAX_TOKENIZER_BYTES, TOKENIZER_NAME, scan_tokens
from slrmerge.errors import CheckpointError
from slrmerge.io.files import read_file
from slrmerge.io.strict_json import InvalidJsonError, parse_json
from slrmerge.merging.plan.model import PlannedTensor

_FILES = ("tokenizer.json", "added_tokens.json", "vocab.json")


def tokenizer_notes(side: Side, pair: ModelPair, tensors: Iterable[PlannedTensor]) -> Iterator[str]:
    """Warnings where the tokenizer of `side` does not fit the output, or rows of other tokens are mixed.

    A tokenizer on the Hub is downloaded only where the recipe asks for the pre-trained side's.
    """
    tensors = list(tensors)
    yield from _row_notes(side, pair, tensors)
    yield from _token_notes(side, pair, tensors)


def _token_notes(side: Side, pair: ModelPair, tensors: Iterable[PlannedTensor]) -> Iterator[str]:
    """A warning where rows come from the other side than the tokenizer, and mean other tokens there."""
    mixed = [
        tensor.name
        for tensor in tensors
        if (tensor.pretrained if side == "posttrained" else tensor.posttrained) is not None
        and tensor.rows is None
        and pair.correspondence.is_vocabulary(tensor.name)
    ]
    files = [checkpoint.side_files.get(TOKENIZER_NAME) for _, checkpoint in pair.items()]
    if not mixed or not all(
        file and not file.download_bytes and file.file_bytes <= MAX_TOKENIZER_BYTES for file in files
    ):
        return
    with suppress(CheckpointError):  # a tokenizer that cannot be read says nothing
        if (token := pair.vocabulary.difference) is not None:
            own = "pre-trained" if side == "pretrained" else "post-trained"
            yield (
                f"the two tokenizers differ: id {token} is another token on either side, "
                f"but not all rows are those of the {own} side, whose tokenizer the output has: {', '.join(mixed)}"
            )


def _row_notes(side: Side, pair: ModelPair, tensors: Iterable[PlannedTensor]) -> Iterator[str]:
    """A warning where the tokenizer of `side` has ids past the last row of an embedding of the output."""
    tokens = pair.correspondence.embeddings.tokens
    rows = {tensor.name: tensor.info.shape[0] for tensor in tensors if tensor.name in tokens}
    if not rows:
        return
    name, count = max(rows.items(), key=lambda item: item[1])
    highest = highest_token_id(pair[side], download=side == "pretrained")
    if highest is not None and highest >= count:
        own = "pre-trained" if side == "pretrained" else "post-trained"
        yield (
            f"the {own} side's tokenizer does not fit: it has tokens up to {highest}, {name} has {count} rows "
            f"(0–{count - 1}); the model fails at the tokens past them: use the other side's tokenizer"
        )


def highest_token_id(checkpoint: Checkpoint, *, download: bool = False) -> int | None:
    """The highest id of any token in a checkpoint's tokenizer files; None where they are not here or not JSON.

    Raises CheckpointError where a file cannot be read, and HubError.
    """
    files = {name: checkpoint.side_files[name] for name in _FILES if name in checkpoint.side_files}
    readable = {name: file for name, file in files.items() if download or not file.download_bytes}
    return max((token for name, file in readable.items() for token in _ids(name, file)), default=None)


def _ids(name: str, file: SourceFile) -> Iterator[int]:
    if file.file_bytes > MAX_TOKENIZER_BYTES:
        return
    path = file.fetch()
    try:
        data = read_file(path, MAX_TOKENIZER_BYTES)
        if name == TOKENIZER_NAME:
            yield from [len(tokens) - 1] if (tokens := scan_tokens(data)) else []
            return
        content = parse_json(data)
    except OSError as error:
        raise unreadable(path, error) from error
    except InvalidJsonError:
        return
    if isinstance(content, dict):
        yield from (each for each in content.values() if type(each) is int)
