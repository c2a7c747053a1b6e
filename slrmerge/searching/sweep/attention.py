"""Attention over a token trie: each segment attends to its ancestors and itself, segments of equal shape in one batch.

Registered with transformers as an attention implementation, so that a model's layers run unchanged and only the
innermost product differs. The masks (causal, sliding window) are those that transformers makes for a plain prompt.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import torch

from slrmerge.searching.sweep.architecture import unsupported

ATTENTION_NAME = "slrmerge_trie"
"""The name of the implementation in a model's config."""


class AttentionCall(NamedTuple):
    """What a layer calls attention with.

    `query` has shape (states, heads, queries, width), `key` and `value` (states, groups, tokens, width). `mask` is the
    one that the model made.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    softcap: float | None


class QueryRun(NamedTuple):
    """Queries of adjacent tokens, and the keys from the root to the last of them; both as indices."""

    queries: Sequence[int]
    keys: Sequence[int]


class _Batch(NamedTuple):
    """Runs of equal length at equal depth: `queries` (runs, length) and `keys` (runs, depth), int64 indices."""

    queries: torch.Tensor
    keys: torch.Tensor


@dataclass(frozen=True)
class AttentionPattern:
    """Which tokens each query of a packing attends to."""

    batches: Sequence[_Batch]

    @classmethod
    def of(cls, runs: Iterable[QueryRun], device: torch.device) -> "AttentionPattern":
        by_shape: dict[tuple[int, int], list[QueryRun]] = defaultdict(list)
        for run in runs:
            by_shape[len(run.queries), len(run.keys)].append(run)
        return cls(
            [
                _Batch(
                    torch.tensor([run.queries for run in alike], device=device),
                    torch.tensor([run.keys for run in alike], device=device),
                )
                for alike in by_shape.values()
            ]
        )

    def attend(self, call: AttentionCall, mask: torch.Tensor) -> torch.Tensor:
        """The output of attention, shape (states, queries, heads, value width), in the dtype of the queries.

        `mask` is additive, shape (positions, positions), and looked up by depth. The softmax is in float32, as in
        transformers' eager attention.
        """
        states, heads, queries, _ = call.query.shape
        output = call.query.new_empty(states, queries, heads, call.value.shape[-1])
        for batch in self.batches:
            output[:, batch.queries.flatten()] = _attend(batch, call, mask)
        return output


def _attend(batch: _Batch, call: AttentionCall, mask: torch.Tensor) -> torch.Tensor:
    """The output for the queries of one batch, shape (states, runs * length, heads, value width)."""
    query, key, value, _, scaling, softcap = call
    states, heads, _, width = query.shape
    groups, value_width = key.shape[1], value.shape[-1]
    per_group = heads // groups
    runs, length = batch.queries.shape
    depth = batch.keys.shape[1]
    # (states, heads, runs * length, width) -> (states, groups, per_group, runs, length, width)
    q = query[:, :, batch.queries.flatten()].view(states, groups, per_group, runs, length, width)
    # -> (states, groups, runs, per_group * length, width): the heads of a group share its keys
    q = q.transpose(2, 3).reshape(states, groups, runs, per_group * length, width)
    # (states, groups, runs * depth, width) -> (states, groups, runs, depth, width)
    k = key[:, :, batch.keys.flatten()].view(states, groups, runs, depth, width)
    v = value[:, :, batch.keys.flatten()].view(states, groups, runs, depth, value_width)
    # (states, groups, runs, per_group * length, depth)
    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(scaling)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    # the queries of a run are at the last `length` of its `depth` positions
    scores = scores.view(states, groups, runs, per_group, length, depth)
    scores += mask[depth - length : depth, :depth]
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = weights.view(states, groups, runs, per_group * length, depth)
    mixed = torch.matmul(weights, v)  # (states, groups, runs, per_group * length, value_width)
    # -> (states, groups, runs, per_group, length, value_width)
    # -> (states, runs, length, groups, per_group, value_width)
    mixed = mixed.view(states, groups, runs, per_group, length, value_width).permute(0, 2, 4, 1, 3, 5)
    return mixed.reshape(states, runs * length, heads, value_width)


class LayerAttention(Protocol):
    """What the attention of one layer does; passed to the layer as the keyword argument `trie`."""

    def attend(self, call: AttentionCall) -> torch.Tensor: ...


class TrieAttention:
    """Attention by a pattern, under the mask of a layer."""

    def __init__(self, pattern: AttentionPattern, mask: torch.Tensor) -> None:
        self._pattern = pattern
        self._mask = mask

    def attend(self, call: AttentionCall) -> torch.Tensor:
        return self._pattern.attend(call, self._mask)


class LeafAttention(TrieAttention):
    """Attention of the leaves' queries to keys and values that were captured from all tokens."""

    def __init__(
        self, pattern: AttentionPattern, mask: torch.Tensor, *, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        super().__init__(pattern, mask)
        self._key, self._value = key, value

    def attend(self, call: AttentionCall) -> torch.Tensor:
        return super().attend(call._replace(key=self._key, value=self._value))  # the call's are of the leaves alone


class TokenwiseAttention:
    """Returns each token's own value in the place of attention; `calls` are those that the layer made."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self.calls.append(call)
        per_group = call.query.shape[1] // call.value.shape[1]
        return call.value.repeat_interleave(per_group, dim=1).transpose(1, 2).contiguous()


class KeyValueCapture:
    """Raises a layer's keys and values, which leaves the layer: the rest of it is needed for the leaves only."""

    def attend(self, call: AttentionCall) -> NoReturn:
        raise CapturedKeyValues(call.key, call.value)


class CapturedKeyValues(Exception):  # noqa: N818 (no error: the only way out of a layer before its end)
    """Keys and values, shape (states, groups, tokens, width) each."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.key, self.value = key, value


def trie_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    trie: LayerAttention | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention implementation that transformers calls; `trie` comes with the keyword arguments of the layer.

    Raises UnsupportedModelError for arguments that are not known here and may change the result (attention sinks).
    """
    kind = type(module).__name__
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _IGNORED)
    if unknown:
        what = f"calls attention with {', '.join(unknown)}"
        raise unsupported("unknown-attention-argument", kind, what)
    if trie is None:
        what = "does not pass the arguments of its layer on to attention"
        raise unsupported("attention-arguments-lost", kind, what)
    if scaling is None:
        scaling = float(getattr(module, "head_dim", query.shape[-1])) ** -0.5
    return trie.attend(AttentionCall(query, key, value, attention_mask, scaling, softcap)), None


_IGNORED = frozenset({
    "dropout", "sliding_window", "position_ids", "use_cache", "is_causal", "past_key_values", "output_router_logits",
    "output_attentions",
})  # fmt: skip
"""Arguments that change nothing here: dropout acts in training only, and windows are in the mask."""
