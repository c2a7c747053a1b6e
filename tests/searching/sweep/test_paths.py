"""Hybrids as paths: the states that each stage makes, compared with counting prefixes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slrmerge.searching.sweep.paths import Step, SweepPlan, TensorAlpha, Transition, count_states, plan_step


@st.composite
def stage_variants(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """For each of some stages, the variant that each of some hybrids takes."""
    hybrids = draw(st.integers(1, 9))
    return draw(st.lists(st.tuples(*[st.integers(0, 2)] * hybrids), min_size=1, max_size=6))


def intervals(layers: int) -> list[tuple[int, ...]]:
    """The variants of every interval and the post-trained model, by stage; embedding and head have one variant."""
    spans = [(i, j) for i in range(layers) for j in range(i, layers)]
    inner = [(*(int(i <= k <= j) for i, j in spans), 0) for k in range(layers)]
    outer = (0,) * (len(spans) + 1)
    return [outer, *inner, outer]


@given(stage_variants())
def test_a_stage_makes_a_state_for_every_distinct_prefix(stages: list[tuple[int, ...]]) -> None:
    hybrids = range(len(stages[0]))
    expected = [
        len({tuple(stage[hybrid] for stage in stages[: last + 1]) for hybrid in hybrids})
        for last in range(len(stages))
    ]  # fmt: skip
    assert count_states(stages) == expected


@given(stage_variants())
def test_hybrids_share_a_state_exactly_where_they_agree_so_far(stages: list[tuple[int, ...]]) -> None:
    states: tuple[int, ...] = (0,) * len(stages[0])
    for last, variants in enumerate(stages):
        states = plan_step(states, variants).hybrid_states
        prefixes = list(zip(*stages[: last + 1], strict=True))
        for one, state in zip(prefixes, states, strict=True):
            assert [one == other for other in prefixes] == [state == other for other in states]


@given(stage_variants())
def test_every_state_is_made_once_from_the_state_and_variant_of_its_hybrids(stages: list[tuple[int, ...]]) -> None:
    before: tuple[int, ...] = (0,) * len(stages[0])
    for variants in stages:
        step = plan_step(before, variants)
        origin = {each.after: (each.before, variant) for variant, made in step.transitions.items() for each in made}
        assert sorted(origin) == list(range(step.state_count)) == list(range(sum(map(len, step.transitions.values()))))
        assert [origin[state] for state in step.hybrid_states] == list(zip(before, variants, strict=True))
        before = step.hybrid_states


def test_a_step_groups_its_transitions_by_variant() -> None:
    transitions = {1: [Transition(0, 0), Transition(1, 2)], 0: [Transition(0, 1), Transition(1, 3)]}
    assert plan_step([0, 0, 1, 1, 1], [1, 0, 1, 1, 0]) == Step(transitions, hybrid_states=(0, 1, 2, 2, 3))


@pytest.mark.parametrize("layers", [1, 2, 3, 8, 32])
def test_all_intervals_take_the_layer_evaluations_of_the_closed_form(layers: int) -> None:
    counts = count_states(intervals(layers))
    assert counts[0] == 1
    assert sum(counts[1:-1]) == layers + layers * (layers + 1) * (layers + 2) // 6
    assert counts[-1] == layers * (layers + 1) // 2 + 1


def test_a_plan_numbers_the_variants_of_each_stage() -> None:
    hybrids = [{"a": 0.0, "b": 0.5, "c": 1.0}, {"a": 0.0, "b": 1.0, "c": 1.0}, {"a": 0.0, "b": 0.5, "c": 0.0}]
    plan = SweepPlan.of((("a", "b"), ("c",)), hybrids)
    assert plan == SweepPlan(
        stages=(("a", "b"), ("c",)),
        variants=(((0.0, 0.5), (0.0, 1.0)), ((1.0,), (0.0,))),
        hybrid_variants=((0, 1, 0), (0, 0, 1)),
    )
    assert plan.hybrid_count == 3
    assert plan.state_counts == [2, 3]
    assert plan.tensors(0, 1) == [TensorAlpha("a", 0.0), TensorAlpha("b", 1.0)]
    assert plan.all_tensors() == {("a", 0.0), ("b", 0.5), ("b", 1.0), ("c", 1.0), ("c", 0.0)}
