"""Packings: every context can be read back from its leaf, whatever the contexts share."""

from itertools import accumulate

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slrmerge.searching.sweep.trie import Segment, TokenTrie, pack

CONTEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=8)
"""Few token ids, so that most contexts share a prefix, are equal, or are prefixes of each other."""


def prefixes(contexts: list[list[int]]) -> set[tuple[int, ...]]:
    return {prefix for context in contexts for prefix in accumulate((token,) for token in context)}


@given(CONTEXTS)
@example([[1, 2], [1, 2]])
@example([[1, 2, 0], [1, 2], [1]])
def test_the_path_to_a_leaf_spells_its_context(contexts: list[list[int]]) -> None:
    trie = pack(contexts)
    paths = trie.paths_to(trie.leaves)
    assert [[trie.ids[place] for place in path] for path in paths] == contexts


@given(CONTEXTS)
def test_shared_prefixes_are_stored_once(contexts: list[list[int]]) -> None:
    trie = pack(contexts)
    paths = trie.paths_to(range(len(trie)))
    spelled = [tuple(trie.ids[place] for place in path) for path in paths]
    assert len(trie) == len(spelled)
    assert len(set(spelled)) == len(spelled)
    assert set(spelled) == prefixes(contexts)


@given(CONTEXTS)
def test_a_path_leads_from_the_root_to_its_token_and_a_depth_is_a_position(contexts: list[list[int]]) -> None:
    trie = pack(contexts)
    for token, path in enumerate(trie.paths_to(range(len(trie)))):
        assert path[-1] == token
        assert list(path) == sorted(set(path))
        assert [trie.depths[ancestor] for ancestor in path] == list(range(len(path)))
    assert trie.max_length == max(map(len, contexts))


@given(CONTEXTS)
def test_segments_are_adjacent_unforked_and_cover_all_tokens(contexts: list[list[int]]) -> None:
    trie = pack(contexts)
    assert [place for segment in trie.segments for place in segment.tokens] == list(range(len(trie)))
    parents = [path[-2] if len(path) > 1 else None for path in trie.paths_to(range(len(trie)))]
    for segment in trie.segments:
        assert segment.path[-len(segment.tokens) :] == segment.tokens
        assert segment.path == trie.paths_to([segment.tokens[-1]])[0]
        assert all(parents.count(place) == 1 for place in segment.tokens[:-1])
        assert parents.count(segment.tokens[-1]) != 1


def test_a_packing_with_a_fork_a_duplicate_and_a_longer_context() -> None:
    trie = pack([[5, 6, 7], [5, 6, 8], [5, 6, 7], [5, 6, 7, 9], [4]])
    assert trie == TokenTrie(
        ids=(5, 6, 7, 9, 8, 4),
        depths=(0, 1, 2, 3, 2, 0),
        leaves=(2, 4, 2, 3, 5),
        segments=(
            Segment(tokens=(0, 1), path=(0, 1)),
            Segment(tokens=(2, 3), path=(0, 1, 2, 3)),
            Segment(tokens=(4,), path=(0, 1, 4)),
            Segment(tokens=(5,), path=(5,)),
        ),
    )
    assert trie.paths_to([3, 2, 4]) == [(0, 1, 2, 3), (0, 1, 2), (0, 1, 4)]


def test_an_empty_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^an empty context has no last token$"):
        pack([[1], []])
