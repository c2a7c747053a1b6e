"""Selection, compared with a brute-force reading of the paper's two equations, for arbitrary scores."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations_with_replacement

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slrmerge.errors import PlanError
from slrmerge.recipe.model import Recipe
from slrmerge.recipe.rules import Rules
from slrmerge.searching.candidates import CandidateInfo
from slrmerge.searching.selection import (
    NEAR_TIE,
    ScoredCandidate,
    Selection,
    finalists,
    mark_feasible,
    possibly_better,
    select_from,
    ten_best,
)
from tests.problems import refused
from tests.searching.pairs import POST, PRE, SOUP, interval, made_rows, row

SPANS = list(combinations_with_replacement(range(3), 2))
CANDIDATES = [
    POST, PRE, SOUP, CandidateInfo(space="soup", label="soup 0.25", rules=Rules(alpha=0.25), alpha=0.25),
    *(interval(*span) for span in SPANS),
    CandidateInfo(space="recipe", label="mine", rules=Rules(restore=((0, 0), (2, 2))), layers_restored=2),
]  # fmt: skip

some_quality = st.integers(0, 10).map(lambda tenth: tenth / 10)
some_diversity = st.integers(0, 10).map(lambda tenth: tenth / 5)
any_quality = st.floats(0, 1)
any_diversity = st.floats(0, 3)


def rows_with(
    quality: "st.SearchStrategy[float]", diversity: "st.SearchStrategy[float]"
) -> "st.SearchStrategy[list[ScoredCandidate]]":
    """A row for every candidate."""
    scores = st.lists(st.tuples(quality, diversity), min_size=len(CANDIDATES), max_size=len(CANDIDATES))
    return scores.map(lambda pairs: [row(c, q, d) for c, (q, d) in zip(CANDIDATES, pairs, strict=True)])


any_rows = rows_with(some_quality, some_diversity) | rows_with(any_quality, any_diversity)
any_ratio = st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.95, 1.0])


BASE = Recipe(pretrained="../pre", posttrained="../post", dtype="float16")


def marked(rows: Sequence[ScoredCandidate], min_quality: float) -> list[ScoredCandidate]:
    return mark_feasible(rows, post_quality={rows[0].conditions: rows[0].quality}, min_quality=min_quality)


def selected(rows: Sequence[ScoredCandidate], min_quality: float = 0.9) -> Selection:
    return select_from(marked(rows, min_quality), base=BASE, min_quality=min_quality)


def label(found: ScoredCandidate | None) -> str | None:
    return None if found is None else found.label


# the selection


@given(any_rows, any_ratio)
def test_the_selection_has_the_highest_diversity_of_the_intervals_with_enough_quality(
    rows: list[ScoredCandidate], ratio: float
) -> None:
    choice = selected(rows, ratio)
    for space, found in (("interval", choice.slr), ("soup", choice.soup)):
        enough = [each for each in rows if each.space == space and each.quality >= ratio * rows[0].quality]
        assert (found is None) == (not enough)
        if found is not None:
            best = max(each.diversity for each in enough)
            equal = [each for each in enough if each.diversity == best]
            first = min(equal, key=lambda each: (each.layers_restored, each.start or 0))
            assert (found.label, found.diversity, found.feasible) == (first.label, best, True)


@given(any_rows, any_ratio)
def test_feasible_candidates_have_enough_of_the_posttrained_models_quality(
    rows: list[ScoredCandidate], ratio: float
) -> None:
    found = marked(rows, ratio)
    assert [each.feasible for each in found] == [each.quality >= ratio * rows[0].quality for each in rows]
    assert [replace(each, feasible=False, pareto=False) for each in found] == rows
    assert found[0].feasible


def test_exactly_the_minimum_quality_is_enough() -> None:
    rows = made_rows({(0, 0): (0.9 * 0.96, 1.5), (1, 1): (0.9 * 0.96 - 1e-12, 1.9)})
    assert label(selected(rows).slr) == "layers 0–0"


@pytest.mark.parametrize(
    ("spans", "first"),
    [
        ([(0, 2), (1, 2), (2, 2)], "layers 2–2"),
        ([(1, 2), (0, 1)], "layers 0–1"),
        ([(2, 2), (0, 1), (1, 1)], "layers 1–1"),
    ],
)
def test_of_equal_diversity_the_shorter_and_then_the_earlier_interval_is_selected(
    spans: list[tuple[int, int]], first: str
) -> None:
    assert label(selected(made_rows(dict.fromkeys(spans, (0.95, 1.7)))).slr) == first


def test_the_controls_are_the_first_and_the_last_interval_of_the_same_length() -> None:
    scores = dict.fromkeys(combinations_with_replacement(range(5), 2), (0.9, 1.2)) | {(1, 3): (0.9, 1.9)}
    choice = selected(made_rows(scores))
    assert (label(choice.slr), label(choice.early), label(choice.late)) == ("layers 1–3", "layers 0–2", "layers 2–4")


def test_controls_may_be_infeasible() -> None:
    choice = selected(made_rows({(0, 0): (0.1, 2.5), (1, 1): (0.95, 1.2), (2, 2): (0.2, 2.6)}))
    assert (label(choice.slr), label(choice.early), label(choice.late)) == ("layers 1–1", "layers 0–0", "layers 2–2")


def test_an_interval_of_all_layers_is_its_own_control() -> None:
    choice = selected(made_rows({(0, 0): (0.9, 1.1), (1, 1): (0.9, 1.2), (0, 1): (0.95, 1.8)}))
    assert choice.early is choice.late is choice.slr


def test_without_a_feasible_interval_there_is_no_selection_and_no_control() -> None:
    choice = selected(made_rows({(0, 0): (0.2, 1.1), (1, 1): (0.3, 1.2)}))
    assert (choice.slr, choice.early, choice.late, choice.near_ties) == (None, None, None, ())
    assert list(choice.named()) == ["post", "soup", "pre"]


def test_without_intervals_there_is_no_selection() -> None:
    assert list(selected(made_rows({})).named()) == ["post", "soup", "pre"]


def test_named_candidates_are_in_the_order_of_the_table() -> None:
    assert list(selected(made_rows({(0, 0): (0.95, 1.5)})).named()) == ["post", "slr", "soup", "early", "late", "pre"]


def test_only_exactly_scored_candidates_are_selected() -> None:
    rows = made_rows({(0, 0): (0.95, 1.5), (1, 1): (0.95, 1.6)})
    rows[-1] = replace(rows[-1], exact=False)
    assert label(selected(rows).slr) == "layers 0–0"


def test_candidates_are_compared_with_the_posttrained_model_under_their_own_conditions() -> None:
    rows = [row(POST, 0.9, 1), row(interval(0, 0), 0.8, 1), row(interval(1, 1), 0.8, 1, prompts=8, dtype="bfloat16")]
    assert rows[2].conditions == "8 prompts, bfloat16"
    found = mark_feasible(rows, post_quality={"40 prompts, float32": 0.9, "8 prompts, bfloat16": 0.8}, min_quality=0.95)
    assert [each.feasible for each in found] == [True, False, True]


def test_intervals_of_almost_the_same_diversity_are_near_ties() -> None:
    near = {(0, 0): 1.7, (1, 1): 1.7 - 0.9 * NEAR_TIE, (2, 2): 1.7 - 1.1 * NEAR_TIE, (0, 1): 1.7}
    rows = made_rows({span: (0.95, diversity) for span, diversity in near.items()} | {(1, 2): (0.5, 1.6999)})
    choice = selected(rows)
    assert label(choice.slr) == "layers 0–0"
    assert [label(tie) for tie in choice.near_ties] == ["layers 1–1", "layers 0–1"]


@given(any_rows, any_ratio)
def test_the_ten_best_are_in_the_order_of_selection(rows: list[ScoredCandidate], ratio: float) -> None:
    found = marked(rows, ratio)
    best = ten_best(found)
    assert all(each.feasible and each.space in ("interval", "recipe") for each in best)
    assert [each.diversity for each in best] == sorted((each.diversity for each in best), reverse=True)
    assert len(best) == sum(each.feasible for each in found if each.space in ("interval", "recipe"))
    intervals = [each for each in best if each.space == "interval"]
    assert (intervals[0] if intervals else None) is select_from(found, base=BASE, min_quality=ratio).slr
    assert ten_best(found, 2) == best[:2]


# the front


@given(any_rows)
def test_the_pareto_front_is_what_no_candidate_of_its_space_exceeds(rows: list[ScoredCandidate]) -> None:
    for each in marked(rows, 0.9):
        space = each.space
        rivals = [other for other in rows if space in ("post", "pre") or other.space == space]
        beaten = any(
            other.quality >= each.quality
            and other.diversity >= each.diversity
            and (other.quality, other.diversity) != (each.quality, each.diversity)
            for other in rivals
        )
        assert each.pareto == (not beaten), each.label


# finalists


ON_THE_LINE = [row(c, 0.7 if i == 9 else 0.8 * (i == 0), 0.0) for i, c in enumerate(CANDIDATES)]
"""The tenth lacks exactly as much quality as scores may be wrong by."""


def shifted(each: ScoredCandidate, by: float) -> ScoredCandidate:
    """A row with both scores changed by the same amount."""
    return replace(each, quality=max(0, each.quality + by), diversity=each.diversity + by)


@given(any_rows, any_ratio, st.sampled_from([0.0, 0.01, 0.05, 0.2]))
@example(ON_THE_LINE, 1.0, 0.05)
def test_every_candidate_that_may_be_selected_within_the_margin_is_a_finalist_with_its_controls(
    rows: list[ScoredCandidate], ratio: float, margin: float
) -> None:
    again = finalists(rows, min_quality=ratio, margin=margin, at_least=0)
    for best in rows:
        space = best.space
        if space not in ("interval", "soup"):
            continue
        moved = [shifted(each, margin if each is best else -margin) for each in rows]
        choice = selected(moved, ratio)
        winner = choice.slr if space == "interval" else choice.soup
        if winner is not None and winner.label == best.label:
            needed: set[str | None] = {winner.label}
            needed |= {label(choice.early), label(choice.late)} if space == "interval" else set()
            assert needed <= {info.label for info in again}


@given(any_rows, any_ratio, st.integers(0, 8))
def test_each_space_has_a_minimum_number_of_finalists(rows: list[ScoredCandidate], ratio: float, at_least: int) -> None:
    again = finalists(rows, min_quality=ratio, margin=0.01, at_least=at_least)
    for space in ("interval", "soup"):
        hopeful = [each for each in rows if each.space == space and each.quality >= ratio * rows[0].quality]
        asked = [each for each in again if each.space == space]
        assert len(asked) >= min(at_least, len(hopeful))


def test_parents_and_recipes_are_always_finalists_and_in_order() -> None:
    mine = CandidateInfo(space="recipe", label="mine", rules=Rules(restore=((0, 0),)), layers_restored=1)
    rows = [
        *made_rows({(0, 0): (0.1, 0.1), (1, 1): (0.95, 1.9), (2, 2): (0.1, 0.1), (0, 2): (0.2, 0.2)}),
        row(mine, 0, 0),
    ]
    again = finalists(rows, min_quality=0.9, margin=0.01, at_least=0)
    assert [info.label for info in again] == [
        "post-trained", "pre-trained", "soup 0.50", "layers 0–0", "layers 1–1", "layers 2–2", "mine"
    ]  # fmt: skip


def test_candidates_that_cannot_be_selected_are_no_finalists() -> None:
    rows = made_rows({(0, 1): (0.95, 1.9), (1, 2): (0.95, 1.85), (0, 0): (0.95, 1.5), (1, 1): (0.7, 2.5)})
    again = finalists(rows, min_quality=0.9, margin=0.03, at_least=0)
    assert [info.label for info in again if info.space == "interval"] == ["layers 0–1", "layers 1–2"]


def test_candidates_with_other_labels_and_their_controls_are_finalists() -> None:
    rows = made_rows({(0, 0): (0.1, 0.1), (1, 1): (0.1, 0.2), (2, 2): (0.1, 0.1), (0, 2): (0.95, 1.9)})
    rows[4] = replace(rows[4], also_named=("mine",))
    again = finalists(rows, min_quality=0.9, margin=0.01, at_least=0)
    assert {"layers 0–0", "layers 1–1", "layers 2–2"} <= {info.label for info in again}


def test_rough_candidates_with_more_diversity_are_possibly_better() -> None:
    rows = made_rows({(0, 0): (0.95, 1.5), (1, 1): (0.95, 1.6), (2, 2): (0.95, 1.4), (0, 1): (0.2, 1.9)})
    rough = [replace(each, exact=False) if label(each) != "layers 0–0" and each.start is not None else each
             for each in rows]  # fmt: skip
    found = marked(rough, 0.9)
    assert [label(each) for each in possibly_better(found, selected(rough))] == ["layers 1–1"]


# recipes


def test_a_selections_recipe_has_the_pair_and_the_rules() -> None:
    choice = selected(made_rows({(0, 1): (0.95, 1.9)}))
    pair = {"pretrained": "../pre", "posttrained": "../post", "dtype": "float16"}
    assert choice.recipe.to_dict() == {**pair, "restore": [0, 1]}
    assert choice.recipe_for(choice.post).to_dict() == {**pair, "alpha": 0.0}
    assert choice.soup is not None
    assert choice.recipe_for(choice.soup).to_dict() == {**pair, "alpha": 0.5}


def test_without_a_selection_there_is_no_recipe() -> None:
    with refused(PlanError, "nothing-feasible"):
        _ = selected(made_rows({(0, 1): (0.1, 1.9)})).recipe


def test_a_mergekit_config_has_no_recipe() -> None:
    rows = [*made_rows({}), row(CandidateInfo(space="recipe", label="mergekit.yml", rules=Rules()), 0.9, 1)]
    with refused(PlanError, "not-a-recipe") as caught:
        selected(rows).recipe_for(rows[-1])
    assert caught.value.problems[0].where == "mergekit.yml"


def test_reprs_are_one_useful_line() -> None:
    assert "layers 0–1" in repr(selected(made_rows({(0, 1): (0.95, 1.9)})))
    for rows in (made_rows({}), made_rows({(0, 1): (0.95, 1.9)})):
        assert "\n" not in repr(selected(rows))
        assert len(repr(selected(rows))) < 100
