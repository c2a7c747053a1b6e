"""Contexts as rows: those of one length in a batch, without padding, each layer called as the model calls it.

Serves every layer that transformers runs: recurrences, convolutions, attention of any kind.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from slrmerge.searching.sweep.embedding_rows import rows_in_use
from slrmerge.searching.sweep.loading import Weights
from slrmerge.searching.sweep.model import StagedModel, by_length
from slrmerge.searching.sweep.slots import Call, same
from slrmerge.searching.sweep.trie import Context


class _Batch(NamedTuple):
    """Contexts of one length: their numbers, their ids, shape (rows, length), and their place among all tokens."""

    contexts: list[int]
    ids: torch.Tensor
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.ids.numel()


class RowLayout:
    """A model's rows. At most about `chunk_tokens` tokens go through a layer at a time."""

    def __init__(self, model: StagedModel, contexts: Sequence[Context], *, chunk_tokens: int) -> None:
        self._model = model
        ids = [context.ids for context in contexts]
        self._batches: list[_Batch] = []
        start = 0
        for numbers in by_length(ids):
            self._batches.append(_Batch(numbers, torch.tensor([ids[n] for n in numbers], device=model.device), start))
            start = self._batches[-1].stop
        self.tokens = start
        self.token_ids = [token for batch in self._batches for token in batch.ids.flatten().tolist()]
        order = [number for batch in self._batches for number in batch.contexts]
        self._order = torch.tensor(order, device=model.device).argsort()
        most = max(1, chunk_tokens // self.tokens)
        self._sizes = [1 << power for power in reversed(range(most.bit_length()))]  # states in a call
        self._calls: dict[int, dict[tuple[int, int], Sequence[Call]]] = {}

    def embed(self, variant: int, weights: Weights) -> torch.Tensor:
        """Also records how each layer is called, once for each number of states in a call."""
        embedded = rows_in_use(self.token_ids)
        calls: dict[tuple[int, int], Sequence[Call]] = {}
        first: list[torch.Tensor] = []
        for number, batch in enumerate(self._batches):
            for size in self._sizes:
                recorded = self._model.record(weights, batch.ids.repeat(size, 1), embedded=embedded)
                calls[number, size] = [self._without_states(call) for call in recorded]
            first.append(recorded[0].hidden.flatten(0, 1))  # of the last size, 1
        known = next((each for each in self._calls.values() if same(each, calls)), calls)
        self._calls[variant] = known
        return torch.cat(first)

    def run_layer(self, number: int, weights: Weights, states: torch.Tensor, variant: int) -> torch.Tensor:
        calls, is_last = self._calls[variant], number == len(self._model.layers) - 1
        made: list[torch.Tensor] = []
        first = 0
        while first < len(states):
            size = next(size for size in self._sizes if size <= len(states) - first)
            parts = []
            for place, batch in enumerate(self._batches):
                rows, length = batch.ids.shape
                # (size, rows * length, width) -> (size * rows, length, width)
                hidden = (
                    states[first : first + size, batch.start : batch.stop].reshape(size * rows, length, -1).contiguous()
                )
                output = self._model.call_layer(number, weights, calls[place, size][number].with_hidden(hidden))
                # -> (size, rows or rows * length, width)
                parts.append((output[:, -1] if is_last else output).reshape(size, -1, output.shape[-1]))
            made.append(torch.cat(parts, dim=1))
            first += size
        output = torch.cat(made)
        return output[:, self._order] if is_last else output

    def _without_states(self, call: Call) -> Call:
        return call.with_hidden(torch.empty(0, device=self._model.device))
