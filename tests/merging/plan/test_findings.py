"""The result of a search accompanies a merge by the recipe that it wrote, and no other merge."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slrmerge.checkpoint.files import LocalFile
from slrmerge.errors import CheckpointError
from slrmerge.merging.executor import execute, merge
from slrmerge.merging.finding import SUMMARY_NAME, TRADEOFF_NAME, Finding, SelectedCandidate, find_search_result
from slrmerge.merging.plan.model import MergePlan
from slrmerge.merging.plan.planner import plan
from slrmerge.merging.verify import verify
from slrmerge.recipe.load import as_recipe, load_recipe
from tests.conftest import Pair
from tests.problems import refused

SELECTED: dict[str, dict[str, Any]] = {
    "post": {"label": "post-trained", "alpha": 0.0, "quality": 1, "diversity": 0.5, "exact": True},
    "slr": {"label": "layers 2–3", "restore": [2, 3], "quality": 0.95, "diversity": 2.0, "exact": True},
    "soup": {"label": "soup 0.80", "alpha": 0.8, "quality": 0.9, "diversity": 1.75, "exact": False},
    "attention": {
        "label": "attention of layers 1–2",
        "layers": [{"range": [1, 2], "alpha": 1.0, "modules": ["self_attn"]}],
        "quality": 0.85,
        "diversity": 1.5,
        "exact": True,
    },
}
SUMMARY: dict[str, Any] = {
    "slrmerge": "0.1.0",
    "task": "crc",
    "pretrained": "./pre",
    "posttrained": "./post",
    "layers": 6,
    "candidates": 76,
    "min_quality": 0.9,
    "selected": SELECTED,
    "post_quality": {"exact": 1.0},
    "elapsed_s": 1.5,
}
FIGURE = b"\x89PNG"


@pytest.fixture
def searched(pair: Pair) -> Pair:
    """The pair, with the results of a search beside its recipes."""
    (pair.folder / "summary.json").write_text(json.dumps(SUMMARY))
    (pair.folder / "tradeoff.png").write_bytes(FIGURE)
    return pair


def without(value: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: entry for name, entry in value.items() if name != key}


def found(pair: Pair, own: str) -> Finding:
    """The whole result, for one of the recipes."""
    parsed = {name: SelectedCandidate(**values) for name, values in SELECTED.items()}
    others = tuple(candidate for name, candidate in parsed.items() if name != own)
    return Finding("crc", 76, parsed[own], others, LocalFile.at(pair.folder / TRADEOFF_NAME))


def planned(pair: Pair, **rules: Any) -> MergePlan:
    return plan(pair.recipe_file(**rules))


@pytest.mark.parametrize("name", SELECTED)
def test_a_recipe_that_a_search_wrote_has_its_scores_and_those_it_was_compared_with(searched: Pair, name: str) -> None:
    rules = {key: value for key, value in SELECTED[name].items() if key in ("alpha", "restore", "layers")}
    assert find_search_result(searched.recipe(**rules)) == found(searched, name)


@pytest.mark.parametrize(
    "content", [{"restore": [[2, 3]]}, {"restore": [2, 3], "layers": []}, {"restore": [2, 3], "max_shard_size": "2KB"}]
)
def test_equivalent_rules_are_the_same_recipe(searched: Pair, content: dict[str, Any]) -> None:
    finding = find_search_result(searched.recipe(**content))
    assert finding is not None
    assert finding.own.label == "layers 2–3"


@pytest.mark.parametrize(
    "content",
    [
        {"restore": [2, 4]},
        {"alpha": 0.5},
        {"restore": [2, 3], "alpha": 0.8},
        {"restore": [2, 3], "tensors": [{"match": "lm_head.*", "alpha": 1}]},
        {"layers": [{"range": [1, 2], "alpha": 1.0}]},
        {"restore": [2, 3], "pretrained": "./other"},
        {"restore": [2, 3], "posttrained": "./other"},
        {"restore": [2, 3], "pretrained": "./post", "posttrained": "./pre"},
    ],
)
def test_another_recipe_or_other_checkpoints_have_no_result(searched: Pair, content: dict[str, Any]) -> None:
    assert find_search_result(searched.recipe(restore=[2, 3])) is not None
    assert find_search_result(searched.recipe(**content)) is None


def test_a_recipe_without_a_file_has_no_result(searched: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(searched.folder)
    assert find_search_result(as_recipe({"pretrained": "./pre", "posttrained": "./post", "restore": [2, 3]})) is None


def test_a_recipe_that_was_moved_away_from_the_results_has_none(searched: Pair) -> None:
    (searched.folder / "elsewhere").mkdir()
    recipe = searched.recipe_file(restore=[2, 3]).rename(searched.folder / "elsewhere/recipe.yaml")
    assert find_search_result(load_recipe(recipe)) is None


def changed(**more: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(SUMMARY | more))


def lacking(key: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(without(SUMMARY, key)))


def badly_selected(**more: Any) -> Callable[[Path], object]:
    return changed(selected=SELECTED | {"slr": SELECTED["slr"] | more})


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        lambda path: path.write_bytes(b"null"),
        lambda path: path.write_bytes(b"[]"),
        lambda path: path.write_bytes(b"[" * 100_000),
        lambda path: path.write_bytes(json.dumps(SUMMARY).encode()[:-1]),
        *(lacking(key) for key in SUMMARY),
        changed(candidates="many"),
        changed(candidates=None),
        changed(selected={}),
        changed(selected=[SELECTED["slr"]]),
        changed(selected=SELECTED | {"slr": None}),
        changed(selected=SELECTED | {"slr": without(SELECTED["slr"], "label")}),
        changed(selected=SELECTED | {"slr": without(SELECTED["slr"], "quality")}),
        changed(selected=SELECTED | {"soup": without(SELECTED["soup"], "diversity")}),
        badly_selected(restore=[3, 2]),
        badly_selected(quality="good"),
        badly_selected(diversity=None),
    ],
)
def test_incomplete_results_are_ignored(searched: Pair, spoil: Callable[[Path], object]) -> None:
    spoil(searched.folder / "summary.json")
    assert find_search_result(searched.recipe(restore=[2, 3])) is None


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: (path.unlink(), path.mkdir())], ids=["none", "folder"])
def test_results_without_a_figure_are_found(searched: Pair, spoil: Callable[[Path], object]) -> None:
    expected = replace(found(searched, "slr"), figure=None)
    spoil(searched.folder / TRADEOFF_NAME)
    made = planned(searched, restore=[2, 3])
    assert made.finding == expected
    assert TRADEOFF_NAME not in {file.name for file in made.files}


def test_a_figure_that_is_a_link_to_another_file_is_refused(searched: Pair) -> None:
    figure, private = searched.folder / TRADEOFF_NAME, searched.folder.parent / "private"
    private.write_text("mine")
    figure.unlink()
    figure.symlink_to(private)
    with refused(CheckpointError, "link-outside"):
        planned(searched, restore=[2, 3])


def test_the_figure_is_copied_into_the_merge(searched: Pair) -> None:
    made = planned(searched, restore=[2, 3])
    assert made.finding == found(searched, "slr")
    (file,) = [file for file in made.files if file.name == TRADEOFF_NAME]
    assert (file.file_bytes, file.source) == (len(FIGURE), LocalFile.at(searched.folder / TRADEOFF_NAME))
    assert execute(made, searched.out).files[TRADEOFF_NAME].file_bytes == len(FIGURE)
    assert (searched.out / TRADEOFF_NAME).read_bytes() == FIGURE
    assert verify(searched.out).against_sources
    assert pickle.loads(pickle.dumps(made)) == made


def test_a_merge_by_another_recipe_does_not_contain_the_figure(searched: Pair) -> None:
    made = planned(searched, restore=[2, 4])
    assert made.finding is None
    assert TRADEOFF_NAME not in execute(made, searched.out).files


def results_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / SUMMARY_NAME).read_text())
    return summary


@pytest.mark.parametrize("name", ["slr", "soup", "early", "late"])
def test_every_recipe_of_a_real_search_has_its_result(tiny_search: Path, name: str) -> None:
    folder = tiny_search / "search"
    summary, finding = results_of(folder), find_search_result(load_recipe(folder / f"{name}.yaml"))
    order = [name, *(other for other in summary["selected"] if other != name)]
    assert finding is not None
    assert (finding.task, finding.candidates) == (summary["task"], summary["candidates"])
    assert [(each.label, each.quality, each.diversity) for each in (finding.own, *finding.others)] == [
        (entry["label"], entry["quality"], entry["diversity"]) for entry in (summary["selected"][key] for key in order)
    ]
    assert finding.figure == LocalFile.at(folder / TRADEOFF_NAME)


def test_the_card_of_a_merge_shows_the_result_of_a_real_search(tiny_search: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_search, tmp_path / "here")
    folder, out = tmp_path / "here/search", tmp_path / "here/hybrid"
    merge(folder / "slr.yaml", out, fsync=False)
    summary = results_of(folder)
    selected = summary["selected"]
    scores = [selected["slr"], *(entry for key, entry in selected.items() if key != "slr")]
    card = (out / "README.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("|")]
    rows, held_out = lines[2 : 2 + len(scores)], lines[4 + len(scores) :]
    assert [row[1:] for row in rows] == [[f"{entry['quality']:.4f}", f"{entry['diversity']:.4f}"] for entry in scores]
    assert all(entry["label"] in row[0] for entry, row in zip(scores, rows, strict=True))
    again = summary["held_out"]["scores"]
    assert len(held_out) == len(again) == 7
    assert [row[1:3] for row in held_out] == [[f"{e['quality']:.4f}", f"{e['diversity']:.4f}"] for e in again.values()]
    change = again["slr"]["diversity_change"]
    assert f"{change['mean']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]" in card
    assert f"in {summary['reselected'][selected['slr']['label']]:.0%} of draws" in card
    assert (out / TRADEOFF_NAME).read_bytes() == (folder / TRADEOFF_NAME).read_bytes()
    assert verify(out).against_sources
