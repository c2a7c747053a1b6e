"""How contexts go through a model: as one trie where its layers only attend, else as rows."""

from collections.abc import Sequence
from time import perf_counter
from typing import Protocol

import torch

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.searching.sweep.embedding_rows import rows_in_use
from slrmerge.searching.sweep.loading import Weights
from slrmerge.searching.sweep.model import StagedModel
from slrmerge.searching.sweep.rows import RowLayout
from slrmerge.searching.sweep.trie import Context, pack
from slrmerge.searching.sweep.trie_layout import TrieLayout, why_not_trie

CHUNK_TOKENS, CHUNK_NUMBERS = 2048, 1 << 22
"""Tokens that go through a layer at a time, or numbers where that is more tokens: enough for the matrix products."""


class Layout(Protocol):
    """Contexts laid out for a model.

    Between layers a state has shape (tokens, width), after the last (contexts, width).
    """

    @property
    def tokens(self) -> int:
        """The tokens of a state."""
        ...

    @property
    def token_ids(self) -> Sequence[int]:
        """The ids of all tokens."""
        ...

    def embed(self, variant: int, weights: Weights) -> torch.Tensor:
        """The first layer's input by a variant of the first stage's weights, shape (tokens, width).

        Of the embedding, `weights` has only the `rows_in_use` of the token ids.
        """
        ...

    def run_layer(self, number: int, weights: Weights, states: torch.Tensor, variant: int) -> torch.Tensor:
        """A layer's output for states that began with one variant: (states, tokens, width) in the same shape.

        Of the last layer, (states, contexts, width).
        """
        ...


def staged_model(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> StagedModel:
    """The model of a checkpoint, without weights, and how contexts go through it.

    Raises UnsupportedModelError for a model that cannot be run stage by stage.
    """
    model = StagedModel(checkpoint, dtype=dtype, device=device)
    model.why_rows = why_not_trie(model)
    return model


def chunk_size(width: int) -> int:
    """The tokens of a model of this width that go through a layer at a time."""
    return max(CHUNK_TOKENS, CHUNK_NUMBERS // width)


def lay_out(model: StagedModel, contexts: Sequence[Context], *, chunk_tokens: int) -> Layout:
    """The layout of contexts for a model. At most about `chunk_tokens` tokens go through a layer at a time."""
    model.use_own_attention()
    if model.why_rows is None:
        return TrieLayout(model, contexts)
    return RowLayout(model, contexts, chunk_tokens=chunk_tokens)


def token_count(model: StagedModel, contexts: Sequence[Context]) -> int:
    """The tokens of a state."""
    if model.why_rows is None:
        return len(pack([context.ids for context in contexts]))
    return sum(len(context.ids) for context in contexts)


def measured_state_s(model: StagedModel, contexts: Sequence[Context], *, layer: int) -> float:
    """Seconds that a layer takes for one state in a full chunk, with random weights: the best of two."""
    layout = lay_out(model, contexts, chunk_tokens=chunk_size(model.width))
    count = len(rows_in_use(layout.token_ids))
    rows = {name: fake.expand(count, *fake.shape[1:]) for name, fake in model.embedding_fakes.items()}
    states = layout.embed(0, rows).expand(max(1, chunk_size(model.width) // layout.tokens), -1, -1).contiguous()
    weights = {name: weight.contiguous() for name, weight in model.fake_layer(layer, seed=0).items()}
    times = []
    for _ in range(2):
        start = perf_counter()
        layout.run_layer(layer, weights, states, 0)[0, 0, 0].item()  # waits until the device has computed it
        times.append(perf_counter() - start)
    return min(times) / len(states)
