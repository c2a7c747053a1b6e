"""Text made safe for terminals, JSON, Markdown and CSV."""

import csv
import json
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from slrmerge.io.text import _Escapes, from_csv, markdown, markdown_block, markdown_code, printable, to_csv, to_json

ANY = st.text(st.characters(exclude_categories=()))
"""Every character, lone surrogates too."""

MARKUP = st.text(st.sampled_from("#-*+=_~`[](){}<>!&|\\ :1.x\n\t\x1b\u202e\ud800"), max_size=30)


@given(ANY)
def test_printable_text_is_printable(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)


@pytest.mark.parametrize("text", ["", "plain", "Zürich – 日本語 ×", "a\\b 'c' \"d\""])
def test_what_prints_is_unchanged(text: str) -> None:
    assert printable(text) == markdown(text).replace("\\\\", "\\") == text


def test_what_does_not_print_is_escaped() -> None:
    assert printable("a\x1b[31m\u202e\n\ud800\x9b") == r"a\x1b[31m\u202e\n\ud800\x9b"
    assert printable("a\nb\t\x07", keep="\n\t") == "a\nb\t\\x07"


@given(st.recursive(ANY, lambda inner: st.lists(inner) | st.dictionaries(ANY, inner)), st.sampled_from([None, 2]))
def test_json_is_read_back_and_is_utf8(value: object, indent: int | None) -> None:
    text = to_json(value, indent=indent)
    assert json.loads(text) == json.loads(json.dumps(value))  # which joins pairs of surrogates
    assert text.encode()
    assert not set(text) & {"\x1b", "\x7f", "\x9b", "\u202e"}


@given(MARKUP)
def test_markdown_text_stays_text(text: str) -> None:
    for line, expected in ((f"- {markdown(text)}x", "bullet_list"), (f"# {markdown(text)}x", "heading")):
        tokens = MarkdownIt().parse(f"{line}\n")
        kinds = [token.type.removesuffix("_open") for token in tokens if token.nesting == 1]
        assert kinds == ([expected, "list_item", "paragraph"] if expected == "bullet_list" else [expected])
        inline = {child.type for token in tokens for child in token.children or ()}
        assert inline <= {"text", "em_open", "em_close", "strong_open", "strong_close", "text_special", "softbreak"}


@given(MARKUP)
def test_markdown_cells_stay_in_their_column(text: str) -> None:
    tokens = MarkdownIt().enable("table").parse(f"| a | b |\n|---|---|\n| {markdown(text)} | x |\n")
    cells = [tokens[place + 1].content for place, token in enumerate(tokens) if token.type == "td_open"]
    assert len(cells) == 2
    assert cells[1] == "x"


@given(MARKUP)
def test_markdown_code_stays_code(text: str) -> None:
    tokens = MarkdownIt().parse(f"x {markdown_code(text)} y")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    children = [child.type for child in tokens[1].children or ()]
    assert children == (["text", "code_inline", "text"] if text else ["text"])


@given(MARKUP)
def test_markdown_blocks_end_at_their_end(text: str) -> None:
    text = text.replace("\n", "\n" + "```\n")
    tokens = MarkdownIt().parse(markdown_block("yaml", text) + "\n\nafter\n")
    assert [token.type for token in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]


def test_an_escape_is_made_once_however_often_it_occurs() -> None:
    made: list[str] = []
    escapes = _Escapes("\n", lambda char: made.append(char) or "x")  # type: ignore[func-returns-value]
    assert ("a\x07\n\u202eb" * 1000).translate(escapes) == "ax\nxb" * 1000
    assert made == ["\x07", "\u202e"]


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "'=1", "＝1", '=HYPERLINK("http://x";"y")']


@pytest.mark.parametrize("text", FORMULAS)
def test_a_spreadsheet_runs_no_cell(text: str) -> None:
    ((cell,),) = list(csv.reader(StringIO(to_csv([text], []), newline="")))
    assert cell == f"'{text}"


def test_numbers_and_ordinary_text_are_unchanged() -> None:
    assert to_csv(["a"], [[-1.5], [3], [None], ["it's"], ["'quoted'"]]) == "a\n-1.5\n3\n\"\"\nit's\n'quoted'\n"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")) | st.sampled_from(FORMULAS))
def test_csv_is_read_back(text: str) -> None:
    ((cell, _),) = list(csv.reader(StringIO(to_csv([text, ""], []), newline="")))
    assert from_csv(cell) == text
