"""Attention over tries, against one dense product under a mask of ancestors."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.errors import UnsupportedModelError
from slrmerge.sweep.architecture import REMEDY
from slrmerge.sweep.attention import Kept, TrieAttention, trie_attention
from slrmerge.sweep.trie import TokenTrie, pack

CPU = torch.device("cpu")
STATES, HEADS, WIDTH = 2, 4, 8
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=6)
RULES = {
    "causal": lambda near, far: far <= near,
    "sliding": lambda near, far: near - 3 < far <= near,
    "all": lambda near, far: True,
}


def rule(name: str, count: int) -> torch.Tensor:
    """The additive mask of a plain prompt."""
    allowed = torch.tensor([[RULES[name](near, far) for far in range(count)] for near in range(count)])
    return torch.zeros(count, count).masked_fill(~allowed, -torch.inf)


def dense(
    trie: TokenTrie, name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """Every token against every token, in float64, with all but its ancestors and itself masked."""
    mask = torch.full((len(trie), len(trie)), -torch.inf, dtype=torch.float64)
    for place, path in enumerate(trie.paths_of(range(len(trie)))):
        for other in path:
            if RULES[name](trie.depths[place], trie.depths[other]):
                mask[place, other] = 0
    repeat = query.shape[1] // key.shape[1]
    key, value = (side.double().repeat_interleave(repeat, dim=1) for side in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (torch.softmax(scores + mask, dim=-1) @ value).transpose(1, 2)


def parts(trie: TokenTrie, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values (wider than the keys), of as many heads each as is asked for."""
    generator = torch.Generator().manual_seed(0)
    shapes = (HEADS, WIDTH), (groups, WIDTH), (groups, WIDTH + 3)
    query, key, value = (
        torch.randn(STATES, heads, len(trie), width, generator=generator) * 2 for heads, width in shapes
    )
    return query, key, value


def over_segments(trie: TokenTrie) -> TrieAttention:
    return TrieAttention.of(((segment.tokens, segment.path) for segment in trie.segments), CPU)


@settings(deadline=None, max_examples=40)
@given(PROMPTS, st.sampled_from(["causal", "sliding"]), st.sampled_from([1, 2, 4]), st.sampled_from([None, 2.0]))
def test_segment_by_segment_is_as_every_token_against_its_ancestors(
    prompts: list[list[int]], name: str, groups: int, softcap: float | None
) -> None:
    trie = pack(prompts)
    query, key, value = parts(trie, groups)
    attention = over_segments(trie)
    attention.rule = rule(name, trie.longest)
    mixed = attention.attend(query, key, value, scaling=0.3, softcap=softcap)
    torch.testing.assert_close(mixed.double(), dense(trie, name, query, key, value, softcap), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(PROMPTS, st.sampled_from(["causal", "sliding"]))
def test_the_leaves_alone_see_what_they_see_among_all_tokens(prompts: list[list[int]], name: str) -> None:
    trie = pack(prompts)
    query, key, value = parts(trie, 2)
    leaves = TrieAttention.of((((n,), path) for n, path in enumerate(trie.paths_of(trie.leaves))), CPU)
    leaves.rule = rule(name, trie.longest)
    mixed = leaves.attend(query[:, :, list(trie.leaves)], key, value, scaling=0.3, softcap=None)
    expected = dense(trie, name, query, key, value, None)[:, list(trie.leaves)]
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=1e-5)


def test_segments_of_one_shape_go_in_one_batch() -> None:
    trie = pack([[1, 2, 3], [1, 2, 4], [1, 5, 6], [1, 5, 7]])
    shapes = [(batch.queries.shape, batch.keys.shape) for batch in over_segments(trie).batches]
    assert shapes == [((1, 1), (1, 1)), ((2, 1), (2, 2)), ((4, 1), (4, 3))]


def test_the_outcome_has_the_dtype_of_the_states_and_the_softmax_is_in_fp32() -> None:
    trie = pack([[1] * 40])
    query, key, value = (part.bfloat16() for part in parts(trie, 2))
    attention = over_segments(trie)
    attention.rule = rule("causal", 40).bfloat16()
    mixed = attention.attend(query, key, value, scaling=0.3, softcap=None)
    assert mixed.dtype == torch.bfloat16
    scores = (query @ key.repeat_interleave(2, dim=1).transpose(-1, -2)).mul(0.3) + attention.rule
    weights = scores.softmax(dim=-1, dtype=torch.float32).bfloat16()
    expected = (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2)
    torch.testing.assert_close(mixed, expected, rtol=1e-2, atol=1e-2)


def test_keys_and_values_are_held_and_looked_at_by_a_second_call() -> None:
    trie = pack([[1, 2, 3], [1, 4]])
    query, key, value = parts(trie, 2)
    module = torch.nn.Module()
    first = over_segments(trie)
    first.rule, first.keep = rule("causal", trie.longest), True
    with pytest.raises(Kept):
        trie_attention(module, query, key, value, None, trie=first, scaling=0.3)
    assert first.kept is not None
    second = over_segments(trie)
    second.rule, second.kept = first.rule, first.kept
    mixed, weights = trie_attention(module, query, key[:, :, :0], value[:, :, :0], None, trie=second, scaling=0.3)
    torch.testing.assert_close(mixed.double(), dense(trie, "causal", query, key, value, None), rtol=1e-5, atol=1e-5)
    assert weights is None
    assert (first.calls, second.calls) == (1, 1)


@pytest.mark.parametrize("head_dim", [None, 2])
def test_without_a_scale_it_is_the_root_of_the_head_width(head_dim: int | None) -> None:
    trie = pack([[1, 2, 3], [1, 4]])
    query, key, value = parts(trie, 2)
    module = torch.nn.Module()
    if head_dim:
        module.head_dim = head_dim
    attention = over_segments(trie)
    attention.rule = rule("causal", trie.longest)
    mixed, _ = trie_attention(module, query, key, value, None, trie=attention)
    expected = attention.attend(query, key, value, scaling=(head_dim or WIDTH) ** -0.5, softcap=None)
    assert torch.equal(mixed, expected)


def test_arguments_that_would_change_the_result_are_refused_and_others_are_not() -> None:
    trie = pack([[1, 2]])
    query, key, value = parts(trie, 2)
    attention = over_segments(trie)
    attention.rule = rule("causal", 2)
    others: dict[str, Any] = {"dropout": 0.0, "sliding_window": 4, "is_causal": True, "s_aux": None}
    trie_attention(torch.nn.Module(), query, key, value, None, trie=attention, **others)
    others |= {"s_aux": torch.zeros(4), "bias": torch.zeros(1)}
    with pytest.raises(UnsupportedModelError) as caught:
        trie_attention(torch.nn.Module(), query, key, value, None, trie=attention, **others)
    assert str(caught.value) == f"Module: uses attention with bias, s_aux; {REMEDY}"


def test_attention_that_is_not_told_of_the_trie_is_refused() -> None:
    query, key, value = parts(pack([[1, 2]]), 2)
    with pytest.raises(UnsupportedModelError) as caught:
        trie_attention(torch.nn.Module(), query, key, value, None)
    assert str(caught.value) == f"Module: keeps a layer's arguments from its attention; {REMEDY}"
