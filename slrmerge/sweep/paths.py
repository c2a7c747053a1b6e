"""Hybrids as paths through the stages of a model: those that agree up to a stage share what was worked out so far."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """What to work out at one stage: for each variant of its weights, (state to start from, state to make).

    `nodes` is, for every hybrid, the state that it is at after the step.
    """

    jobs: dict[int, list[tuple[int, int]]]
    nodes: tuple[int, ...]

    @property
    def state_count(self) -> int:
        return sum(map(len, self.jobs.values()))


def step(nodes: Sequence[int], variants: Sequence[int]) -> Step:
    """The next step of hybrids that are at `nodes` and each want one of the `variants` of this stage's weights."""
    made: dict[tuple[int, int], int] = {}
    after = tuple(made.setdefault(pair, len(made)) for pair in zip(nodes, variants, strict=True))
    jobs: dict[int, list[tuple[int, int]]] = {}
    for (start, variant), end in made.items():
        jobs.setdefault(variant, []).append((start, end))
    return Step(jobs, after)


def count_states(choices: Sequence[Sequence[int]]) -> list[int]:
    """How many states each stage makes for hybrids that take these variants, were all of them different."""
    nodes: tuple[int, ...] = (0,) * len(choices[0])
    counts = []
    for variants in choices:
        made = step(nodes, variants)
        nodes = made.nodes
        counts.append(made.state_count)
    return counts
