"""Selecting again from the results of a search; results that are damaged are refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from slrmerge.errors import BusyError, OptionError, OutputError
from slrmerge.io.lock import lock
from slrmerge.recipe.load import load_recipe
from slrmerge.searching.results import SearchResult
from slrmerge.searching.results_folder import read_result, why_not_results, write_result
from slrmerge.searching.select import select
from tests.merging.faults import snapshot
from tests.problems import refused
from tests.searching.made_results import SCORES
from tests.searching.pairs import SmallPair, made_result, made_rows

pytestmark = pytest.mark.usefixtures("hurried")


@pytest.mark.parametrize("ratio", [0.5, 0.98, 1.0])
def test_selecting_again_gives_the_files_of_a_fresh_search_without_the_weights(small: SmallPair, ratio: float) -> None:
    small.run(small.folder / "old", min_quality=0.9, held_out=False)  # which are asked of other candidates
    small.run(small.folder / "fresh", min_quality=ratio, held_out=False)
    for side in ("pre", "post"):
        shutil.rmtree(small.folder / side)
    result = select(small.folder / "old", min_quality=ratio)
    assert read_result(small.folder / "old") == result
    old, fresh = (snapshot(small.folder / name) or {} for name in ("old", "fresh"))
    summaries = [json.loads(files.pop("summary.json")) for files in (old, fresh)]
    assert old == fresh
    assert [summary.pop("elapsed_s") > 0 for summary in summaries] == [True, True]
    assert summaries[0] == summaries[1]


def test_selecting_back_restores_the_same_bytes(small: SmallPair) -> None:
    small.run()
    before = snapshot(small.out)
    select(small.out, min_quality=0.99)
    assert snapshot(small.out) != before
    select(str(small.out), min_quality=0.9)
    assert snapshot(small.out) == before


def test_select_where_nothing_is_feasible_removes_the_recipes_of_intervals(tmp_path: Path) -> None:
    write_result(tmp_path, made_result(made_rows(SCORES)))
    result = select(tmp_path, min_quality=0.995)
    assert result.choice.slr is None
    assert list(tmp_path.glob("*.yaml")) == []


def test_of_two_that_select_at_once_one_is_refused(tmp_path: Path) -> None:
    write_result(tmp_path, made_result(made_rows(SCORES)))
    before = snapshot(tmp_path)
    with lock(tmp_path / "summary.json"):
        with refused(BusyError, "output-busy"):
            select(tmp_path, min_quality=0.3)
        assert why_not_results(tmp_path) is None  # where a killed one left its lock
    assert snapshot(tmp_path) == before


def test_rough_candidates_that_could_be_better_are_doubts(tmp_path: Path) -> None:
    rows = made_rows(SCORES)
    rough = replace(rows[-2], exact=False, prompts=8)
    assert rough.label == "layers 1–2"
    result = made_result([*rows[:-2], rows[-1]])
    post_quality = {**result.post_quality, "8 prompts, float32": 0.96}
    write_result(tmp_path, replace(result, rows=(*result.rows, rough), post_quality=post_quality))
    again = select(tmp_path, min_quality=0.3)
    assert again.choice.slr is not None
    assert again.choice.slr.label == "layers 1–1"
    (doubt,) = again.doubts
    assert "layers 1–2" in doubt
    assert json.loads((tmp_path / "summary.json").read_text())["doubts"] == [doubt]


def test_near_ties_are_doubts_and_in_the_summary(tmp_path: Path) -> None:
    result = made_result(made_rows({(0, 0): (0.95, 1.7), (1, 1): (0.95, 1.6995), (2, 2): (0.95, 1.5)}))
    write_result(tmp_path, result)
    (doubt,) = result.doubts
    assert "layers 1–1" in doubt
    (tie,) = json.loads((tmp_path / "summary.json").read_text())["near_ties"]
    assert (tie["label"], tie["diversity"]) == ("layers 1–1", 1.6995)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), "most"])
def test_a_minimum_quality_out_of_range_is_refused(tmp_path: Path, ratio: float) -> None:
    write_result(tmp_path, made_result(made_rows(SCORES)))
    before = snapshot(tmp_path)
    with pytest.raises(OptionError) as caught:
        select(tmp_path, min_quality=ratio)
    assert [problem.where for problem in caught.value.problems] == ["min_quality"]
    assert snapshot(tmp_path) == before


Spoil = Callable[[bytes], bytes]

DAMAGED: dict[str, tuple[str, Spoil]] = {
    "an empty summary": ("summary.json", lambda old: b""),
    "a summary that is a list": ("summary.json", lambda old: b"[]"),
    "a summary without keys": ("summary.json", lambda old: b"{}"),
    "a summary nested too deeply": ("summary.json", lambda old: b"[" * 100_000),
    "a summary that is not UTF-8": ("summary.json", lambda old: old.replace(b"crc", b"cr\xff")),
    "a summary with a wrong type": ("summary.json", lambda old: old.replace(b'"layers": 3', b'"layers": "many"')),
    "a summary without a checkpoint": ("summary.json", lambda old: old.replace(b'"../pre"', b'""')),
    "a summary with an invalid dtype": ("summary.json", lambda old: old.replace(b'"task"', b'"dtype": "x", "task"')),
    "an empty table": ("results.csv", lambda old: b""),
    "a table with its header only": ("results.csv", lambda old: old.splitlines(keepends=True)[0]),
    "a table that is cut off": ("results.csv", lambda old: old[:-40]),
    "a table without one parent": ("results.csv", lambda old: b"".join(
        line for line in old.splitlines(keepends=True) if not line.startswith(b"pre,"))),
    "a table with a parent twice": ("results.csv", lambda old: old + old.splitlines(keepends=True)[1]),
    "a table that is a picture": ("results.csv", lambda old: b"\x89PNG\r\n\x1a\n" + bytes(range(256))),
    "a table with an endless cell": ("results.csv", lambda old: old + b"x" * 200_000),
    "a table with a word for a number": ("results.csv", lambda old: old.replace(b"0.96", b"many")),
    "a table with an unknown column": ("results.csv", lambda old: old.replace(b"space,label", b"space,name")),
    "a table with invalid rules": ("results.csv", lambda old: old.replace(b"[0, 0]", b"[1, 0]")),
    "a table of other conditions": ("results.csv", lambda old: old.replace(b"float32", b"float16")),
}  # fmt: skip


@pytest.mark.parametrize("name", ["summary.json", "results.csv"])
def test_a_folder_without_results_is_refused(tmp_path: Path, name: str) -> None:
    write_result(tmp_path, made_result(made_rows(SCORES)))
    (tmp_path / name).unlink()
    before = snapshot(tmp_path)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with refused(OutputError, "no-results") as caught:
            select(folder, min_quality=0.8)
        assert caught.value.problems[0].where == str(folder)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_results_are_refused_and_left_as_they_are(tmp_path: Path, case: str) -> None:
    write_result(tmp_path, made_result(made_rows(SCORES)))
    name, spoil = DAMAGED[case]
    valid = (tmp_path / name).read_bytes()
    assert spoil(valid) != valid
    (tmp_path / name).write_bytes(spoil(valid))
    before = snapshot(tmp_path)
    with refused(OutputError, "results-damaged") as caught:
        select(tmp_path, min_quality=0.8)
    assert caught.value.problems[0].where == str(tmp_path)
    assert snapshot(tmp_path) == before


def test_a_folder_of_others_cannot_add_to_recipes(tmp_path: Path) -> None:
    write_result(tmp_path, made_result(made_rows(SCORES)))
    for name, new in (("results.csv", b"float\nalpha: 1"), ("summary.json", rb"float\nalpha: 1")):
        text = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(text.replace(b",float32,", b',"' + new + b'",').replace(b"float32", new))
    select(tmp_path, min_quality=0.8)
    recipe = load_recipe(tmp_path / "slr.yaml")
    assert (recipe.rules().keys(), recipe.dtype) == ({"restore"}, None)


def test_a_bug_is_not_reported_as_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> SearchResult:
        raise TypeError

    write_result(tmp_path, made_result(made_rows(SCORES)))
    monkeypatch.setattr("slrmerge.searching.results_folder.select_from", broken)
    with pytest.raises(TypeError):
        read_result(tmp_path)
