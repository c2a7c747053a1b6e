"""Prompts packed as a prefix trie: what they share is there, and is computed, once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Segment(NamedTuple):
    """A run of tokens without a fork: `tokens` are their places in the packing, `path` those from the root to its end.

    The path ends with the segment's own tokens.
    """

    tokens: tuple[int, ...]
    path: tuple[int, ...]


@dataclass(frozen=True)
class TokenTrie:
    """Packed tokens, in an order in which a token's ancestors come before it and a segment lies in one piece.

    `ids` and `depths` are by place in the packing; a depth is a token's position in its prompt. `leaves` holds, for
    each prompt in the order given, the place of its last token.
    """

    ids: tuple[int, ...]
    depths: tuple[int, ...]
    leaves: tuple[int, ...]
    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest prompt."""
        return max(self.depths) + 1

    def paths_of(self, places: Sequence[int]) -> list[tuple[int, ...]]:
        """For each place, the places from the root to it."""
        ends = {token: segment.path[: len(segment.path) - back] for segment in self.segments
                for back, token in enumerate(reversed(segment.tokens))}  # fmt: skip
        return [ends[place] for place in places]


class _Node:
    def __init__(self, token: int) -> None:
        self.token = token
        self.children: dict[int, _Node] = {}
        self.prompts: list[int] = []


def pack(prompts: Sequence[Sequence[int]]) -> TokenTrie:
    """The trie of `prompts`, each a non-empty sequence of token ids that starts with the same id as the others.

    Raises ValueError for an empty prompt. Prompts that start differently hang from several roots, which is fine too.
    """
    root = _Node(-1)
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError("an empty prompt has no last token")
        node = root
        for token in prompt:
            node = node.children.setdefault(token, _Node(token))
        node.prompts.append(number)

    ids: list[int] = []
    depths: list[int] = []
    leaves = [0] * len(prompts)
    segments: list[Segment] = []
    waiting: list[tuple[_Node, tuple[int, ...]]] = [(child, ()) for child in reversed(root.children.values())]
    while waiting:
        node, path = waiting.pop()
        start = len(ids)
        while True:
            place = len(ids)
            ids.append(node.token)
            depths.append(len(path) + place - start)
            for number in node.prompts:
                leaves[number] = place
            if len(node.children) != 1:
                break
            (node,) = node.children.values()
        tokens = tuple(range(start, len(ids)))
        segments.append(Segment(tokens, path + tokens))
        waiting.extend((child, path + tokens) for child in reversed(node.children.values()))
    return TokenTrie(tuple(ids), tuple(depths), tuple(leaves), tuple(segments))
