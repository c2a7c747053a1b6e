"""Hybrids as paths through the stages of a model: those that agree up to a stage share what was worked out so far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

Choice = tuple[str, float]
"""A tensor's name and the alpha that it is wanted at."""


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


@dataclass(frozen=True)
class SweepPlan:
    """Hybrids as choices, stage by stage. `variants[s]` are the different weights of stage s, each the alphas of its
    tensors in the order of `stages[s]`; `choices[s]` is, for every hybrid, which of them it takes."""

    stages: tuple[tuple[str, ...], ...]
    variants: tuple[tuple[tuple[float, ...], ...], ...]
    choices: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, stages: tuple[tuple[str, ...], ...], hybrids: Sequence[Mapping[str, float]]) -> "SweepPlan":
        """From the alpha of every tensor, hybrid by hybrid."""
        variants: list[tuple[tuple[float, ...], ...]] = []
        choices: list[tuple[int, ...]] = []
        for names in stages:
            number: dict[tuple[float, ...], int] = {}
            choices.append(
                tuple(number.setdefault(tuple(map(hybrid.__getitem__, names)), len(number)) for hybrid in hybrids)
            )
            variants.append(tuple(number))
        return cls(stages, tuple(variants), tuple(choices))

    @cached_property
    def state_counts(self) -> list[int]:
        """How many states each stage makes at most."""
        return count_states(self.choices)

    @property
    def wanted(self) -> set[Choice]:
        """Every tensor with every alpha that some hybrid wants it at."""
        return {
            choice
            for names, variants in zip(self.stages, self.variants, strict=True)
            for alphas in variants
            for choice in zip(names, alphas, strict=True)
        }

    def tensors(self, stage: int, variant: int) -> list[Choice]:
        return list(zip(self.stages[stage], self.variants[stage][variant], strict=True))
