"""How answers are read: lm-evaluation-harness's filters give what its task definition says, math-verify compares."""

import re
import threading
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slrmerge.evaluation.answers import READERS, Reading, by_math_verify, flexible_extract, strict_match
from slrmerge.evaluation.options import EvaluationOptions
from slrmerge.io.options import options_of

# From lm_eval/tasks/gsm8k/gsm8k.yaml, version 3.0: each filter's regular expression and the match that it selects, and
# what `exact_match` removes from both sides, one after the other.
FILTERS = {
    "strict-match": (r"#### (\-?[0-9\.\,]+)", 0),
    "flexible-extract": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
}
IGNORED = (r",", r"\$", r"(?s).*#### ", r"\.$")


def defined(name: str, solution: str, reference: str) -> bool:
    """Whether the task definition calls a solution correct, word for word."""
    pattern, selected = FILTERS[name]
    found = re.findall(pattern, solution)
    answer = found[selected] if found else "[invalid]"
    sides = [answer if isinstance(answer, str) else next(filter(None, answer)), reference]
    for ignored in IGNORED:
        sides = [re.sub(ignored, "", side) for side in sides]
    return sides[0] == sides[1]


PIECES = [
    "#### ",
    "####",
    "18",
    "-18",
    "1,800",
    "$18",
    "18.",
    "18.00",
    ".",
    ",",
    "$",
    "-",
    " ",
    "\n",
    "eggs",
    "= 18",
    "%",
]


@pytest.mark.parametrize("name", FILTERS)
@given(st.lists(st.sampled_from(PIECES), max_size=8), st.sampled_from([18, -18, 1800]))
def test_the_filters_are_those_of_the_task_definition(name: str, pieces: list[str], answer: int) -> None:
    solution = "".join(pieces)
    is_correct = READERS[name](solution, Fraction(answer)).is_correct
    assert is_correct == defined(name, solution, f"A worked solution.\n#### {answer:,}")


@pytest.mark.parametrize(
    ("solution", "strict", "flexible"),
    [
        ("She sells 9 eggs.\n#### 18", ("18", True), ("18", True)),
        ("#### 18\nShe has 3 left.", ("18", True), ("3", False)),
        ("The answer is $18.", (None, False), ("18", True)),
        ("#### $18", (None, False), ("18", True)),
        ("It costs 18.00", (None, False), ("18.00", False)),
        ("none", (None, False), (None, False)),
    ],
)
def test_what_the_filters_read(solution: str, strict: tuple[str, bool], flexible: tuple[str, bool]) -> None:
    assert (strict_match(solution, Fraction(18)), flexible_extract(solution, Fraction(18))) == (strict, flexible)


def test_decimal_answers_are_compared_as_they_are_written() -> None:
    assert strict_match("#### 0.5", Fraction(1, 2)).is_correct
    assert flexible_extract("1,000,000", Fraction(10**6)).is_correct
    assert strict_match(f"#### {2**100}", Fraction(2**100)).is_correct


@pytest.mark.parametrize(
    ("solution", "answer", "is_correct"),
    [
        (r"The answer is $\frac{6}{8}$.", r"\frac{3}{4}", True),
        ("It is 0.75.", r"$\frac{3}{4}$", True),
        (r"\boxed{\{2, 1\}}", r"\boxed{\{1, 2\}}", True),
        (r"\boxed{(0, 1]}", "(0, 1)", False),
        ("I do not know.", "3", False),
    ],
)
def test_math_verify_compares_expressions(solution: str, answer: str, is_correct: bool) -> None:
    assert by_math_verify(solution, answer).is_correct == is_correct


def test_math_verify_gives_up_on_an_expression_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrmerge.evaluation.answers.LIMIT_S", 1)
    assert not by_math_verify("$9^{9^{9^9}}$", "3").is_correct


def test_math_verify_works_in_a_thread_which_has_no_alarms() -> None:
    found: list[Reading] = []
    thread = threading.Thread(target=lambda: found.append(by_math_verify(r"\boxed{\frac{2}{4}}", "0.5")))
    thread.start()
    thread.join()
    assert found == [(r"\frac{2}{4}", True)]


def test_the_option_names_every_reader() -> None:
    assert options_of(EvaluationOptions)["extract"].choices == tuple(READERS)
