"""Which number a solution ends in."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slrmerge.evaluation.answers import final_number


@pytest.mark.parametrize(
    ("solution", "number"),
    [
        ("Janet has 16 - 3 - 4 = 9 eggs.\n#### 18", 18),
        ("#### 1,234", 1234),
        ("so #### 7 apples, not 8", 7),
        ("first #### 3, then #### 4", 4),
        ("The answer is $1,234.50.", Fraction("1234.5")),
        ("She pays $.50", Fraction("0.5")),
        ("It costs −3", -3),
        ("It costs -$3.", -3),
        ("10-3", 3),
        ("5 - 3 = 2.", 2),
        ("f(x) -3", -3),
        ("(2)-3", 3),
        ("3/4 of it", Fraction(3, 4)),
        (r"\boxed{42} is what we get, in 2 steps", 42),
        (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        (r"\boxed{x = \$1{,}200}", 1200),
        (r"first \boxed{1}, finally \boxed{2}", 2),
        ("18.00", 18),
        ("1,2345", 2345),
        ("**72%**", 72),
        ("10 / 0", 0),
        ("1/0", None),
        ("no number at all", None),
        ("####", None),
        ("#### Step 1: eggs\n16 - 7 = 9\n#### Step 2: sell\n9 * 2 = 18", 18),
        (r"\boxed{18}####", 18),
        ("\\boxed{18}\n#### Step 3: check", 18),
        ("**Answer: 18** per day for 7 days", 18),
        ("The answer is 3 hours (or 180 minutes).", 3),
        ("Final answer: 18 [1]", 18),
        ("My answer to 3 questions is 4", 4),
        (r"\boxed{118\,000}", 118000),
        ("12\u202f000", 12000),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        ("9" * 10_000, None),
        ("4 of " + "1" + ",000" * 1500, 4),
        ("4 of 5/" + "7" * 4400, 4),
        ("", None),
    ],
)
def test_the_number_that_counts(solution: str, number: int | Fraction | None) -> None:
    assert final_number(solution) == number


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "= {}.", "${}!", "is {}\n", "**{:,}**"]))
def test_any_integer_is_read_as_people_write_it(number: int, form: str) -> None:
    assert final_number("We take 3 of 4: " + form.format(number)) == number


@given(st.decimals(-(10**6), 10**6, places=3))
def test_decimals_are_exact(number: object) -> None:
    assert final_number(f"It is {number}.") == Fraction(str(number))


@pytest.mark.parametrize(
    "unit",
    ["-", "1 ", "1,111", "1/", "{}", "\\boxed{", "\\boxed{}", "\\boxed{1}", "\\frac{1", "####", "#### ", "answer: "],
)
@pytest.mark.parametrize("before", ["", "\\boxed{"])
def test_a_solution_of_200_000_characters_is_read_in_linear_time(unit: str, before: str) -> None:
    solution = before + unit * (200_000 // len(unit))
    assert isinstance(final_number(solution), Fraction | None)
    assert final_number(f"{solution} #### 5") == 5


@given(st.text(alphabet="0123456789.,-−$/#\\boxed{}frac ", max_size=400))
def test_nothing_breaks_it(text: str) -> None:
    assert isinstance(final_number(text), Fraction | None)
