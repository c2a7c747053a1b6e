"""Warnings of a search are seen: on stderr, and in the table."""

import re
from dataclasses import replace
from pathlib import Path

import click
import pytest

from slrmerge.cli.search import search
from slrmerge.cli.show_search import print_result
from slrmerge.searching.selection import ScoredCandidate
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


def shown_rows(capsys: pytest.CaptureFixture[str], rows: list[ScoredCandidate]) -> list[list[str]]:
    """The cells of the first table."""
    with click.Context(search):
        print_result(made_result(rows), Path("search"), as_json=False)
    table = capsys.readouterr().out.split("\n\n")[0]
    return [re.split(r"  +", line.strip()) for line in table.splitlines()[1:]]


def test_changes_are_those_of_each_row_from_the_post_trained_model(capsys: pytest.CaptureFixture[str]) -> None:
    rows = made_rows({(0, 0): (0.93, 1.4), (1, 1): (0.9, 1.7)})
    rows[0] = replace(rows[0], quality=0.9, diversity=1.0)
    rows[1] = replace(rows[1], quality=0.45, diversity=2.0)
    shown = {cells[0]: cells[-2:] for cells in shown_rows(capsys, rows)}
    assert (shown["selected, late control"], shown["pre-trained"]) == (["+0%", "+70%"], ["-50%", "+100%"])
    assert shown["early control"] == ["+3%", "+40%"]


def test_recipes_have_rows_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    rows = made_rows({(0, 0): (0.95, 1.4), (1, 1): (0.9, 1.7)})
    mine = replace(rows[2], space="recipe", label="mine.yaml", alpha=None, diversity=1.2)
    shown = shown_rows(capsys, [*rows, mine])
    assert [cells[:2] for cells in shown if "mine.yaml" in cells] == [["recipe", "mine.yaml"]]


def test_a_recipe_that_is_the_selected_interval_shares_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = made_rows({(0, 0): (0.95, 1.4), (1, 1): (0.9, 1.7)})
    rows[-1] = replace(rows[-1], also_named=("mine.yaml",))
    assert [cells[0] for cells in shown_rows(capsys, rows) if "mine.yaml" in cells[1]] == ["selected, late control"]
