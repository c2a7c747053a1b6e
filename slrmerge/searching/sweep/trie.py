"""What a sweep computes, and its packing as a prefix trie: a prefix that several contexts share is computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Context:
    """Token ids from the start of a prompt, and the next tokens whose log-probabilities are wanted.

    A prompt with single-token answers is one context. An answer of several tokens is a path through several contexts:
    each of its tokens is a target after the tokens before it.
    """

    ids: tuple[int, ...]
    targets: tuple[int, ...]


class Segment(NamedTuple):
    """A run of tokens without a fork: their indices in the packing, and the indices from the root to its last token.

    The path ends with the segment's own tokens.
    """

    tokens: tuple[int, ...]
    path: tuple[int, ...]


@dataclass(frozen=True)
class TokenTrie:
    """Packed tokens, ordered so that ancestors precede their descendants and the tokens of a segment are adjacent.

    `ids` and `depths` are by index in the packing; the depth of a token is its position in its context. `leaves` holds
    the index of the last token of each context, in the order given.
    """

    ids: tuple[int, ...]
    depths: tuple[int, ...]
    leaves: tuple[int, ...]
    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def max_length(self) -> int:
        """The number of tokens of the longest context."""
        return max(self.depths) + 1

    def paths_to(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        """For each token, given by its index, the indices from the root to it."""
        paths = {token: segment.path[: len(segment.path) - back] for segment in self.segments
                 for back, token in enumerate(reversed(segment.tokens))}  # fmt: skip
        return [paths[token] for token in tokens]


class _Node:
    def __init__(self, token_id: int) -> None:
        self.token_id = token_id
        self.children: dict[int, _Node] = {}
        self.contexts: list[int] = []


def pack(contexts: Sequence[Sequence[int]]) -> TokenTrie:
    """The trie of contexts, each a sequence of token ids. Contexts with different first tokens have different roots.

    Raises ValueError for an empty context.
    """
    root = _Node(-1)
    for number, ids_of_context in enumerate(contexts):
        if not ids_of_context:
            raise ValueError("an empty context has no last token")
        node = root
        for token_id in ids_of_context:
            node = node.children.setdefault(token_id, _Node(token_id))
        node.contexts.append(number)

    ids: list[int] = []
    depths: list[int] = []
    leaves = [0] * len(contexts)
    segments: list[Segment] = []
    waiting: list[tuple[_Node, tuple[int, ...]]] = [(child, ()) for child in reversed(root.children.values())]
    while waiting:
        node, path = waiting.pop()
        start = len(ids)
        while True:
            index = len(ids)
            ids.append(node.token_id)
            depths.append(len(path) + index - start)
            for number in node.contexts:
                leaves[number] = index
            if len(node.children) != 1:
                break
            (node,) = node.children.values()
        tokens = tuple(range(start, len(ids)))
        segments.append(Segment(tokens, path + tokens))
        waiting.extend((child, path + tokens) for child in reversed(node.children.values()))
    return TokenTrie(tuple(ids), tuple(depths), tuple(leaves), tuple(segments))
