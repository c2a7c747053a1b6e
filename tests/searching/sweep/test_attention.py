"""Attention over tries, compared with one dense product under a mask of ancestors."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.errors import UnsupportedModelError
from slrmerge.searching.sweep.attention import (
    AttentionCall,
    AttentionPattern,
    CapturedKeyValues,
    KeyValueCapture,
    LeafAttention,
    QueryRun,
    TrieAttention,
    trie_attention,
)
from slrmerge.searching.sweep.trie import TokenTrie, pack
from tests.problems import refused

CPU = torch.device("cpu")
STATES, HEADS, WIDTH = 2, 4, 8
CONTEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=6)
MASKS = {
    "causal": lambda near, far: far <= near,
    "sliding": lambda near, far: near - 3 < far <= near,
    "all": lambda near, far: True,
}


def mask(name: str, count: int) -> torch.Tensor:
    """The additive mask of a plain prompt, shape (count, count)."""
    allowed = torch.tensor([[MASKS[name](near, far) for far in range(count)] for near in range(count)])
    return torch.zeros(count, count).masked_fill(~allowed, -torch.inf)


def dense(
    trie: TokenTrie, name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """Every token against every token, in float64, with all but its ancestors and itself masked."""
    visible = torch.full((len(trie), len(trie)), -torch.inf, dtype=torch.float64)
    for place, path in enumerate(trie.paths_to(range(len(trie)))):
        for other in path:
            if MASKS[name](trie.depths[place], trie.depths[other]):
                visible[place, other] = 0
    repeat = query.shape[1] // key.shape[1]
    key, value = (side.double().repeat_interleave(repeat, dim=1) for side in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (torch.softmax(scores + visible, dim=-1) @ value).transpose(1, 2)


def parts(trie: TokenTrie, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, and keys and (wider) values of `groups` heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = (HEADS, WIDTH), (groups, WIDTH), (groups, WIDTH + 3)
    query, key, value = (
        torch.randn(STATES, heads, len(trie), width, generator=generator) * 2 for heads, width in shapes
    )
    return query, key, value


def of_segments(trie: TokenTrie) -> AttentionPattern:
    return AttentionPattern.of((QueryRun(*segment) for segment in trie.segments), CPU)


def of_leaves(trie: TokenTrie) -> AttentionPattern:
    return AttentionPattern.of((QueryRun((n,), path) for n, path in enumerate(trie.paths_to(trie.leaves))), CPU)


@settings(deadline=None, max_examples=40)
@given(CONTEXTS, st.sampled_from(["causal", "sliding"]), st.sampled_from([1, 2, 4]), st.sampled_from([None, 2.0]))
def test_segments_give_the_dense_product(
    contexts: list[list[int]], name: str, groups: int, softcap: float | None
) -> None:
    trie = pack(contexts)
    query, key, value = parts(trie, groups)
    visible = mask(name, trie.max_length)
    mixed = of_segments(trie).attend(AttentionCall(query, key, value, None, 0.3, softcap), visible)
    torch.testing.assert_close(mixed.double(), dense(trie, name, query, key, value, softcap), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(CONTEXTS, st.sampled_from(["causal", "sliding"]))
def test_leaves_alone_give_their_rows_of_the_dense_product(contexts: list[list[int]], name: str) -> None:
    trie = pack(contexts)
    query, key, value = parts(trie, 2)
    visible, leaves = mask(name, trie.max_length), list(trie.leaves)
    mixed = of_leaves(trie).attend(AttentionCall(query[:, :, leaves], key, value, None, 0.3, None), visible)
    expected = dense(trie, name, query, key, value, None)[:, leaves]
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=1e-5)


def test_segments_of_equal_shape_are_one_batch() -> None:
    trie = pack([[1, 2, 3], [1, 2, 4], [1, 5, 6], [1, 5, 7]])
    shapes = [(batch.queries.shape, batch.keys.shape) for batch in of_segments(trie).batches]
    assert shapes == [((1, 1), (1, 1)), ((2, 1), (2, 2)), ((4, 1), (4, 3))]


def test_the_output_has_the_dtype_of_the_queries_and_the_softmax_is_in_fp32() -> None:
    trie = pack([[1] * 40])
    query, key, value = (part.bfloat16() for part in parts(trie, 2))
    causal = mask("causal", 40).bfloat16()
    mixed = of_segments(trie).attend(AttentionCall(query, key, value, None, 0.3, None), causal)
    assert mixed.dtype == torch.bfloat16
    scores = (query @ key.repeat_interleave(2, dim=1).transpose(-1, -2)).mul(0.3) + causal
    weights = scores.softmax(dim=-1, dtype=torch.float32).bfloat16()
    expected = (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2)
    torch.testing.assert_close(mixed, expected, rtol=1e-2, atol=1e-2)


def test_captured_keys_and_values_serve_the_leaves() -> None:
    trie = pack([[1, 2, 3], [1, 4]])
    query, key, value = parts(trie, 2)
    module, causal, leaves = torch.nn.Module(), mask("causal", trie.max_length), list(trie.leaves)
    with pytest.raises(CapturedKeyValues) as caught:
        trie_attention(module, query, key, value, None, trie=KeyValueCapture(), scaling=0.3)
    captured = caught.value
    assert captured.key is key
    assert captured.value is value
    attention = LeafAttention(of_leaves(trie), causal, key=captured.key, value=captured.value)
    own = [part[:, :, leaves] for part in (query, key, value)]
    mixed, weights = trie_attention(module, *own, None, trie=attention, scaling=0.3)
    expected = dense(trie, "causal", query, key, value, None)[:, leaves]
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=1e-5)
    assert weights is None


@pytest.mark.parametrize("head_dim", [None, 2])
def test_the_default_scaling_is_that_of_the_head_width(head_dim: int | None) -> None:
    trie = pack([[1, 2, 3], [1, 4]])
    query, key, value = parts(trie, 2)
    module = torch.nn.Module()
    if head_dim:
        module.head_dim = head_dim
    attention = TrieAttention(of_segments(trie), mask("causal", trie.max_length))
    mixed, _ = trie_attention(module, query, key, value, None, trie=attention)
    expected = attention.attend(AttentionCall(query, key, value, None, (head_dim or WIDTH) ** -0.5, None))
    assert torch.equal(mixed, expected)


def test_only_arguments_that_may_change_the_result_are_refused() -> None:
    trie = pack([[1, 2]])
    query, key, value = parts(trie, 2)
    attention = TrieAttention(of_segments(trie), mask("causal", 2))
    others: dict[str, Any] = {"dropout": 0.0, "sliding_window": 4, "is_causal": True, "s_aux": None}
    trie_attention(torch.nn.Module(), query, key, value, None, trie=attention, **others)
    others |= {"s_aux": torch.zeros(4), "bias": torch.zeros(1)}
    with refused(UnsupportedModelError, "unknown-attention-argument"):
        trie_attention(torch.nn.Module(), query, key, value, None, trie=attention, **others)


def test_a_layer_that_does_not_pass_the_trie_on_is_refused() -> None:
    query, key, value = parts(pack([[1, 2]]), 2)
    with refused(UnsupportedModelError, "attention-arguments-lost"):
        trie_attention(torch.nn.Module(), query, key, value, None)
