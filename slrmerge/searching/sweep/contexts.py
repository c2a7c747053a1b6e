"""What a sweep computes: the log-probabilities of target tokens, each after a context."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Context:
    """Token ids from the start of a prompt, and the next tokens whose log-probabilities are wanted.

    A prompt with single-token answers is one context. An answer of several tokens is a path through several contexts:
    each of its tokens is a target after the tokens before it.
    """

    ids: tuple[int, ...]
    targets: tuple[int, ...]
