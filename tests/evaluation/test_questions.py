"""Rows of files of every form, and rows that a task cannot use."""

import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from slrmerge.errors import DataError, OptionError
from slrmerge.evaluation import questions
from slrmerge.evaluation.answers import final_number
from slrmerge.evaluation.matching import match_stated, match_whole, names_of, normalise
from slrmerge.evaluation.questions import Question, QuestionRow, parse_questions, prompt_id, read_data
from slrmerge.evaluation.tasks import TASKS
from slrmerge.evaluation.tasks.creative import WritingPrompt
from slrmerge.evaluation.tasks.open_qa import OpenQuestion
from slrmerge.evaluation.tasks.reasoning import WordProblem
from tests.problems import refused

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
    (question,) = parse_questions(OpenQuestion, read_data(written(tmp_path, name, content)).rows)
    assert (question.text, question.answers) == (STATE, ANSWERS)
    assert question.id == prompt_id(STATE)


def test_answers_in_a_cell_are_separated_by_bars(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "question,answers\nName a state.,Ohio|Utah\n")
    assert parse_questions(OpenQuestion, read_data(path).rows)[0].answers == (("Ohio",), ("Utah",))


def test_a_text_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "Tell me a joke.\r\n\n  Tell me another. \n")
    assert [each.text for each in parse_questions(WritingPrompt, read_data(path).rows)] == [
        "Tell me a joke.",
        "Tell me another.",
    ]


def test_a_repeated_question_is_asked_once(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "Tell me a joke.\nTell me another.\nTell me a joke.\n")
    assert [each.text for each in parse_questions(WritingPrompt, read_data(path).rows)] == [
        "Tell me a joke.",
        "Tell me another.",
    ]


def test_a_prompt_may_hold_any_mark_but_a_line_end(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "One\u2028two\x0cthree.\n")
    assert [each.text for each in parse_questions(WritingPrompt, read_data(path).rows)] == ["One\u2028two\x0cthree."]
    path = written(tmp_path, "a.csv", 'prompt\n"One\ntwo",\nthree\u2028four\n')
    assert [each.text for each in parse_questions(WritingPrompt, read_data(path).rows)] == [
        "One\ntwo",
        "three\u2028four",
    ]


def test_a_question_with_two_sets_of_answers_is_refused() -> None:
    rows = [
        QuestionRow("a:1", {"question": STATE, "answers": ["Ohio"]}),
        QuestionRow("a:2", {"question": STATE, "answers": ["Utah"]}),
    ]
    with refused(DataError, "conflicting-answers") as caught:
        parse_questions(OpenQuestion, rows)
    assert caught.value.problems[0].where == "a:2"


def test_different_data_has_different_names(tmp_path: Path) -> None:
    names = [read_data(written(tmp_path, "a.txt", text)).name for text in ("One.", "Two.", "One.")]
    assert names[0] == names[2] != names[1]
    assert names[0].startswith("a.txt ")


@pytest.mark.parametrize("answer", [1e16, 1e-05, 0.1, 3, "1e16, no: #### 10000000000000000"])
def test_a_number_is_taken_as_it_is(answer: Any) -> None:
    (question,) = parse_questions(WordProblem, [QuestionRow("a", {"question": "How many?", "answer": answer})])
    assert float(question.answer) == (1e16 if isinstance(answer, str) else answer)


def test_a_worked_solution_counts_as_its_number() -> None:
    rows = [QuestionRow("a", {"question": "How many?", "answer": answer}) for answer in ("2+2=4\n#### 4", 4, 4.0, "4")]
    assert {parse_questions(WordProblem, [row])[0].answer for row in rows} == {4}


def test_repeated_answers_are_dropped() -> None:
    rows = [QuestionRow("a", {"question": STATE, "answers": ["Ohio", "Utah", "ohio", ["Utah", "UT"]]})]
    assert parse_questions(OpenQuestion, rows)[0].answers == (("Ohio",), ("Utah",), ("Utah", "UT"))


BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "missing.json": ("", "unreadable"),
    "folder.json": ("", "unreadable"),
    "a.xlsx": ("x", "unknown-format"),
    "latin.txt": (b"caf\xe9", "not-utf8"),
    "empty.jsonl": ("\n", "empty"),
    "empty.json": ("[]", "empty"),
    "number.json": ("3", "wrong-type"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_without_questions_is_refused(tmp_path: Path, name: str) -> None:
    content, code = BAD_FILES[name]
    path = tmp_path / name
    if name.startswith("folder"):
        path.mkdir()
    elif not name.startswith("missing"):
        written(tmp_path, name, content)
    for data in (str(path), path):
        with refused(DataError, code) as caught:
            read_data(data)
        assert caught.value.problems[0].where == str(path)


@pytest.mark.parametrize(
    ("name", "content", "where", "code"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', ":2", "invalid-json"),
        ("a.jsonl", '{"a": 1}\n[1]\n', ":2", "wrong-type"),
        ("a.json", '[{"a": 1}, 2]', "[1]", "wrong-type"),
        ("a.json", "[", "", "invalid-json"),
        ("a.json", "[" * 100_000, "", "invalid-json"),
        ("a.csv", 'question\n"open\n', ", after line 1", "invalid-csv"),
        ("a.csv", "question,answers,question\na,b,c\n", "", "duplicate-key"),
        ("a.json", '{"a": ["b"], "a": ["c"]}', "", "invalid-json"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', ":2", "invalid-json"),
        ("a.json", '[{"question": "\\ud800"}]', "", "invalid-json"),
        ("a.json", '[{"answer": 1e400}]', "", "invalid-json"),
    ],
)  # fmt: skip
def test_the_place_of_an_unreadable_row_is_named(
    tmp_path: Path, name: str, content: str, where: str, code: str
) -> None:
    path = written(tmp_path, name, content)
    with refused(DataError, code) as caught:
        read_data(path)
    assert caught.value.problems[0].where == path + where


@pytest.mark.parametrize("kind", ["fifo", "device", "large"])
def test_a_file_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = tmp_path / "a.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        monkeypatch.setattr(questions, "MAX_DATA_BYTES", 10)
        path.write_text('{"a": ["b"], "c": ["d"]}')
    with refused(DataError, "unreadable"):
        read_data(path)


@pytest.mark.parametrize("data", [None, {"Name a river.": ["Nile"]}])
def test_data_are_a_file_or_a_dataset(data: Any) -> None:
    with refused(OptionError, "wrong-type"):
        read_data(data)


BAD_ROWS: list[tuple[type[Question], dict[str, Any], str, str]] = [
    (OpenQuestion, {"answers": ["a"]}, "question", "missing-key"),
    (OpenQuestion, {"question": "", "answers": ["a"]}, "question", "empty"),
    (OpenQuestion, {"question": " \n", "answers": ["a"]}, "question", "empty"),
    (OpenQuestion, {"question": "a\ud800", "answers": ["a"]}, "question", "invalid-value"),
    (OpenQuestion, {"question": STATE, "answers": "[" * 100_000}, "answers", "invalid-json"),
    (WordProblem, {"question": "How many?", "answer": 10**400}, "answer", "no-number"),
    (WordProblem, {"question": "How many?", "answer": -(10**400)}, "answer", "no-number"),
    (WordProblem, {"question": "How many?", "answer": float("-inf")}, "answer", "no-number"),
    (OpenQuestion, {"question": STATE}, "answers", "missing-key"),
    (OpenQuestion, {"question": STATE, "answers": []}, "answers", "empty"),
    (OpenQuestion, {"question": STATE, "answers": 3}, "answers", "wrong-type"),
    (OpenQuestion, {"question": STATE, "answers": ["a", [3]]}, "answers[1][0]", "wrong-type"),
    (OpenQuestion, {"question": STATE, "answers": ["a", "…"]}, "answers", "unnamed-answer"),
    (OpenQuestion, {"question": STATE, "answers": "[1"}, "answers", "invalid-json"),
    (WritingPrompt, {"text": "x"}, "prompt", "missing-key"),
    (WritingPrompt, {"prompt": 3}, "prompt", "wrong-type"),
    (WordProblem, {"question": "How many?", "answer": "four"}, "answer", "no-number"),
    (WordProblem, {"question": "How many?", "answer": float("nan")}, "answer", "no-number"),
    (WordProblem, {"question": "How many?", "answer": True}, "answer", "no-number"),
    (WordProblem, {"question": "How many?", "answer": None}, "answer", "no-number"),
]


@pytest.mark.parametrize(("kind", "values", "field", "code"), BAD_ROWS)
def test_a_row_that_a_task_cannot_use_is_named(
    kind: type[Question], values: dict[str, Any], field: str, code: str
) -> None:
    with refused(DataError, code) as caught:
        parse_questions(kind, [QuestionRow("x", values)])
    assert caught.value.problems[0].where == f"x: $.{field}"


def test_the_problems_of_all_rows_are_counted_and_ten_are_named() -> None:
    with refused(DataError, "missing-key", "more-problems") as caught:
        parse_questions(WritingPrompt, [QuestionRow(f"a:{number}", {}) for number in range(13)])
    *named, rest = caught.value.problems
    assert [problem.where for problem in named] == [f"a:{number}: $.prompt" for number in range(10)]
    assert "3" in rest.what


def test_all_problems_of_a_row_are_named() -> None:
    with refused(DataError, "empty", "missing-key"):
        parse_questions(OpenQuestion, [QuestionRow("a", {"question": ""})])


@pytest.mark.parametrize(
    ("kind", "column"),
    [
        (OpenQuestion, "prompt"),
        (WritingPrompt, "question"),
        (WordProblem, "problem"),
        (WordProblem, "prompt"),
    ],
)
def test_a_column_may_have_another_name(kind: type[Question], column: str) -> None:
    values = {column: STATE, "answers": ["Ohio"], "answer": 1}
    assert parse_questions(kind, [QuestionRow("a", values)])[0].text == STATE


def test_a_question_is_a_value_with_a_repr() -> None:
    question = WordProblem(question="How many?", answer=Fraction(1, 2))
    assert question == WordProblem(question="How many?", answer=Fraction(1, 2))
    assert "How many?" in repr(question)
    with refused(DataError, "empty"):
        WordProblem(question="", answer=Fraction(1, 2))


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
    assert len(parse_questions(TASKS[task]().question, read_data(str(DATA / file)).rows)) == count


def test_every_name_in_coverageqa_matches_its_own_answer_in_every_form() -> None:
    if not DATA.exists():
        pytest.skip("the data for trials is not here")
    rows = read_data(str(DATA / "coverageqa" / "coverageqa.json")).rows
    for question in parse_questions(OpenQuestion, rows):
        names = names_of(question.answers)
        for written_name in (name for answer in question.answers for name in answer):
            expected = names[normalise(written_name)]
            assert match_whole(f" {written_name}.\n", names) == expected
            for form in ("The answer is **{}**.", "Answer: {}", "It is called “{}”!", "{} (as I said)"):
                assert match_stated(form.format(written_name), names) == expected


def test_the_number_of_gsm8ks_solutions_is_found_after_its_mark_and_nearly_always_without_it() -> None:
    if not DATA.exists():
        pytest.skip("the data for trials is not here")
    texts = [row.values["answer"] for row in read_data(str(DATA / "gsm8k" / "test.jsonl")).rows]
    parts = [text.rpartition("####") for text in texts]
    assert all(final_number(text) == final_number(number) for text, (_, _, number) in zip(texts, parts, strict=True))
    missed = sum(final_number(solution) != final_number(number) for solution, _, number in parts)
    assert missed == 37  # most have words with a number behind the answer: "18 in 2 weeks"
