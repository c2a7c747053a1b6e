"""Warnings of a search are seen: on stderr, and in the table."""

from dataclasses import replace
from pathlib import Path

import click
import pytest

from slrmerge.cli.search import search
from slrmerge.cli.show_search import print_result
from tests.searching.pairs import made_result, made_rows


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("post", "pre", "marked"), [(0.2, 0.1, ["post-trained (!)"]), (0.9, 0.95, ["pre-trained (!)"]), (0.9, 0.5, [])]
)
def test_doubtful_sides_are_marked_and_warned_of(
    capsys: pytest.CaptureFixture[str], post: float, pre: float, marked: list[str], as_json: bool
) -> None:
    rows = made_rows({(0, 0): (0.95, 1.4), (1, 1): (0.9, 1.7)})
    rows[:2] = [replace(rows[0], quality=post), replace(rows[1], quality=pre)]
    with click.Context(search):
        print_result(made_result(rows), Path("search"), as_json=as_json)
    shown = capsys.readouterr()
    assert [line.split(":")[0] for line in shown.err.splitlines()] == ["warning"] * len(marked)
    if not as_json:
        assert [line[:16].strip() for line in shown.out.splitlines() if "(!)" in line] == marked
