"""Packings: every prompt can be read back from its leaf, whatever the prompts share."""

from itertools import accumulate

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slrmerge.sweep.trie import Segment, TokenTrie, pack

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=8)
"""Few token ids, so that most prompts share something, are the same, or start one another."""


def prefixes(prompts: list[list[int]]) -> set[tuple[int, ...]]:
    return {prefix for prompt in prompts for prefix in accumulate((token,) for token in prompt)}


@given(PROMPTS)
@example([[1, 2], [1, 2]])
@example([[1, 2, 0], [1, 2], [1]])
def test_the_path_to_a_prompts_leaf_spells_the_prompt(prompts: list[list[int]]) -> None:
    trie = pack(prompts)
    paths = trie.paths_of(trie.leaves)
    assert [[trie.ids[place] for place in path] for path in paths] == prompts


@given(PROMPTS)
def test_what_prompts_share_is_there_once(prompts: list[list[int]]) -> None:
    trie = pack(prompts)
    paths = trie.paths_of(range(len(trie)))
    spelled = [tuple(trie.ids[place] for place in path) for path in paths]
    assert len(trie) == len(spelled)
    assert len(set(spelled)) == len(spelled)
    assert set(spelled) == prefixes(prompts)


@given(PROMPTS)
def test_a_path_leads_down_to_its_place_and_a_depth_is_a_position(prompts: list[list[int]]) -> None:
    trie = pack(prompts)
    for place, path in enumerate(trie.paths_of(range(len(trie)))):
        assert path[-1] == place
        assert list(path) == sorted(set(path))
        assert [trie.depths[ancestor] for ancestor in path] == list(range(len(path)))
    assert trie.longest == max(map(len, prompts))


@given(PROMPTS)
def test_segments_lie_in_one_piece_without_a_fork_and_cover_all_tokens(prompts: list[list[int]]) -> None:
    trie = pack(prompts)
    assert [place for segment in trie.segments for place in segment.tokens] == list(range(len(trie)))
    parents = [path[-2] if len(path) > 1 else None for path in trie.paths_of(range(len(trie)))]
    for segment in trie.segments:
        assert segment.path[-len(segment.tokens) :] == segment.tokens
        assert segment.path == trie.paths_of([segment.tokens[-1]])[0]
        assert all(parents.count(place) == 1 for place in segment.tokens[:-1])
        assert parents.count(segment.tokens[-1]) != 1


def test_a_packing_of_a_fork_a_twin_and_a_prompt_that_goes_on() -> None:
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
    assert trie.paths_of([3, 2, 4]) == [(0, 1, 2, 3), (0, 1, 2), (0, 1, 4)]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^an empty prompt has no last token$"):
        pack([[1], []])
