"""Contexts as a trie: a common beginning goes through the layers once. For layers that mix tokens by attention only."""

from collections.abc import Sequence
from typing import Any

import torch

from slrmerge.errors import UnsupportedModelError, first_line
from slrmerge.searching.sweep.attention import (
    ATTENTION_NAME,
    AttentionPattern,
    CapturedKeyValues,
    KeyValueCapture,
    LeafAttention,
    QueryRun,
    TokenwiseAttention,
    TrieAttention,
    trie_attention,
)
from slrmerge.searching.sweep.embedding_rows import rows_in_use
from slrmerge.searching.sweep.fakes import kind_of
from slrmerge.searching.sweep.loading import Weights
from slrmerge.searching.sweep.model import StagedModel
from slrmerge.searching.sweep.probing import FAILURES
from slrmerge.searching.sweep.slots import Call, same
from slrmerge.searching.sweep.trie import Context, pack

_DEPTHS = (0, 1, 2, 2, 3)
"""Positions of a small trie, by which a model's use of positions is compared with a plain prompt's."""


class TrieLayout:
    """A model's trie of contexts."""

    def __init__(self, model: StagedModel, contexts: Sequence[Context]) -> None:
        self._model = model
        self.trie = pack([context.ids for context in contexts])
        depths = torch.tensor([self.trie.depths], device=model.device)
        self._leaves = torch.tensor(self.trie.leaves, device=model.device)
        leaf_runs = [QueryRun((leaf,), path) for leaf, path in enumerate(self.trie.paths_to(self.trie.leaves))]
        self.masks = layer_masks(model, self.trie.max_length)
        use_trie_attention(model)
        self._token_calls = model.record({}, torch.zeros_like(depths), embedded=[0], positions=depths)
        leaf_depths = depths[:, self._leaves]
        self._leaf_calls = model.record({}, torch.zeros_like(leaf_depths), embedded=[0], positions=leaf_depths)
        self._token_pattern = AttentionPattern.of((QueryRun(*each) for each in self.trie.segments), model.device)
        self._leaf_pattern = AttentionPattern.of(leaf_runs, model.device)

    @property
    def tokens(self) -> int:
        return len(self.trie)

    @property
    def token_ids(self) -> Sequence[int]:
        return self.trie.ids

    def embed(self, variant: int, weights: Weights) -> torch.Tensor:
        del variant  # layers are called in the same way for all
        ids = torch.tensor([self.trie.ids], device=self._model.device)
        positions = torch.tensor([self.trie.depths], device=self._model.device)
        embedded = rows_in_use(self.trie.ids)
        return self._model.record(weights, ids, embedded=embedded, positions=positions)[0].hidden[0]

    def run_layer(self, number: int, weights: Weights, states: torch.Tensor, variant: int) -> torch.Tensor:
        """The last layer needs the keys and values of all tokens, but everything else only for the leaves."""
        del variant
        mask = self.masks[number]
        if number < len(self._model.layers) - 1:
            attention = TrieAttention(self._token_pattern, mask)
            call = self._token_calls[number].with_hidden(states)
        else:
            key, value = self._capture_keys_values(number, weights, self._token_calls[number].with_hidden(states))
            attention = LeafAttention(self._leaf_pattern, mask, key=key, value=value)
            call = self._leaf_calls[number].with_hidden(states[:, self._leaves])
        return self._model.call_layer(number, weights, call.with_keywords(trie=attention))

    def _capture_keys_values(self, number: int, weights: Weights, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and the values of a layer for all tokens, shape (states, groups, tokens, width) each."""
        try:
            self._model.call_layer(number, weights, call.with_keywords(trie=KeyValueCapture()))
        except CapturedKeyValues as captured:
            return captured.key, captured.value
        raise AssertionError("a layer that calls attention once, as `why_not_trie` found")


def why_not_trie(model: StagedModel) -> str | None:
    """Why a model's contexts cannot be packed as a trie; None where they can. Uses made-up weights only."""
    if "position_ids" not in model.accepted:
        return "its forward takes no positions"
    depths = torch.tensor([_DEPTHS], device=model.device)
    length = max(_DEPTHS) + 1
    try:
        layer_masks(model, length)
        use_trie_attention(model)
        in_trie = model.record({}, torch.zeros_like(depths), embedded=[0], positions=depths)
        plain = model.record({}, torch.zeros_like(depths[:, :length]), embedded=[0])
        other_rows = {name: torch.ones_like(rows) for name, rows in model.embedding_fakes.items()}
        elsewhere = model.record(other_rows, torch.zeros_like(depths), embedded=[0], positions=depths)
        if not same(_gathered(plain[0].hidden), in_trie[0].hidden):
            return "its embedding does not follow the positions"
        for call, plain_call, other in zip(in_trie, plain, elsewhere, strict=True):
            if call.others[0]:
                return "its layers are called by position"
            if not same(_known(call).others, _known(plain_call).map_tensors(_gathered).others):
                return "its layers are called with more than positions"
            if not same(_known(call).others, _known(other).others):
                return "its layers are called with more of the embedding than the states"
        kinds = {kind_of(layer): number for number, layer in enumerate(model.layers)}
        with model.eager_experts():
            reasons = (_why_not_by_attention(model, number, in_trie[number]) for number in kinds.values())
            return next(filter(None, reasons), None)
    except FAILURES as error:
        return f"its own code fails on a trie ({first_line(error)})"
    except UnsupportedModelError as error:
        return error.problems[0].what
    finally:
        model.use_own_attention()


def _why_not_by_attention(model: StagedModel, number: int, call: Call) -> str | None:
    """Why a layer does more than one attention: with attention replaced, no token may change another's output."""
    weights = model.fake_layer(number, seed=3)
    generator = torch.Generator(device="cpu").manual_seed(4)
    states = torch.randn(call.hidden.shape, generator=generator).to(call.hidden)
    outputs = []
    for changed in (None, 0, len(_DEPTHS) // 2, len(_DEPTHS) - 1):
        given = states.clone()
        if changed is not None:
            given[:, changed] = -given[:, changed] + 1
        attention = TokenwiseAttention()
        output = model.call_layer(number, weights, call.with_hidden(given).with_keywords(trie=attention))
        if len(attention.calls) != 1:
            return f"layer {number} calls attention {len(attention.calls)} times"
        if attention.calls[0].mask is not call.keywords.get("attention_mask"):
            return f"layer {number} makes an attention mask of its own"
        if not output.isfinite().all():
            return f"layer {number} cannot be tried with made-up weights"
        outputs.append(output)
        others = [token for token in range(len(_DEPTHS)) if token != changed]
        if not torch.allclose(output[:, others], outputs[0][:, others], rtol=1e-3, atol=1e-4):
            return f"layer {number} mixes tokens by more than attention"
    return None


def _known(call: Call) -> Call:
    """A call without the mask, which a trie's attention replaces."""
    return Call(call.positional, {name: each for name, each in call.keywords.items() if name != "attention_mask"})


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    """What belongs to the tokens of a plain prompt, in the order of the small trie."""
    length, depths = max(_DEPTHS) + 1, torch.tensor(_DEPTHS, device=tensor.device)
    for dimension, size in enumerate(tensor.shape):
        if size == length and dimension >= min(1, tensor.dim() - 1):
            return tensor.index_select(dimension, depths)
    return tensor


def layer_masks(model: StagedModel, length: int) -> list[torch.Tensor]:
    """The additive mask of each layer for a plain prompt, shape (length, length), as transformers makes it."""
    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    model.use_attention("eager")
    calls = model.record({}, ids, embedded=[0])
    masks = []
    for number, call in enumerate(calls):
        mask: Any = call.keywords.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.shape != (1, 1, length, length) or not mask.is_floating_point():
            raise model.unsupported("unknown-mask", f"the attention mask of layer {number} cannot be read")
        masks.append(mask[0, 0])
    return masks


def use_trie_attention(model: StagedModel) -> None:
    """Compute attention by `trie_attention` from now on."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, trie_attention)
    model.use_attention(ATTENTION_NAME)
