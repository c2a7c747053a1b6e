"""Whether a head that a config ties to its embedding is that embedding, which no header reveals."""

from collections.abc import Iterable, Iterator

from slrmerge.checkpoint.base import TensorReader
from slrmerge.checkpoint.pair import ModelPair, PairReader
from slrmerge.checkpoint.side_files import CONFIG_NAME
from slrmerge.errors import CheckpointError, Problem
from slrmerge.io.pieces import CHUNK_BYTES


def require_tied(pair: ModelPair, readers: PairReader, touched: Iterable[str]) -> None:
    """Raise CheckpointError where a tied embedding and head are `touched`, differ, and are two on the other side.

    Some loaders replace such a head by the embedding, and others run it.
    """
    tied = pair.correspondence.stored_ties
    if tied is None or {*tied}.isdisjoint(touched) or not {*tied}.isdisjoint(pair.posttrained.computed):
        return
    token, head = tied
    post = pair.posttrained
    if post[token][:2] == post[head][:2] and all(
        one == other for one, other in zip(*(_bytes_of(readers.posttrained, name) for name in tied), strict=True)
    ):
        return
    what = f"ties {head} to {token}, and the two have different values: loaders disagree on which is the head"
    remedy = f"set tie_word_embeddings: false if {head} is the head, or remove it from the weights"
    raise CheckpointError(Problem("tied-but-different", f"{post}/{CONFIG_NAME}", what, remedy))


def _bytes_of(reader: TensorReader, name: str) -> Iterator[bytes]:
    """The bytes of a tensor, a chunk at a time."""
    nbytes = reader.checkpoint[name].nbytes
    stream = reader.stream(name, 0, nbytes)
    for done in range(0, nbytes, CHUNK_BYTES):
        chunk = bytearray(min(CHUNK_BYTES, nbytes - done))
        stream.readinto(memoryview(chunk))
        yield bytes(chunk)
