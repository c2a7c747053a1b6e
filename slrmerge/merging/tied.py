"""Whether a head that a config ties to its embedding is that embedding, which no header reveals."""

from collections.abc import Iterable

from slrmerge.checkpoint.base import differing_chunks
from slrmerge.checkpoint.pair import ModelPair, PairReader
from slrmerge.checkpoint.side_files import CONFIG_NAME
from slrmerge.errors import CheckpointError, Problem


def require_tied(pair: ModelPair, readers: PairReader, touched: Iterable[str]) -> None:
    """Raise CheckpointError where a tied embedding and head are `touched`, differ, and are two on the other side.

    Some loaders replace such a head by the embedding, and others run it.
    """
    tied = pair.correspondence.stored_ties
    if tied is None or {*tied}.isdisjoint(touched) or not {*tied}.isdisjoint(pair.posttrained.computed):
        return
    token, head = tied
    post = pair.posttrained
    reader = readers.posttrained
    if post[token][:2] == post[head][:2] and not any(differing_chunks(reader, token, reader, head)):
        return
    what = f"ties {head} to {token}, and the two have different values: loaders disagree on which is the head"
    remedy = f"set tie_word_embeddings: false if {head} is the head, or remove it from the weights"
    raise CheckpointError(Problem("tied-but-different", f"{post}/{CONFIG_NAME}", what, remedy))
