"""A model run stage by stage: embedding, each layer, head, each with weights that are passed in."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.searching.sweep.embedding_rows import rows_in_use
from slrmerge.searching.sweep.loading import Weights
from slrmerge.searching.sweep.probing import head_goes_by_row, probe
from slrmerge.searching.sweep.slots import Call, LayerAction
from slrmerge.searching.sweep.slotted import SlottedModel
from slrmerge.searching.sweep.stages import require_tensors


class StagedModel(SlottedModel):
    """The language model of a checkpoint, without weights.

    `stages` names the tensors of the checkpoint that each stage uses, `by_row` those of the first and of the last stage
    that have a row for each token. `why_rows` says why contexts are rows and no trie; None for a trie. The constructor
    reads no weights. It raises UnsupportedModelError for a model that cannot be run stage by stage.
    """

    why_rows: str | None = "not tried"

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(checkpoint, dtype=dtype, device=device)
        before, after = probe(self)
        require_tensors(self.tensors.without_tensors(before | after), self.model, self.where)
        self.stages = (self.tensors.of_weights(before), *self.tensors.layers, self.tensors.of_weights(after))
        self.by_row = self._named_by_row(after)
        head = self.by_row[1][0] if self.by_row[1] else None
        self.vocabulary = checkpoint[head].shape[0] if head else int(self.model.config.get_text_config().vocab_size)

    def weights(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights from whole tensors of one stage, by their names in the checkpoint."""
        loaded = self.loader.load(tensors) if tensors else {}
        return loaded | {name: loaded[tied] for name, tied in self.tensors.ties.items() if tied in loaded}

    def row_weights(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights from rows of tensors that have a row for each token."""
        made = {}
        for name, rows in tensors.items():
            placement = self.tensors.placements[name]
            made[placement.target] = rows.to(self.device, self.loader.dtype_of(placement))
        return made | {name: made[tied] for name, tied in self.tensors.ties.items() if tied in made}

    def embedding_weights(
        self, whole: Mapping[str, torch.Tensor], by_row: Mapping[str, torch.Tensor], rows: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """The first stage's weights from whole tensors and from `rows` of others; of the embedding only these rows."""
        made = self.weights(whole)
        if self.embedding in made:  # cannot be loaded by row
            made[self.embedding] = made[self.embedding][list(rows)]
        return made | self.row_weights(by_row)

    def reference_states(
        self, contexts: Sequence[Sequence[int]], stage_weights: Callable[[int], Weights]
    ) -> torch.Tensor:
        """The last layer's states at the end of each context, by the model's own forward: (1, contexts, width).

        One batch for each length, with transformers' own masks and attention. `stage_weights` is called for one stage
        after the other; of the embedding it returns only the rows of the contexts.
        """
        ends: list[torch.Tensor | None] = [None] * len(contexts)
        embedded = rows_in_use(token for ids in contexts for token in ids)

        def running(number: int) -> LayerAction:
            return lambda call: self.run_layer(number, stage_weights(number + 1), call)

        latest = self.model.config._attn_implementation
        self.use_own_attention()
        for numbers in by_length(contexts):
            ids = torch.tensor([contexts[number] for number in numbers], device=self.device)
            outputs: list[torch.Tensor] = []

            def keep(call: Call, outputs: list[torch.Tensor] = outputs) -> Any:
                output = running(len(self.layers) - 1)(call)
                outputs.append(self.forms[-1].states(output))
                return output

            actions = [*(running(number) for number in range(len(self.layers) - 1)), keep]
            self.forward(stage_weights(0), ids, actions, embedded=embedded)
            for row, number in enumerate(numbers):
                ends[number] = outputs[0][row, -1]
        self.use_attention(latest)
        return torch.stack([end for end in ends if end is not None])[None]

    def _named_by_row(self, after: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The tensors of the first and of the last stage of which some rows can be loaded."""

        def plain(weights: Sequence[str | None]) -> tuple[str, ...]:
            names = []
            for weight in weights:
                wanted = self.tensors.ties.get(weight, weight) if weight else None
                names += [
                    name for name, made in self.tensors.outer.items()
                    if made == (wanted,) and not self.tensors.placements[name].is_converted
                ]  # fmt: skip
            return tuple(names)

        embedding, head = plain([self.embedding]), plain(self.head)
        is_whole = len(head) == len(self.head) and set(self.head) <= after
        return embedding, head if is_whole and head_goes_by_row(self) else ()


def by_length(contexts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers of contexts, grouped by their length."""
    groups: dict[int, list[int]] = defaultdict(list)
    for number, ids in enumerate(contexts):
        groups[len(ids)].append(number)
    return list(groups.values())
