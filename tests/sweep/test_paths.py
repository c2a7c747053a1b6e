"""Hybrids as paths: what is worked out once, against counting prefixes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slrmerge.sweep.paths import Step, count_states, step


@st.composite
def choices(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """For each of some stages, the variant that each of some hybrids takes."""
    hybrids = draw(st.integers(1, 9))
    return draw(st.lists(st.tuples(*[st.integers(0, 2)] * hybrids), min_size=1, max_size=6))


def intervals(layers: int) -> list[tuple[int, ...]]:
    """The stages' choices of every interval and the post-trained model; the embedding and the head are one for all."""
    spans = [(i, j) for i in range(layers) for j in range(i, layers)]
    inner = [(*(int(i <= k <= j) for i, j in spans), 0) for k in range(layers)]
    outer = (0,) * (len(spans) + 1)
    return [outer, *inner, outer]


@given(choices())
def test_a_stage_makes_a_state_for_every_distinct_prefix(stages: list[tuple[int, ...]]) -> None:
    hybrids = range(len(stages[0]))
    expected = [
        len({tuple(stage[hybrid] for stage in stages[: last + 1]) for hybrid in hybrids})
        for last in range(len(stages))
    ]  # fmt: skip
    assert count_states(stages) == expected


@given(choices())
def test_hybrids_are_at_one_state_exactly_where_they_agree_so_far(stages: list[tuple[int, ...]]) -> None:
    nodes: tuple[int, ...] = (0,) * len(stages[0])
    for last, variants in enumerate(stages):
        nodes = step(nodes, variants).nodes
        prefixes = list(zip(*stages[: last + 1], strict=True))
        for one, node in zip(prefixes, nodes, strict=True):
            assert [one == other for other in prefixes] == [node == other for other in nodes]


@given(choices())
def test_every_state_is_made_once_from_the_state_and_variant_of_its_hybrids(stages: list[tuple[int, ...]]) -> None:
    before: tuple[int, ...] = (0,) * len(stages[0])
    for variants in stages:
        made = step(before, variants)
        origin = {end: (start, variant) for variant, jobs in made.jobs.items() for start, end in jobs}
        assert sorted(end for jobs in made.jobs.values() for _, end in jobs) == list(range(made.state_count))
        assert [origin[node] for node in made.nodes] == list(zip(before, variants, strict=True))
        before = made.nodes


def test_a_step_groups_its_jobs_by_the_weights_they_need() -> None:
    assert step([0, 0, 1, 1, 1], [1, 0, 1, 1, 0]) == Step(
        jobs={1: [(0, 0), (1, 2)], 0: [(0, 1), (1, 3)]}, nodes=(0, 1, 2, 2, 3)
    )


@pytest.mark.parametrize("layers", [1, 2, 3, 8, 32])
def test_all_intervals_take_as_many_layer_evaluations_as_the_closed_form_says(layers: int) -> None:
    counts = count_states(intervals(layers))
    assert counts[0] == 1
    assert sum(counts[1:-1]) == layers + layers * (layers + 1) * (layers + 2) // 6
    assert counts[-1] == layers * (layers + 1) // 2 + 1
