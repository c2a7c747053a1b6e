"""Proxy tasks: the forty questions of CRC, word for word; scores worked out by hand; tasks that YAML files define."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from slrmerge.errors import DataError, OptionError
from slrmerge.io.options import options_of
from slrmerge.searching.options import SearchOptions
from slrmerge.searching.proxy_tasks import TASKS, ConstrainedRandomCharacter, Question, load_task, make_task
from tests.documentation import DOCS, blocks
from tests.problems import refused

NAN = math.nan
TASK = ConstrainedRandomCharacter()

DIGITS = "0-4 0-5 0-7 0-9 1-5 1-6 1-8 1-9 2-5 2-7 2-8 3-6 3-7 3-8 4-7 4-8 4-9 5-8 5-9 6-9"
LETTERS = "A-K B-M B-S C-H C-K C-L D-P E-Z G-T I-N I-Q I-Y J-W L-U N-R N-V P-T P-W T-W U-Z"


def score(*prompts: list[float]) -> tuple[list[float], list[float]]:
    """Q and D of one candidate whose valid answers have these probabilities."""
    with np.errstate(divide="ignore"):
        scores = TASK.score(np.log(np.array([prompts])))
    assert scores.quality.dtype == scores.diversity.dtype == np.float64
    assert scores.quality.shape == scores.diversity.shape == (1, len(prompts))
    return scores.quality[0].tolist(), scores.diversity[0].tolist()


def test_the_questions_are_the_same_forty_in_every_run() -> None:
    digits = [
        f"Generate a random integer in the range [{low}, {high}]. Do not include anything else in your reply."
        for low, high in (ends.split("-") for ends in DIGITS.split())
    ]
    letters = [
        f"Generate a random letter from {low} to {high} (inclusive). Do not include anything else in your reply."
        for low, high in (ends.split("-") for ends in LETTERS.split())
    ]
    assert [question.text for question in TASK.questions()] == digits + letters
    assert len(digits) == len(letters) == 20
    assert TASKS["crc"]().questions() == TASK.questions()


def test_the_answers_are_every_character_of_the_range() -> None:
    for question, ends in zip(TASK.questions(), f"{DIGITS} {LETTERS}".split(), strict=True):
        low, high = ends.split("-")
        assert list(question.answers) == [chr(code) for code in range(ord(low), ord(high) + 1)]
        assert len(question.answers) >= 4


def test_questions_are_distinct() -> None:
    texts = [question.text for question in TASK.questions()]
    assert len(set(texts)) == len(texts) == 40


def test_held_out_questions_are_about_other_ranges_in_other_words() -> None:
    asked, held_out = TASK.questions(), TASK.held_out_questions()
    assert held_out == TASKS["crc"]().held_out_questions()
    assert len({question.text for question in held_out}) == 40
    assert {question.answers for question in held_out}.isdisjoint(question.answers for question in asked)
    digits = [question for question in held_out if question.answers[0].isdigit()]
    assert (len(digits), len({question.answers for question in digits})) == (20, 8)  # 28 ranges, 20 of them asked
    letters = [question for question in held_out if question.answers[0].isupper()]
    assert (len(letters), len({question.answers for question in letters})) == (20, 20)
    for question in held_out:
        first, last = question.answers[0], question.answers[-1]
        assert list(question.answers) == [chr(code) for code in range(ord(first), ord(last) + 1)]
        assert len(question.answers) >= 4
        assert re.search(rf"\b{first}\b.*\b{last}\b", question.text)
    wordings = {re.sub(r"\b[A-Z0-9]\b", "", question.text) for question in held_out}
    assert len(wordings) == 6
    assert wordings.isdisjoint(re.sub(r"\b[A-Z0-9]\b", "", question.text) for question in asked)


def test_quality_is_the_probability_of_valid_answers_and_diversity_their_entropy() -> None:
    quality, diversity = score([0.25, 0.25, 0.25, 0.25], [0.3, 0.1, 0.0, 0.0], [0.0, 0.9, 0.0, 0.0])
    assert quality == pytest.approx([1.0, 0.4, 0.9], abs=1e-12)
    assert diversity == pytest.approx([math.log(4), -0.75 * math.log(0.75) - 0.25 * math.log(0.25), 0.0], abs=1e-12)


def test_diversity_depends_on_shares_not_on_the_total_probability() -> None:
    _, diversity = score([0.4, 0.2, 0.2], [0.004, 0.002, 0.002], [4e-200, 2e-200, 2e-200])
    assert diversity == pytest.approx([1.5 * math.log(2)] * 3, abs=1e-12)


def test_nan_past_a_prompts_own_answers_is_ignored() -> None:
    padded, alone = score([0.25, 0.5, NAN, NAN], [0.1, 0.2, 0.3, 0.4]), score([0.25, 0.5])
    assert (padded[0][0], padded[1][0]) == (alone[0][0], alone[1][0])
    assert padded[0][0] == pytest.approx(0.75, abs=1e-12)
    assert padded[1][0] == pytest.approx(math.log(3) - 2 / 3 * math.log(2), abs=1e-12)
    assert padded[0][1] == pytest.approx(1.0, abs=1e-12)


def test_no_probability_on_valid_answers_is_zero_quality_and_zero_diversity() -> None:
    assert score([0.0, 0.0, 0.0], [0.0, 0.0, NAN]) == ([0.0, 0.0], [0.0, 0.0])


def test_a_certain_answer_has_zero_diversity() -> None:
    assert score([1.0, 0.0, 0.0]) == ([1.0], [0.0])


def test_candidates_and_prompts_are_scored_independently() -> None:
    rng = np.random.default_rng(0)
    log_probs: NDArray[np.float64] = np.log(rng.dirichlet(np.ones(6), size=(3, 4))[..., :5])
    together = TASK.score(log_probs)
    for candidate in range(3):
        for prompt in range(4):
            alone = TASK.score(log_probs[candidate : candidate + 1, prompt : prompt + 1])
            assert alone.quality.item() == together.quality[candidate, prompt]
            assert alone.diversity.item() == together.diversity[candidate, prompt]


# tasks in YAML


def task_file(folder: Path, text: str) -> Path:
    path = folder / "task.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_lists_questions_and_ranges(tmp_path: Path) -> None:
    text = """
