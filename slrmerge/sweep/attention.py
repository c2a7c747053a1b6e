"""Attention over a token trie: each segment attends to its ancestors and itself, equal segments in one batch.

Registered with transformers under a name of its own, so that a model's layers run as they are and only the innermost
product differs. What a layer may see (causal, sliding window) is the rule that transformers itself made for a plain
prompt, looked up by depth.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from slrmerge.errors import Problem, UnsupportedModelError
from slrmerge.sweep.architecture import REMEDY

NAME = "slrmerge_trie"
"""What the implementation is called in a model's config."""


class _Batch(NamedTuple):
    """Segments of one length at one depth: places of their queries (segments, length) and keys (segments, depth)."""

    queries: torch.Tensor
    keys: torch.Tensor


@dataclass
class TrieAttention:
    """Where each query of a packing looks, and, for the layer that is running, by which rule.

    `rule` is the additive mask of a plain prompt, shape (tokens, tokens). With `keep` the keys and values are held
    for a second call and the layer is left at once; with `kept` they are what its queries look at.
    """

    batches: Sequence[_Batch]
    rule: torch.Tensor | None = None
    keep: bool = False
    kept: tuple[torch.Tensor, torch.Tensor] | None = None
    calls: int = field(default=0)

    @classmethod
    def of(cls, queries: Iterable[tuple[Sequence[int], Sequence[int]]], device: torch.device) -> "TrieAttention":
        """From runs of neighbouring queries: their places, and the places that the last of them may see."""
        alike: dict[tuple[int, int], list[tuple[Sequence[int], Sequence[int]]]] = defaultdict(list)
        for places, path in queries:
            alike[len(places), len(path)].append((places, path))
        return cls(
            [
                _Batch(*(torch.tensor(side, device=device) for side in zip(*members, strict=True)))
                for members in alike.values()
            ]
        )

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float, softcap: float | None
    ) -> torch.Tensor:
        """(states, heads, queries, width) and the keys' and values' (states, groups, tokens, width) → (states,
        queries, heads, width). Softmax in fp32, as transformers' eager attention has it."""
        assert self.rule is not None
        states, heads, _, width = query.shape
        groups = key.shape[1]
        output = query.new_empty(states, query.shape[2], heads, value.shape[-1])
        for batch in self.batches:
            segments, length = batch.queries.shape
            depth = batch.keys.shape[1]
            q = query[:, :, batch.queries.flatten()].view(states, groups, heads // groups, segments, length, width)
            q = q.transpose(2, 3).reshape(states, groups, segments, heads // groups * length, width)
            k, v = (
                side[:, :, batch.keys.flatten()].view(states, groups, segments, depth, side.shape[-1])
                for side in (key, value)
            )
            scores = torch.matmul(q, k.transpose(-1, -2)).mul_(scaling)
            if softcap is not None:
                scores = scores.div_(softcap).tanh_().mul_(softcap)
            scores = scores.view(states, groups, segments, heads // groups, length, depth)
            scores += self.rule[depth - length : depth, :depth]
            weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
            mixed = torch.matmul(weights.view(states, groups, segments, -1, depth), v)
            mixed = mixed.view(states, groups, segments, heads // groups, length, -1).permute(0, 2, 4, 1, 3, 5)
            output[:, batch.queries.flatten()] = mixed.reshape(states, segments * length, heads, -1)
        return output


class Kept(Exception):  # noqa: N818 (a signal, not an error)
    """The keys and values are held; nothing further of the layer is wanted."""


def trie_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 (the rule stands in its place)
    *,
    trie: TrieAttention | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls instead of its own attention; `trie` comes with the layer's keyword arguments.

    Raises UnsupportedModelError for an argument that would change the result and is not known here (attention sinks).
    """
    strange = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    if trie is None or strange:
        what = (
            f"uses attention with {', '.join(strange)}" if strange else "keeps a layer's arguments from its attention"
        )
        raise UnsupportedModelError(Problem(type(module).__name__, what, REMEDY))
    trie.calls += 1
    if trie.keep:
        trie.kept = key, value
        raise Kept
    if trie.kept is not None:
        key, value = trie.kept
    if scaling is None:
        scaling = float(getattr(module, "head_dim", query.shape[-1])) ** -0.5
    return trie.attend(query, key, value, scaling=scaling, softcap=softcap), None


_HARMLESS = frozenset({"dropout", "sliding_window", "position_ids", "use_cache", "is_causal", "past_key_values"})
"""Arguments that say nothing new: no dropout outside training, and windows are in the rule."""
