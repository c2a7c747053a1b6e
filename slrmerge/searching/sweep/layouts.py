"""How contexts go through a model: as one trie where its layers only attend, else as rows."""

from collections.abc import Sequence
from typing import Protocol

import torch

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.searching.sweep.contexts import Context
from slrmerge.searching.sweep.loading import Weights
from slrmerge.searching.sweep.model import StagedModel
from slrmerge.searching.sweep.rows import RowLayout
from slrmerge.searching.sweep.trie import pack
from slrmerge.searching.sweep.trie_layout import TrieLayout, why_not_trie


class Layout(Protocol):
    """Contexts laid out for a model. Between layers a state has shape (tokens, width), after the last (contexts, width)."""

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


def lay_out(model: StagedModel, contexts: Sequence[Context], *, chunk_tokens: int) -> Layout:
    """The layout of contexts for a model. At most about `chunk_tokens` tokens go through a layer at a time."""
    if model.why_rows is None:
        return TrieLayout(model, contexts)
    return RowLayout(model, contexts, chunk_tokens=chunk_tokens)


def token_count(model: StagedModel, contexts: Sequence[Context]) -> int:
    """The tokens of a state."""
    if model.why_rows is None:
        return len(pack([context.ids for context in contexts]))
    return sum(len(context.ids) for context in contexts)
