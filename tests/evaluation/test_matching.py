"""What counts as an accepted answer without a judge."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slrmerge.evaluation.matching import SYMBOL_LENGTH, match_stated, match_whole, names_of, normalise

STATES = [["Virginia", "VA"], ["West Virginia", "WV"], ["Indiana", "IN"], ["Côte d’Or"], ["The Bronx"], ["C"]]
NAMES = names_of(STATES)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Virginia", 0),
        ("  **virginia**.\n", 0),
        ("VA", 0),
        ("west-virginia!", 1),
        ("IN", 2),
        ("Cote d'Or", 3),
        ("the bronx", 4),
        ("Bronx", 4),
        ("C", 5),
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
        ("It is Virginia.", 0),
        ("I'd say West Virginia", 1),
        ("The answer is **Indiana**!", 2),
        ("Answer: VA", 0),
        ("Answer: va", None),
        ("A state could be “Indiana” (IN).", 2),
        ("Virginia (VA)", 0),
        ("It is the Bronx", 4),
        ("It is C", 5),
        ("Virginia Beach", None),
        ("It is Virginia Beach", None),
        ("Northern Virginia", None),
        ("It is not Virginia", None),
        ("I cannot name Virginia", None),
        ("Virginia is what I say", None),
        ("virginian", None),
        ("West Virginia West Virginia", None),
        ("none of them", None),
        ("", None),
        ("…", None),
    ],
)
def test_a_longer_response_counts_if_it_ends_in_an_answer_and_says_so(response: str, answer: int | None) -> None:
    assert match_stated(response, NAMES) == answer


@pytest.mark.parametrize("word", ["in", "In", "wv", "Va", "c"])
def test_a_symbol_counts_only_as_it_is_written(word: str) -> None:
    assert match_whole(word, NAMES) is None


def test_a_letter_is_no_article_where_it_would_leave_but_one_behind() -> None:
    names = names_of([["The A's"], ["S"], ["A Star"]])
    assert [match_whole(text, names) for text in ("A's", "S", "star", "the a's")] == [0, 1, 2, 0]


def test_a_name_that_two_answers_share_is_the_first_ones() -> None:
    assert names_of([["Georgia"], ["Georgia", "Sakartvelo"]]) == {"georgia": 0, "sakartvelo": 1}


def test_names_without_letters_are_none() -> None:
    assert names_of([["…", "A"], ["—"]]) == {"A": 0}


@pytest.mark.parametrize("unit", ["-", "()", "(", " ", ":", "a-", "a'", '"', "is ", "\u0301\u0327", "é"])
@pytest.mark.parametrize("before", ["", "It is Virginia "])
def test_a_response_of_200_000_characters_is_matched_in_linear_time(unit: str, before: str) -> None:
    response = before + unit * (200_000 // len(unit))
    assert match_stated(response, NAMES) is None or unit in " é"
    assert match_stated(f"{response}: Virginia.", NAMES) == 0
    assert match_whole(response, NAMES) is None


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    articles = once.split(" ", 1)[0] in ("the", "a", "an")
    assert articles or normalise(once) == once


@given(st.text(), st.sampled_from(sorted(NAMES)))
def test_whatever_is_wholly_a_name_is_matched_with_any_marks_around_it(marks: str, name: str) -> None:
    around = "".join(c for c in marks if not normalise(c))
    written = name if len(name) <= SYMBOL_LENGTH else name.upper()
    assert match_whole(around + written + around, NAMES) == NAMES[name]
