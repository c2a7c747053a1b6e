"""The choice, held against the paper's two equations in brute force, whatever the scores."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations_with_replacement

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slrmerge.search.candidates import Candidate
from slrmerge.search.choose import NEAR_TIE, Choice, Row, choose, conditions, judge, leaders, ten_best
from tests.search.pairs import POST, PRE, SOUP, interval, made_rows, row

SPANS = list(combinations_with_replacement(range(3), 2))
CANDIDATES = [
    POST, PRE, SOUP, Candidate("soup", {"alpha": 0.25}, "soup 0.25", alpha=0.25),
    *(interval(*span) for span in SPANS),
    Candidate("recipe", {"restore": [0, 2]}, "mine", layers_restored=3),
]  # fmt: skip

some_quality = st.integers(0, 10).map(lambda tenth: tenth / 10)
some_diversity = st.integers(0, 10).map(lambda tenth: tenth / 5)
any_quality = st.floats(0, 1)
any_diversity = st.floats(0, 3)


def rows_with(
    quality: "st.SearchStrategy[float]", diversity: "st.SearchStrategy[float]"
) -> "st.SearchStrategy[list[Row]]":
    """A row for every candidate."""
    scores = st.lists(st.tuples(quality, diversity), min_size=len(CANDIDATES), max_size=len(CANDIDATES))
    return scores.map(lambda pairs: [row(c, q, d) for c, (q, d) in zip(CANDIDATES, pairs, strict=True)])


any_rows = rows_with(some_quality, some_diversity) | rows_with(any_quality, any_diversity)
any_ratio = st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.95, 1.0])


def judged(rows: Sequence[Row], min_quality: float) -> list[Row]:
    return judge(rows, post_quality={conditions(rows[0]): rows[0].quality}, min_quality=min_quality)


def chosen(rows: Sequence[Row], min_quality: float = 0.9) -> Choice:
    return choose(judged(rows, min_quality), min_quality=min_quality)


def label(found: Row | None) -> str | None:
    return found and found.candidate.label


# the choice


@given(any_rows, any_ratio)
def test_the_choice_is_the_interval_with_the_highest_diversity_among_those_of_enough_quality(
    rows: list[Row], ratio: float
) -> None:
    choice = chosen(rows, ratio)
    for space, found in (("interval", choice.slr), ("soup", choice.soup)):
        enough = [each for each in rows if each.candidate.space == space and each.quality >= ratio * rows[0].quality]
        assert (found is None) == (not enough)
        if found is not None:
            best = max(each.diversity for each in enough)
            equal = [each.candidate for each in enough if each.diversity == best]
            first = min(equal, key=lambda candidate: (candidate.layers_restored, candidate.start or 0))
            assert (found.candidate, found.diversity, found.feasible) == (first, best, True)


@given(any_rows, any_ratio)
def test_feasible_means_enough_of_the_post_trained_models_quality(rows: list[Row], ratio: float) -> None:
    found = judged(rows, ratio)
    assert [each.feasible for each in found] == [each.quality >= ratio * rows[0].quality for each in rows]
    assert [replace(each, feasible=False, pareto=False) for each in found] == rows
    assert found[0].feasible


def test_exactly_enough_is_enough() -> None:
    rows = made_rows({(0, 0): (0.9 * 0.96, 1.5), (1, 1): (0.9 * 0.96 - 1e-12, 1.9)})
    assert label(chosen(rows).slr) == "layers 0–0"


@pytest.mark.parametrize(
    ("spans", "first"),
    [
        ([(0, 2), (1, 2), (2, 2)], "layers 2–2"),
        ([(1, 2), (0, 1)], "layers 0–1"),
        ([(2, 2), (0, 1), (1, 1)], "layers 1–1"),
    ],
)
def test_equal_diversity_goes_to_the_shorter_and_then_to_the_earlier_interval(
    spans: list[tuple[int, int]], first: str
) -> None:
    assert label(chosen(made_rows(dict.fromkeys(spans, (0.95, 1.7)))).slr) == first


def test_the_controls_are_the_first_and_the_last_interval_of_the_choices_length() -> None:
    scores = dict.fromkeys(combinations_with_replacement(range(5), 2), (0.9, 1.2)) | {(1, 3): (0.9, 1.9)}
    choice = chosen(made_rows(scores))
    assert (label(choice.slr), label(choice.early), label(choice.late)) == ("layers 1–3", "layers 0–2", "layers 2–4")


def test_controls_need_not_have_enough_quality() -> None:
    choice = chosen(made_rows({(0, 0): (0.1, 2.5), (1, 1): (0.95, 1.2), (2, 2): (0.2, 2.6)}))
    assert (label(choice.slr), label(choice.early), label(choice.late)) == ("layers 1–1", "layers 0–0", "layers 2–2")


def test_an_interval_of_all_layers_is_its_own_control() -> None:
    choice = chosen(made_rows({(0, 0): (0.9, 1.1), (1, 1): (0.9, 1.2), (0, 1): (0.95, 1.8)}))
    assert choice.early is choice.late is choice.slr


def test_without_enough_quality_anywhere_there_is_no_choice_and_no_control() -> None:
    choice = chosen(made_rows({(0, 0): (0.2, 1.1), (1, 1): (0.3, 1.2)}))
    assert (choice.slr, choice.early, choice.late, choice.near_ties) == (None, None, None, ())
    assert list(choice.named()) == ["post", "soup", "pre"]


def test_without_intervals_there_is_no_choice() -> None:
    assert list(chosen(made_rows({})).named()) == ["post", "soup", "pre"]


def test_the_named_rows_come_in_the_order_of_the_table() -> None:
    assert list(chosen(made_rows({(0, 0): (0.95, 1.5)})).named()) == ["post", "slr", "soup", "early", "late", "pre"]


def test_only_what_was_asked_exactly_is_chosen() -> None:
    rows = made_rows({(0, 0): (0.95, 1.5), (1, 1): (0.95, 1.6)})
    rows[-1] = replace(rows[-1], exact=False)
    assert label(chosen(rows).slr) == "layers 0–0"


def test_rows_are_held_against_the_post_trained_model_under_their_own_conditions() -> None:
    rows = [row(POST, 0.9, 1), row(interval(0, 0), 0.8, 1), row(interval(1, 1), 0.8, 1, prompts=8, dtype="bfloat16")]
    assert conditions(rows[2]) == "8 prompts, bfloat16"
    found = judge(rows, post_quality={"40 prompts, float32": 0.9, "8 prompts, bfloat16": 0.8}, min_quality=0.95)
    assert [each.feasible for each in found] == [True, False, True]


def test_intervals_of_almost_the_same_diversity_are_near_ties() -> None:
    near = {(0, 0): 1.7, (1, 1): 1.7 - 0.9 * NEAR_TIE, (2, 2): 1.7 - 1.1 * NEAR_TIE, (0, 1): 1.7}
    rows = made_rows({span: (0.95, diversity) for span, diversity in near.items()} | {(1, 2): (0.5, 1.6999)})
    choice = chosen(rows)
    assert label(choice.slr) == "layers 0–0"
    assert [label(tie) for tie in choice.near_ties] == ["layers 1–1", "layers 0–1"]


@given(any_rows, any_ratio)
def test_the_ten_best_are_in_the_order_of_the_choice(rows: list[Row], ratio: float) -> None:
    found = judged(rows, ratio)
    best = ten_best(found)
    assert all(each.feasible and each.candidate.space in ("interval", "recipe") for each in best)
    assert [each.diversity for each in best] == sorted((each.diversity for each in best), reverse=True)
    assert len(best) == sum(each.feasible for each in found if each.candidate.space in ("interval", "recipe"))
    intervals = [each for each in best if each.candidate.space == "interval"]
    assert (intervals[0] if intervals else None) is choose(found, min_quality=ratio).slr
    assert ten_best(found, 2) == best[:2]


# the front


@given(any_rows)
def test_the_front_is_what_nothing_in_its_space_beats(rows: list[Row]) -> None:
    for each in judged(rows, 0.9):
        space = each.candidate.space
        rivals = [other for other in rows if space in ("post", "pre") or other.candidate.space == space]
        beaten = any(
            other.quality >= each.quality
            and other.diversity >= each.diversity
            and (other.quality, other.diversity) != (each.quality, each.diversity)
            for other in rivals
        )
        assert each.pareto == (not beaten), each.candidate.label


# whom to ask again


ON_THE_LINE = [row(c, 0.7 if i == 9 else 0.8 * (i == 0), 0.0) for i, c in enumerate(CANDIDATES)]
"""The tenth has exactly as much less than it needs as scores may move."""


def shifted(each: Row, by: float) -> Row:
    """A row whose scores turn out higher, or lower, than they were."""
    return replace(each, quality=max(0, each.quality + by), diversity=each.diversity + by)


@given(any_rows, any_ratio, st.sampled_from([0.0, 0.01, 0.05, 0.2]))
@example(ON_THE_LINE, 1.0, 0.05)
def test_whatever_may_win_within_the_margin_is_asked_again_with_its_controls(
    rows: list[Row], ratio: float, margin: float
) -> None:
    again = leaders(rows, min_quality=ratio, margin=margin, at_least=0)
    for best in rows:
        space = best.candidate.space
        if space not in ("interval", "soup"):
            continue
        moved = [shifted(each, margin if each is best else -margin) for each in rows]
        choice = chosen(moved, ratio)
        winner = choice.slr if space == "interval" else choice.soup
        if winner is not None and winner.candidate == best.candidate:
            needed = {winner.candidate.label}
            needed |= {label(choice.early), label(choice.late)} if space == "interval" else set()
            assert needed <= {candidate.label for candidate in again}


@given(any_rows, any_ratio, st.integers(0, 8))
def test_of_each_space_so_many_are_asked_again_at_least(rows: list[Row], ratio: float, at_least: int) -> None:
    again = leaders(rows, min_quality=ratio, margin=0.01, at_least=at_least)
    for space in ("interval", "soup"):
        hopeful = [each for each in rows if each.candidate.space == space and each.quality >= ratio * rows[0].quality]
        asked = [each for each in again if each.space == space]
        assert len(asked) >= min(at_least, len(hopeful))


def test_both_models_and_peoples_own_recipes_are_always_asked_again_and_in_order() -> None:
    mine = Candidate("recipe", {"restore": [0, 0]}, "mine", layers_restored=1)
    rows = [
        *made_rows({(0, 0): (0.1, 0.1), (1, 1): (0.95, 1.9), (2, 2): (0.1, 0.1), (0, 2): (0.2, 0.2)}),
        row(mine, 0, 0),
    ]
    again = leaders(rows, min_quality=0.9, margin=0.01, at_least=0)
    assert [candidate.label for candidate in again] == [
        "post-trained", "pre-trained", "soup 0.50", "layers 0–0", "layers 1–1", "layers 2–2", "mine"
    ]  # fmt: skip


def test_what_is_far_behind_is_not_asked_again() -> None:
    rows = made_rows({(0, 1): (0.95, 1.9), (1, 2): (0.95, 1.85), (0, 0): (0.95, 1.5), (1, 1): (0.7, 2.5)})
    again = leaders(rows, min_quality=0.9, margin=0.03, at_least=0)
    assert [candidate.label for candidate in again if candidate.space == "interval"] == ["layers 0–1", "layers 1–2"]