questions:
  - text: "Heads or tails?"
    answers: [heads, tails]
ranges:
  - text: "A day from {first} to {last}?"
    values: [Monday, Tuesday, Wednesday]
    shortest: 2
"""
    assert make_task(str(task_file(tmp_path, text))).questions() == (
        Question("Heads or tails?", ("heads", "tails")),
        Question("A day from Monday to Tuesday?", ("Monday", "Tuesday")),
        Question("A day from Monday to Wednesday?", ("Monday", "Tuesday", "Wednesday")),
        Question("A day from Tuesday to Wednesday?", ("Tuesday", "Wednesday")),
    )


def test_held_out_questions_are_listed_or_of_the_ranges_that_are_not_asked(tmp_path: Path) -> None:
    text = """
questions: [{text: "Heads or tails?", answers: [heads, tails]}]
ranges:
  - {text: "{first}-{last}", values: [a, b, c, d], shortest: 2, count: 4}
  - text: From {first} to {last}?
    values: [a, b, c]
    shortest: 2
    count: 2
    held_out_texts: ["{first}, {last}?", "{last}, {first}?"]
held_out: [{text: "Tails or heads?", answers: [heads, tails]}]
"""
    task = make_task(str(task_file(tmp_path, text)))
    listed, *others = task.held_out_questions()
    assert listed == Question("Tails or heads?", ("heads", "tails"))
    asked = {question.text for question in task.questions()}
    assert len(asked) == 7
    every = {"a-b", "a-c", "a-d", "b-c", "b-d", "c-d"}
    assert {question.text for question in others[:2]} == every - asked
    (rest,) = {"From a to b?", "From a to c?", "From b to c?"} - asked
    ends = rest[5], rest[-2]
    assert [question.text for question in others[2:]] == [f"{ends[0]}, {ends[1]}?", f"{ends[1]}, {ends[0]}?"]


def test_the_task_in_the_documentation_is_valid(tmp_path: Path) -> None:
    (text,) = blocks(DOCS / "search.md", "yaml")
    questions = load_task(task_file(tmp_path, text)).questions()
    assert len(questions) > 2
    assert {len(question.answers) for question in questions} > {2}


def test_count_limits_the_questions_of_ranges(tmp_path: Path) -> None:
    text = 'ranges: [{text: "{first}-{last}", values: [a, b, c, d, e], shortest: 2, count: 3}]'
    questions = load_task(task_file(tmp_path, text)).questions()
    assert len(questions) == 3
    assert questions == load_task(task_file(tmp_path, text)).questions()


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("questions: []", ["empty"]),
        ("question: []", ["unknown-key"]),
        ("- a", ["wrong-type"]),
        ("questions: [{text: a, answers: [x]}]", ["too-few-answers"]),
        ("questions: [{text: a, answers: [x, y, x]}]", ["duplicate"]),
        ("questions: [{text: a, answers: [1, 2]}]", ["wrong-type"]),
        ("questions: [{text: a, answers: [true, x]}]", ["wrong-type"]),
        ("questions: [{text: a, answers: [' x', y]}]", ["invalid-value"]),
        ("questions: [{text: '', answers: ['', y]}]", ["empty"]),
        ("questions: [{text: a, answers: [x, y]}, {text: a, answers: [x, z]}]", ["duplicate"]),
        ("questions: [{text: a, answers: [x, y]}]\nheld_out: [{text: a, answers: [x, z]}]", ["duplicate"]),
        ("held_out: [{text: a, answers: [x, z]}]", ["empty"]),
        ("ranges: [{text: '{first}', values: [a, b, c, d]}]", ["no-place"]),
        ("ranges: [{text: '{first}{last}', values: [a, b, c, d], held_out_texts: ['{last}']}]", ["no-place"]),
        ("ranges: [{text: '{first} {last}', values: [a, b, c]}]", ["out-of-range"]),
        ("questions: [{text: a}, {answers: [1, x], colour: red}]", ["missing-key", "wrong-type", "unknown-key"]),
    ],
)
def test_an_invalid_task_is_refused_with_every_problem(tmp_path: Path, text: str, codes: list[str]) -> None:
    path = task_file(tmp_path, text)
    with pytest.raises(DataError) as caught:
        load_task(path)
    assert {problem.code for problem in caught.value.problems} == set(codes)
    assert all(problem.where.startswith(str(path)) for problem in caught.value.problems)


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with refused(DataError, "task-unreadable"):
        make_task(str(tmp_path / "nothing.yaml"))


def test_a_word_that_is_neither_a_task_nor_a_file_is_refused() -> None:
    with refused(OptionError, "invalid-choice"):
        SearchOptions(task="month")
    assert SearchOptions(task="month.yaml").task == "month.yaml"
    assert SearchOptions(task=Path("month.yml")).task == "month.yml"  # type: ignore[arg-type]  # also a path


# every task


def test_every_task_is_a_choice_of_the_option() -> None:
    assert set(options_of(SearchOptions)["task"].choices) == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_questions_of_a_task_are_reproducible_distinct_and_have_several_answers(name: str) -> None:
    task = TASKS[name]()
    assert len(task.questions()) > 0
    assert len(task.held_out_questions()) >= len(task.questions())
    questions = (*task.questions(), *task.held_out_questions())
    assert questions == (*TASKS[name]().questions(), *TASKS[name]().held_out_questions())
    assert len({question.text for question in questions}) == len(questions) > 0
    for question in questions:
        assert len(set(question.answers)) == len(question.answers) > 1
        assert all(answer.strip() == answer != "" for answer in question.answers)


@pytest.mark.parametrize("name", TASKS)
def test_scores_of_a_task_are_finite_and_a_uniform_distribution_is_at_least_as_diverse(name: str) -> None:
    task = TASKS[name]()
    answers = [len(question.answers) for question in task.questions()]
    log_probs = np.full((3, len(answers), max(answers)), np.nan)
    for prompt, count in enumerate(answers):
        log_probs[0, prompt, :count] = math.log(0.9 / count)
        log_probs[1, prompt, :count] = np.log(0.9 * np.random.default_rng(prompt).dirichlet(np.ones(count)))
        log_probs[2, prompt, :count] = -np.inf
    scores = task.score(log_probs)
    assert scores.quality.shape == scores.diversity.shape == (3, len(answers))
    assert np.isfinite(scores.quality).all()
    assert (scores.diversity[0] >= scores.diversity[1]).all()
    assert (scores.diversity >= 0).all()
    assert (scores.quality[2] == 0).all()
