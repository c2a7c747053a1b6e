"""Rows of files of every form, and rows that a task cannot use."""

import json
from pathlib import Path
from typing import Any

import pytest

from slrmerge.errors import DataError
from slrmerge.evaluate.matching import match_stated, match_whole, names_of, normalise
from slrmerge.evaluate.numbers import final_number
from slrmerge.evaluate.questions import Question, Row, prompt_id, questions_of, read_data
from slrmerge.evaluate.tasks import TASKS
from slrmerge.evaluate.tasks.creative import Request
from slrmerge.evaluate.tasks.open_qa import OpenQuestion
from slrmerge.evaluate.tasks.reasoning import WordProblem

STATE, ELEMENT = "Name a state.", "Name an element."
ANSWERS = (("Ohio", "OH"), ("Utah",))


def written(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps({STATE: {"answers": [["Ohio", "OH"], "Utah"]}})),
        ("a.json", json.dumps({STATE: [["Ohio", "OH"], ["Utah"]]})),
        ("a.json", json.dumps([{"question": STATE, "answers": [["Ohio", "OH"], "Utah"], "more": 1}])),
        ("a.jsonl", json.dumps({"prompt": STATE, "answers": [["Ohio", "OH"], "Utah"]}) + "\n\n"),
        ("a.csv", 'question,answers,more\nName a state.,"[[""Ohio"", ""OH""], ""Utah""]",x\n'),
        ("a.JSONL", "\ufeff" + json.dumps({"question": STATE, "answers": [["Ohio", "OH"], "Utah"]})),
    ],
)
def test_every_form_of_file_gives_the_same_question(tmp_path: Path, name: str, content: str) -> None:
    (question,) = questions_of(OpenQuestion, read_data(written(tmp_path, name, content)).rows)
    assert (question.text, question.answers) == (STATE, ANSWERS)
    assert question.id == prompt_id(STATE)


def test_answers_in_a_cell_stand_between_bars(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "question,answers\nName a state.,Ohio|Utah\n")
    assert questions_of(OpenQuestion, read_data(path).rows)[0].answers == (("Ohio",), ("Utah",))


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "Tell me a joke.\r\n\n  Tell me another. \n")
    assert [each.text for each in questions_of(Request, read_data(path).rows)] == [
        "Tell me a joke.",
        "Tell me another.",
    ]


def test_a_question_that_stands_twice_is_asked_once(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "Tell me a joke.\nTell me another.\nTell me a joke.\n")
    assert [each.text for each in questions_of(Request, read_data(path).rows)] == [
        "Tell me a joke.",
        "Tell me another.",
    ]


def test_a_prompt_may_hold_any_mark_but_a_line_end(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "One\u2028two\x0cthree.\n")
    assert [each.text for each in questions_of(Request, read_data(path).rows)] == ["One\u2028two\x0cthree."]
    path = written(tmp_path, "a.csv", 'prompt\n"One\ntwo",\nthree\u2028four\n')
    assert [each.text for each in questions_of(Request, read_data(path).rows)] == ["One\ntwo", "three\u2028four"]


def test_a_question_with_two_sets_of_answers_is_refused() -> None:
    rows = [Row("a:1", {"question": STATE, "answers": ["Ohio"]}), Row("a:2", {"question": STATE, "answers": ["Utah"]})]
    with pytest.raises(DataError) as caught:
        questions_of(OpenQuestion, rows)
    assert str(caught.value) == "a:2: is asked before, with other answers; give it once"


def test_data_is_told_from_other_data_by_its_name(tmp_path: Path) -> None:
    names = [read_data(written(tmp_path, "a.txt", text)).name for text in ("One.", "Two.", "One.")]
    assert names[0] == names[2] != names[1]
    assert names[0].startswith("a.txt ")


@pytest.mark.parametrize("answer", [1e16, 1e-05, 0.1, 3, "1e16, no: #### 10000000000000000"])
def test_a_number_is_taken_as_it_is(answer: Any) -> None:
    (question,) = questions_of(WordProblem, [Row("a", {"question": "How many?", "answer": answer})])
    assert float(question.answer) == (1e16 if isinstance(answer, str) else answer)


def test_a_worked_solution_stands_for_its_number() -> None:
    rows = [Row("a", {"question": "How many?", "answer": answer}) for answer in ("2+2=4\n#### 4", 4, 4.0, "4")]
    assert {questions_of(WordProblem, [row])[0].answer for row in rows} == {4}


def test_an_answer_that_stands_twice_is_one() -> None:
    rows = [Row("a", {"question": STATE, "answers": ["Ohio", "Utah", "ohio", ["Utah", "UT"]]})]
    assert questions_of(OpenQuestion, rows)[0].answers == (("Ohio",), ("Utah",), ("Utah", "UT"))


BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "missing.json": ("", "cannot be read (No such file or directory); name a {forms} file, or a dataset on the Hub"),
    "folder.json": ("", "cannot be read (Is a directory); name a {forms} file, or a dataset on the Hub"),
    "a.xlsx": ("x", "is of no form that is read here; give {forms}"),
    "latin.txt": (b"caf\xe9", "is not UTF-8 text (byte 3)"),
    "empty.jsonl": ("\n", "holds no questions"),
    "empty.json": ("[]", "holds no questions"),
    "number.json": ("3", "is neither a list of rows nor a map of questions"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_is_no_file_of_questions_is_refused(tmp_path: Path, name: str) -> None:
    content, what = BAD_FILES[name]
    path = tmp_path / name
    if name.startswith("folder"):
        path.mkdir()
    elif not name.startswith("missing"):
        written(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        read_data(str(path))
    assert str(caught.value) == f"{path}: " + what.format(forms=".json, .jsonl, .csv or .txt")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', ":2: is not sound JSON (Expecting value: line 1 column 7 (char 6))"),
        ("a.jsonl", '{"a": 1}\n[1]\n', ":2: is not a map of columns to values"),
        ("a.json", '[{"a": 1}, 2]', "[1]: is not a map of columns to values"),
        ("a.json", "[", ": is not sound JSON (Expecting value: line 1 column 2 (char 1))"),
        ("a.csv", 'question\n"open\n', ", after line 1: is not sound CSV (unexpected end of data)"),
    ],
)  # fmt: skip
def test_the_place_of_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: str, problem: str) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        read_data(path)
    assert str(caught.value) == path + problem


BAD_ROWS: list[tuple[type[Question], dict[str, Any], str]] = [
    (OpenQuestion, {"answers": ["a"]}, "x: $.question: is missing; add it"),
    (OpenQuestion, {"question": "", "answers": ["a"]}, "x: $.question: '' is not valid; it cannot be empty"),
    (OpenQuestion, {"question": STATE}, "x: $.answers: is missing; add it"),
    (OpenQuestion, {"question": STATE, "answers": []}, "x: $.answers: [] is not valid; give at least one"),
    (
        OpenQuestion,
        {"question": STATE, "answers": 3},
        "x: $.answers: is not a list of answers; write a list of names, or of lists of names",
    ),
    (OpenQuestion, {"question": STATE, "answers": ["a", [3]]}, "x: $.answers[1][0]: 3 is not valid; write a text"),
    (
        OpenQuestion,
        {"question": STATE, "answers": ["a", "…"]},
        "x: $.answers: has an answer without letters or digits; give every answer a name",
    ),
    (
        OpenQuestion,
        {"question": STATE, "answers": "[1"},
        "x: $.answers: is not a JSON list of answers; separate answers by |, or write a JSON list",
    ),
    (Request, {"text": "x"}, "x: $.prompt: is missing; add it"),
    (Request, {"prompt": 3}, "x: $.prompt: 3 is not valid; write a text"),
    (
        WordProblem,
        {"question": "How many?", "answer": "four"},
        "x: $.answer: holds no number; give the right number, by itself or behind ####",
    ),
    (
        WordProblem,
        {"question": "How many?", "answer": float("nan")},
        "x: $.answer: holds no number; give the right number, by itself or behind ####",
    ),
    (
        WordProblem,
        {"question": "How many?", "answer": None},
        "x: $.answer: holds no number; give the right number, by itself or behind ####",
    ),
]


@pytest.mark.parametrize(("kind", "values", "problem"), BAD_ROWS)
def test_a_row_that_a_task_cannot_use_is_named(kind: type[Question], values: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError) as caught:
        questions_of(kind, [Row("x", values)])
    assert str(caught.value) == problem


def test_all_rows_that_cannot_be_used_are_counted_and_the_first_ten_named() -> None:
    with pytest.raises(DataError) as caught:
        questions_of(Request, [Row(f"a:{number}", {}) for number in range(13)])
    *named, rest = map(str, caught.value.problems)
    assert named == [f"a:{number}: $.prompt: is missing; add it" for number in range(10)]
    assert rest == "…: and 3 problems more"


DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("task", "file", "count"),
    [
        ("open-qa", "coverageqa/coverageqa.json", 40),
        ("reasoning", "gsm8k/test.jsonl", 1319),
        ("creative", "prompts/joke.txt", 60),
        ("creative", "prompts/poem.txt", 100),
    ],
)
def test_the_papers_data_is_read_whole(task: str, file: str, count: int) -> None:
    if not DATA.exists():
        pytest.skip("the data for trials is not here")
    assert len(questions_of(TASKS[task].question, read_data(str(DATA / file)).rows)) == count


def test_every_name_in_coverageqa_is_its_own_answers_however_it_is_said() -> None:
    if not DATA.exists():
        pytest.skip("the data for trials is not here")
    rows = read_data(str(DATA / "coverageqa" / "coverageqa.json")).rows
    for question in questions_of(OpenQuestion, rows):
        names = names_of(question.answers)
        for written_name in (name for answer in question.answers for name in answer):
            expected = names[normalise(written_name)]
            assert match_whole(f" {written_name}.\n", names) == expected
            for form in ("The answer is **{}**.", "Answer: {}", "It is called “{}”!", "{} (as I said)"):
                assert match_stated(form.format(written_name), names) == expected


def test_the_number_of_gsm8ks_solutions_is_found_behind_its_mark_and_nearly_always_without_it() -> None:
    if not DATA.exists():
        pytest.skip("the data for trials is not here")
    texts = [row.values["answer"] for row in read_data(str(DATA / "gsm8k" / "test.jsonl")).rows]
    parts = [text.rpartition("####") for text in texts]
    assert all(final_number(text) == final_number(number) for text, (_, _, number) in zip(texts, parts, strict=True))
    missed = sum(final_number(solution) != final_number(number) for solution, _, number in parts)
    assert missed == 37  # most have words with a number behind the answer: "18 in 2 weeks"
