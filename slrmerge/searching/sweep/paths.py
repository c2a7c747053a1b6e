"""Hybrids as paths through the stages of a model (embedding, layers, head).

Hybrids with equal weights up to a stage share one state there: the hidden states of all tokens, computed once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class TensorAlpha(NamedTuple):
    """A tensor at one alpha."""

    name: str
    alpha: float


class Transition(NamedTuple):
    """The state that a stage starts from and the state that it makes, by their numbers."""

    before: int
    after: int


@dataclass(frozen=True)
class Step:
    """What to compute at one stage: the transitions of each variant of its weights.

    `hybrid_states` is, for every hybrid, the number of its state after the step.
    """

    transitions: dict[int, list[Transition]]
    hybrid_states: tuple[int, ...]

    @property
    def state_count(self) -> int:
        return sum(map(len, self.transitions.values()))


def plan_step(hybrid_states: Sequence[int], hybrid_variants: Sequence[int]) -> Step:
    """The step of hybrids that are at these states and take these variants of the stage's weights."""
    numbers: dict[tuple[int, int], int] = {}
    after = tuple(numbers.setdefault(pair, len(numbers)) for pair in zip(hybrid_states, hybrid_variants, strict=True))
    transitions: dict[int, list[Transition]] = {}
    for (state, variant), made in numbers.items():
        transitions.setdefault(variant, []).append(Transition(state, made))
    return Step(transitions, after)


def count_states(stage_variants: Sequence[Sequence[int]]) -> list[int]:
    """The number of states that each stage makes, from the variant that each hybrid takes there."""
    hybrid_states: tuple[int, ...] = (0,) * len(stage_variants[0])
    counts = []
    for hybrid_variants in stage_variants:
        step = plan_step(hybrid_states, hybrid_variants)
        hybrid_states = step.hybrid_states
        counts.append(step.state_count)
    return counts


@dataclass(frozen=True)
class SweepPlan:
    """The weights that every hybrid takes, stage by stage.

    `stages[s]` names the tensors of stage s. `variants[s]` are its different weights, each the alphas of its tensors in
    that order. `hybrid_variants[s]` is, for every hybrid, the number of the variant that it takes.
    """

    stages: tuple[tuple[str, ...], ...]
    variants: tuple[tuple[tuple[float, ...], ...], ...]
    hybrid_variants: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, stages: tuple[tuple[str, ...], ...], hybrids: Sequence[Mapping[str, float]]) -> "SweepPlan":
        """The plan for hybrids that are given by the alpha of every tensor."""
        variants: list[tuple[tuple[float, ...], ...]] = []
        hybrid_variants: list[tuple[int, ...]] = []
        for names in stages:
            numbers: dict[tuple[float, ...], int] = {}
            hybrid_variants.append(
                tuple(numbers.setdefault(tuple(map(hybrid.__getitem__, names)), len(numbers)) for hybrid in hybrids)
            )
            variants.append(tuple(numbers))
        return cls(stages, tuple(variants), tuple(hybrid_variants))

    @property
    def hybrid_count(self) -> int:
        return len(self.hybrid_variants[0])

    @cached_property
    def state_counts(self) -> list[int]:
        """The number of states that each stage makes; fewer where both sides have the same weights."""
        return count_states(self.hybrid_variants)

    def tensors(self, stage: int, variant: int) -> list[TensorAlpha]:
        """The tensors of a stage, at the alphas of one of its variants."""
        return list(map(TensorAlpha, self.stages[stage], self.variants[stage][variant]))

    def all_tensors(self) -> set[TensorAlpha]:
        """Every tensor, at every alpha that some hybrid takes it at."""
        return {
            tensor
            for stage, variants in enumerate(self.variants)
            for variant in range(len(variants))
            for tensor in self.tensors(stage, variant)
        }
