"""What counts as an accepted answer without a judge."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slrmerge.evaluate.matching import match_named, match_whole, names_of, normalise

STATES = [["Virginia", "VA"], ["West Virginia", "WV"], ["Indiana", "IN"], ["Côte d’Or"], ["The Bronx"], ["C"]]
NAMES = names_of(STATES)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Virginia", 0),
        ("  **virginia**.\n", 0),
        ("VA", 0),
        ("west-virginia!", 1),
        ("in", 2),
        ("Cote d'Or", 3),
        ("the bronx", 4),
        ("Bronx", 4),
        ("c", 5),
        ("Virginia Beach", None),
        ("It is Virginia", None),
        ("", None),
        ("…", None),
    ],
)
def test_a_whole_response_is_an_answer_in_any_of_its_names(response: str, answer: int | None) -> None:
    assert match_whole(response, NAMES) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("It is Virginia, of course.", 0),
        ("I'd say West Virginia", 1),
        ("West Virginia, not Virginia", None),
        ("Indiana, yes: Indiana!", 2),
        ("You find it in C", None),  # too short to count among other words
        ("virginian", None),
        ("none of them", None),
        ("", None),
    ],
)
def test_a_longer_response_counts_if_it_names_exactly_one(response: str, answer: int | None) -> None:
    assert match_named(response, NAMES) == answer


def test_a_name_that_two_answers_share_is_the_first_ones() -> None:
    assert names_of([["Georgia"], ["Georgia", "Sakartvelo"]]) == {"georgia": 0, "sakartvelo": 1}


def test_names_without_letters_are_none() -> None:
    assert names_of([["…", "A"], ["—"]]) == {"a": 0}


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    articles = once.split(" ", 1)[0] in ("the", "a", "an")
    assert articles or normalise(once) == once


@given(st.text(), st.sampled_from(sorted(NAMES)))
def test_whatever_is_wholly_a_name_is_matched_with_any_marks_around_it(marks: str, name: str) -> None:
    around = "".join(c for c in marks if not normalise(c))
    assert match_whole(around + name.upper() + around, NAMES) == NAMES[name]
