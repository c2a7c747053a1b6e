"""What a search found goes along with a merge by the recipe that it wrote, and with no other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slrmerge import execute, verify_checkpoint
from slrmerge.hub import open_pair
from slrmerge.plan import Finding, plan_merge
from slrmerge.plan.findings import finding_of
from slrmerge.recipe import Recipe, load_recipe, parse_recipe
from tests.conftest import Pair

CHOSEN: dict[str, dict[str, Any]] = {
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
    "task": "crc",
    "pretrained": "./pre",
    "posttrained": "./post",
    "candidates": 76,
    "chosen": CHOSEN,
}
SCORES = {found["label"]: (found["quality"], found["diversity"]) for found in CHOSEN.values()}
PICTURE = b"\x89PNG"


@pytest.fixture
def searched(pair: Pair) -> Pair:
    """The pair, with the results of a search beside its recipes."""
    (pair.folder / "summary.json").write_text(json.dumps(SUMMARY))
    (pair.folder / "tradeoff.png").write_bytes(PICTURE)
    return pair


def without(value: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: entry for name, entry in value.items() if name != key}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_recipe_that_a_search_wrote_has_its_scores_first_and_then_what_it_was_held_against(
    searched: Pair, name: str
) -> None:
    rules = {key: value for key, value in CHOSEN[name].items() if key in ("alpha", "restore", "layers")}
    finding = finding_of(searched.recipe(**rules))
    assert finding == Finding("crc", 76, SCORES, searched.folder / "tradeoff.png")
    own = CHOSEN[name]["label"]
    assert list(finding.scores) == [own, *(label for label in SCORES if label != own)]


@pytest.mark.parametrize(
    "content", [{"restore": [[2, 3]]}, {"restore": [2, 3], "layers": []}, {"restore": [2, 3], "max_shard_size": "2KB"}]
)
def test_the_same_rules_in_other_words_are_the_same_recipe(searched: Pair, content: dict[str, Any]) -> None:
    finding = finding_of(searched.recipe(**content))
    assert finding is not None
    assert next(iter(finding.scores)) == "layers 2–3"


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
def test_a_search_says_nothing_of_another_recipe_or_of_other_checkpoints(
    searched: Pair, content: dict[str, Any]
) -> None:
    assert finding_of(searched.recipe(restore=[2, 3])) is not None
    assert finding_of(searched.recipe(**content)) is None


def test_a_recipe_without_a_file_was_written_by_no_search(searched: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(searched.folder)
    assert finding_of(parse_recipe({"pretrained": "./pre", "posttrained": "./post", "restore": [2, 3]})) is None


def test_a_recipe_that_was_moved_away_from_the_results_stands_for_itself(searched: Pair) -> None:
    (searched.folder / "elsewhere").mkdir()
    recipe = searched.recipe_file(restore=[2, 3]).rename(searched.folder / "elsewhere/recipe.yaml")
    assert finding_of(load_recipe(recipe)) is None


def changed(**more: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(SUMMARY | more))


def lacking(key: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(without(SUMMARY, key)))


def badly_chosen(**more: Any) -> Callable[[Path], object]:
    return changed(chosen=CHOSEN | {"slr": CHOSEN["slr"] | more})


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        lambda path: path.write_bytes(b"null"),
        lambda path: path.write_bytes(b"[]"),
        lambda path: path.write_bytes(b"[" * 100_000),
        lambda path: path.write_bytes(json.dumps(SUMMARY).encode()[:-1]),
        *(lacking(key) for key in SUMMARY),
        changed(candidates="many"),
        changed(candidates=None),
        changed(chosen={}),
        changed(chosen=[CHOSEN["slr"]]),
        changed(chosen=CHOSEN | {"slr": None}),
        changed(chosen=CHOSEN | {"slr": without(CHOSEN["slr"], "label")}),
        changed(chosen=CHOSEN | {"slr": without(CHOSEN["slr"], "quality")}),
        changed(chosen=CHOSEN | {"soup": without(CHOSEN["soup"], "diversity")}),
        badly_chosen(restore=[3, 2]),
        badly_chosen(quality="good"),
        badly_chosen(diversity=None),
    ],
)
def test_results_that_are_not_whole_say_nothing(searched: Pair, spoil: Callable[[Path], object]) -> None:
    spoil(searched.folder / "summary.json")
    assert finding_of(searched.recipe(restore=[2, 3])) is None


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: (path.unlink(), path.mkdir())], ids=["none", "folder"])
def test_results_without_a_picture_are_results_all_the_same(searched: Pair, spoil: Callable[[Path], object]) -> None:
    spoil(searched.folder / "tradeoff.png")
    assert finding_of(searched.recipe(restore=[2, 3])) == Finding("crc", 76, SCORES, None)
    plan = searched.plan(restore=[2, 3])
    assert plan.finding == Finding("crc", 76, SCORES, None)
    assert "tradeoff.png" not in {file.name for file in plan.files}


def test_the_picture_goes_along_with_the_merge(searched: Pair) -> None:
    plan = searched.plan(restore=[2, 3])
    assert plan.finding == Finding("crc", 76, SCORES, searched.folder / "tradeoff.png")
    assert [(file.file_bytes, file.source) for file in plan.files if file.name == "tradeoff.png"] == [
        (len(PICTURE), searched.folder / "tradeoff.png")
    ]
    assert execute(plan, searched.out).files["tradeoff.png"].file_bytes == len(PICTURE)
    assert (searched.out / "tradeoff.png").read_bytes() == PICTURE
    assert verify_checkpoint(searched.out).against_sources


def test_a_merge_by_another_recipe_leaves_the_picture_where_it_is(searched: Pair) -> None:
    plan = searched.plan(restore=[2, 4])
    assert plan.finding is None
    assert "tradeoff.png" not in execute(plan, searched.out).files


def results_of(recipe: Recipe) -> dict[str, Any]:
    assert recipe.file is not None
    summary: dict[str, Any] = json.loads((recipe.file.parent / "summary.json").read_text())
    return summary


@pytest.mark.parametrize("name", ["slr", "soup", "early", "late"])
def test_every_recipe_of_a_real_search_finds_what_that_search_said_of_it(tiny_search: Path, name: str) -> None:
    recipe = load_recipe(tiny_search / "search" / f"{name}.yaml")
    summary, finding = results_of(recipe), finding_of(recipe)
    own, *others = [name, *(other for other in summary["chosen"] if other != name)]
    assert finding is not None
    assert (finding.task, finding.candidates) == (summary["task"], summary["candidates"])
    assert list(finding.scores.items()) == [
        (entry["label"], (entry["quality"], entry["diversity"]))
        for entry in (summary["chosen"][key] for key in (own, *others))
    ]
    assert finding.picture == tiny_search / "search" / "tradeoff.png"


def test_a_merge_of_what_a_real_search_chose_shows_its_results(tiny_search: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_search, tmp_path / "here")
    recipe = load_recipe(tmp_path / "here/search/slr.yaml")
    summary = results_of(recipe)
    out = tmp_path / "here/hybrid"
    execute(plan_merge(recipe, open_pair(*recipe.sources())), out, fsync=False)
    card = (out / "README.md").read_text(encoding="utf-8")
    chosen = summary["chosen"]
    rows = [f"| **{chosen['slr']['label']}** (this model) | "] + [
        f"| {found['label']} | " for key, found in chosen.items() if key != "slr"
    ]
    scores = [chosen["slr"], *(found for key, found in chosen.items() if key != "slr")]
    table = "".join(
        f"{row}{found['quality']:.4f} | {found['diversity']:.4f} |\n" for row, found in zip(rows, scores, strict=True)
    )
    assert (
        f"`slrmerge search` scored {summary['candidates']} candidates on the proxy task `crc`:\n"
        "quality Q is the probability on valid answers, diversity D the entropy among them.\n\n"
        f"| | Q | D (nats) |\n|---|---|---|\n{table}\n"
        "![quality and diversity of all candidates](tradeoff.png)\n\n## How to run it\n"
    ) in card
    assert (out / "tradeoff.png").read_bytes() == (tiny_search / "search/tradeoff.png").read_bytes()
    assert verify_checkpoint(out).against_sources
