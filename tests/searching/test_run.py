"""A search from its options to its folder: what it writes where, killed and resumed, in little space, quick, exact."""

import builtins
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import slrmerge as slr
from slrmerge.checkpoint.opening import open_checkpoint, open_pair
from slrmerge.checkpoint.pair import ModelPair
from slrmerge.errors import (
    BusyError,
    MissingExtraError,
    NoSpaceError,
    OptionError,
    OutputError,
    PlanError,
    RecipeError,
    SlrmergeError,
    SourceChangedError,
    UnsupportedModelError,
)
from slrmerge.io.options import make_options
from slrmerge.io.output_folder import OutputFolder, staging_folder
from slrmerge.io.progress import Progress
from slrmerge.merging.executor import merge
from slrmerge.merging.plan.planner import plan_merge
from slrmerge.recipe.load import load_recipe
from slrmerge.searching.options import SearchOptions
from slrmerge.searching.plots import draw_result
from slrmerge.searching.results import SearchResult
from slrmerge.searching.results_folder import read_result
from slrmerge.searching.run import Search, search
from slrmerge.searching.scorer import LocalScorer
from slrmerge.searching.select import select
from slrmerge.searching.selection import NEAR_TIE
from slrmerge.searching.sweep.cost import Cost
from tests.checkpoints import llama_tensors, write_checkpoint
from tests.conftest import TINY
from tests.gguf_files import write_gguf
from tests.merging.faults import Stop, age, leftovers, snapshot, stop, tree, write_files
from tests.problems import refused
from tests.searching.pairs import (
    LAYERS,
    ROOT,
    TEMPLATE,
    SmallPair,
    Watcher,
    hurry,
    make_model,
    no_pictures,
    prompts_of,
    scores_of_paths,
)

ALL = ["early.yaml", "heatmaps.png", "heatmaps.svg", "late.yaml", "prompts.npz", "report.html", "results.csv",
       "slr.yaml", "soup.yaml", "summary.json", "tradeoff.png", "tradeoff.svg"]  # fmt: skip
STAGES = LAYERS + 1  # every layer, and the head
ALL_STAGES = 2 * STAGES  # of all candidates, and of those that answer the held-out prompts

hurried = pytest.mark.usefixtures("hurried")


def results(folder: Path) -> dict[str, bytes]:
    """The files of a search, without the time that it took."""
    found = snapshot(folder) or {}
    summary = json.loads(found.pop("summary.json"))
    del summary["elapsed_s"]
    return {**found, "summary.json": json.dumps(summary).encode()}


@pytest.fixture(scope="module")
def plain(made_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of an undisturbed search of the small pair."""
    pair = SmallPair(Path(shutil.copytree(made_pair, tmp_path_factory.mktemp("plain") / "pair")))
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        pair.run()
    return results(pair.out)


# options and the constructor


@hurried
def test_the_constructor_opens_nothing(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, also = small.recipe(restore=[1, 2]), small.recipe(alpha=0.3)
    opened: list[object] = []
    for name in ("socket.socket.connect", "slrmerge.recipe.model.open_pair", "slrmerge.searching.prepare.tokenize"):
        monkeypatch.setattr(name, lambda *args, **_: opened.append(args))
    real_open = builtins.open

    def noting_open(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(file)
        return real_open(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", noting_open)
    for side in ("pre", "post"):
        shutil.rmtree(small.folder / side)
    Search(recipe, SearchOptions(threads=1, also=(also,)))
    Search({"pretrained": "org/nowhere", "posttrained": "org/nowhere-chat"}, SearchOptions(also=(recipe,)))
    assert opened == []


@hurried
@pytest.mark.parametrize("threads", [1, 2])
def test_torch_threads_are_restored(small: SmallPair, threads: int) -> None:
    before, seen = torch.get_num_threads(), []
    options = SearchOptions(threads=threads, spaces=())
    ready = Search(small.recipe(), options)
    assert torch.get_num_threads() == before
    ready.run(small.out, progress=Watcher(1, lambda: seen.append(torch.get_num_threads())))
    assert (seen, torch.get_num_threads()) == ([threads], before)
    with pytest.raises(Stop):
        ready.run(small.folder / "other", progress=Watcher(1, stop))
    assert torch.get_num_threads() == before


@hurried
def test_an_estimate_uses_the_same_threads(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []

    def rate(*_: object) -> float:
        seen.append(torch.get_num_threads())
        return 1e11

    monkeypatch.setattr("slrmerge.searching.estimate.measured_rate", rate)
    Search(small.recipe(), SearchOptions(threads=2)).estimate()
    assert (set(seen), torch.get_num_threads()) == ({2}, before)


@pytest.mark.parametrize(
    ("options", "code", "where"),
    [
        ({"task": "crossword"}, "invalid-choice", "task"),
        ({"spaces": ("intervals", "circles")}, "invalid-choice", "spaces"),
        ({"spaces": "circles"}, "invalid-choice", "spaces"),
        ({"dtype": "float16"}, "invalid-choice", "dtype"),
        ({"min_quality": 1.5}, "out-of-range", "min_quality"),
        ({"threads": 0}, "out-of-range", "threads"),
        ({"max_memory": "lots"}, "invalid-size", "max_memory"),
        ({"depth": 3}, "unknown-option", "depth"),
        ({"device": "warp"}, "device-unavailable", "device"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_opened(
    tmp_path: Path, options: dict[str, Any], code: str, where: str
) -> None:
    with refused(OptionError, code) as caught:
        search({"pretrained": "./nowhere", "posttrained": "./nowhere-else"}, tmp_path / "out", **options)
    assert [problem.where for problem in caught.value.problems] == [where]


def test_several_invalid_options_are_reported_together() -> None:
    with refused(OptionError, "out-of-range", "invalid-choice"):
        SearchOptions(min_quality=-1, task="crossword")


def test_spaces_and_recipes_may_be_one_value_or_a_list() -> None:
    for name, one, two in (("spaces", "soups", "mlp"), ("also", "mine.yaml", {"alpha": 0.5})):
        for given, kept in ((one, (one,)), ([one, two], (one, two)), ((two,), (two,)), (two, (two,))):
            assert getattr(make_options(SearchOptions, {name: given}), name) == kept


@pytest.mark.parametrize("value", [3, None, object()])
def test_what_is_no_recipe_is_refused(value: Any) -> None:
    with refused(OptionError, "wrong-type"):
        Search(value)


def test_an_invalid_recipe_is_refused() -> None:
    with refused(RecipeError, "missing-key"):
        Search({"pretrained": "./pre"})


@pytest.mark.parametrize("missing", [("transformers",), ("matplotlib",), ("transformers", "matplotlib")])
def test_missing_packages_are_named(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    monkeypatch.setattr("slrmerge.errors.find_spec", lambda name: None if name in missing else object())
    with refused(MissingExtraError, "missing-extra") as caught:
        small.search()
    assert all(name in caught.value.problems[0].what for name in missing)


def test_the_repr_is_one_line(small: SmallPair) -> None:
    assert "\n" not in repr(small.search())
    assert "./pre" in repr(small.search())


# results


@hurried
def test_a_search_writes_its_results_and_nothing_else(small: SmallPair) -> None:
    before = tree(small.folder)
    watcher = Watcher()
    result = small.run(progress=watcher)
    assert sorted(snapshot(small.out) or {}) == ALL
    assert read_result(small.out).rows == result.rows
    assert leftovers(small.out) == []
    after = tree(small.folder)
    assert {path for path in before if before[path] != after.get(path)} <= {str(small.folder)}
    assert watcher.messages == []
    assert sum(watcher.totals) == watcher.advanced
    assert len(watcher.stages) == ALL_STAGES
    assert len(result.rows) == 2 + LAYERS * (LAYERS + 1) // 2 + 3


@hurried
def test_the_folder_has_the_returned_result(small: SmallPair) -> None:
    result = small.run(min_quality=0.8)
    found = read_result(small.out)
    assert found.elapsed_s == round(result.elapsed_s, 1)
    assert (found.choice, found.summary()) == (result.choice, result.summary())


@hurried
def test_the_values_of_prompts_have_the_means_of_the_table(small: SmallPair) -> None:
    result, kept = small.run(), prompts_of(small.out)
    assert kept["quality"].shape == kept["diversity"].shape == (len(result.rows), 6)
    assert list(kept["candidates"]) == [each.info.label for each in result.rows]
    assert [each.quality for each in result.rows] == list(kept["quality"].mean(1))
    assert [each.diversity for each in result.rows] == list(kept["diversity"].mean(1))
    assert kept["questions"][0].startswith("Generate a random integer in the range [")
    assert kept["questions"][-1].startswith("Generate a random letter from ")
    assert ((kept["quality"] > 0) & (kept["quality"] < 1)).all()


@hurried
def test_the_same_search_gives_the_same_bytes(small: SmallPair, plain: dict[str, bytes]) -> None:
    small.run()
    assert results(small.out) == plain


@hurried
def test_a_search_of_an_open_pair_gives_the_same_scores(small: SmallPair, plain: dict[str, bytes]) -> None:
    result = search(small.open(), str(small.out), threads=1)
    assert (small.out / "results.csv").read_bytes() == plain["results.csv"]
    assert result.choice.base.to_dict() == {f"{side}trained": str(small.folder / side) for side in ("pre", "post")}
    assert (small.out / "slr.yaml").is_file()


@hurried
def test_the_spaces_decide_what_is_scored_and_selected(small: SmallPair) -> None:
    result = small.run(spaces=["attention", "mlp"])
    assert [each.info.space for each in result.rows] == ["post", "pre", *["attention"] * 10, *["mlp"] * 10]
    assert list(result.choice.named()) == ["post", "slr", "early", "late", "pre"]
    named = result.choice.named().items()
    assert {row.info.space for name, row in named if name not in ("post", "pre")} == {"attention"}
    assert {path.name for path in small.out.glob("*.yaml")} == {"slr.yaml", "early.yaml", "late.yaml"}


@hurried
def test_leftovers_of_a_killed_selection_are_replaced_with_the_results(small: SmallPair) -> None:
    small.run()
    (small.out / "results.csv.new").touch()
    small.run(overwrite=True)
    assert not (small.out / "results.csv.new").exists()


@hurried
def test_the_choice_of_a_search_merges_and_its_card_shows_the_search(small: SmallPair) -> None:
    result = search(small.open(), small.out, threads=1)
    assert result.choice.slr is not None
    merge(result.choice, small.folder / "chosen", fsync=False)
    merge(small.out / "slr.yaml", small.folder / "from-file", fsync=False)
    card = (small.folder / "chosen" / "README.md").read_text()
    for row in result.choice.named().values():
        assert f"| {row.quality:.4f} | {row.diversity:.4f} |" in card
    assert f"**{result.choice.slr.info.label}**" in card
    assert (small.folder / "chosen" / "tradeoff.png").read_bytes() == (small.out / "tradeoff.png").read_bytes()
    chosen, from_file = ((small.folder / name / "model.safetensors").read_bytes() for name in ("chosen", "from-file"))
    assert chosen == from_file


# recipes besides


@hurried
def test_a_recipe_that_is_not_linear_is_refused(small: SmallPair) -> None:
    with refused(PlanError, "unsupported-blend") as caught:
        small.run(also=small.recipe_file("other.yaml", alpha=0.5, blend="slerp"))
    assert caught.value.problems[0].where == "other.yaml"


@hurried
@pytest.mark.parametrize("side", ["pretrained", "posttrained"])
def test_a_recipe_for_other_checkpoints_is_refused(small: SmallPair, side: str) -> None:
    other = small.recipe_file("other.yaml", **{side: "./elsewhere", "alpha": 0.5})
    with refused(PlanError, "other-checkpoint") as caught:
        small.run(also=other)
    assert caught.value.problems[0].where == f"other.yaml: $.{side}"
    assert leftovers(small.out) == []


@hurried
def test_a_recipe_may_name_the_same_folders_otherwise(small: SmallPair) -> None:
    (small.folder / "link").symlink_to(small.folder / "pre")
    sides = {"pretrained": "../link", "posttrained": str(small.folder / "post")}
    other = small.recipe_file("deep/other.yaml", **sides, alpha=0.3)
    assert small.run(also=other).rows[-1].info.label == "other.yaml"


@hurried
def test_the_recipes_own_rules_and_other_recipes_are_scored(small: SmallPair) -> None:
    own = small.recipe(restore=[[0, 0], [2, 2]])
    soup, other = small.recipe_file("soup.yaml", alpha=0.3), {"alpha": 0.35}
    sides = {side: str(small.folder / side.removesuffix("trained")) for side in ("pretrained", "posttrained")}
    result = small.search(own, also=[soup, {**sides, **other}]).run(small.out)
    assert [each.info.label for each in result.rows[-3:]] == ["the recipe's own", "soup.yaml", "recipe 2"]
    assert [each.info.space for each in result.rows[-3:]] == ["recipe"] * 3
    assert result.choice.slr is not None
    assert result.choice.slr.info.space == "interval"


@hurried
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recipes_with_equal_alphas_are_one_candidate_and_a_finalist(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr("slrmerge.searching.run.RESCORED_AT_LEAST", 0)
    monkeypatch.setattr("slrmerge.searching.run.ROUNDING_MARGIN", 0.0)
    plain = {row.info.label: row for row in small.run(small.folder / "plain", dtype=dtype).rows}
    rough = next(row.info for row in plain.values() if not row.exact) if dtype == "bfloat16" else plain["layer 1"].info
    same = small.recipe(**rough.rules.rules())
    also = small.recipe_file("a = b.yaml", **rough.rules.rules())
    result = small.search(same, also=also, dtype=dtype).run(small.out)
    rows = {row.info.label: row for row in result.rows}
    assert rows.keys() == plain.keys()
    assert rows[rough.label].info.also_named == ("the recipe's own", "a = b.yaml")
    assert rows[rough.label].exact
    assert read_result(small.out).rows == result.rows


@hurried
def test_recipes_with_the_same_file_name_keep_their_own_scores(small: SmallPair) -> None:
    alphas = [0.1, 0.3, 0.35]
    files = [small.recipe_file(f"{number}/r.yaml", pretrained="../pre", posttrained="../post", alpha=alpha)
             for number, alpha in enumerate(alphas)]  # fmt: skip
    result = small.run(also=files, dtype="bfloat16")
    assert [each.info.label for each in result.rows[-3:]] == ["r.yaml", "r.yaml (2)", "r.yaml (3)"]
    for alpha, both in zip(alphas, result.rows[-3:], strict=True):
        out = small.folder / f"alone-{alpha}"
        alone = small.search(small.recipe(alpha=alpha), spaces=()).run(out).rows[-1]
        assert (both.exact, both.info.alpha) == (True, alpha)
        assert both.quality == pytest.approx(alone.quality, abs=1e-6)
        assert both.diversity == pytest.approx(alone.diversity, abs=1e-6)


@hurried
def test_a_mergekit_config_is_scored(small: SmallPair) -> None:
    config = small.folder / "mergekit.yml"
    models = [f"- model: {small.folder / side}\n  parameters: {{weight: {w}}}" for side, w in (("post", 7), ("pre", 3))]
    config.write_text("merge_method: linear\nmodels:\n" + "\n".join(models) + "\n")
    result = small.run(also=[config, small.recipe_file("soup.yaml", alpha=0.3)])
    assert result.rows[-1].info.label == "mergekit.yml"
    assert result.rows[-1].info.also_named == ("soup.yaml",)
    assert read_result(small.out).rows == result.rows


# output folders


@hurried
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_may_be_filled(small: SmallPair, overwrite: bool) -> None:
    small.out.mkdir()
    small.run(overwrite=overwrite, spaces=())
    assert (small.out / "results.csv").exists()


REFUSED: dict[str, tuple[Callable[[SmallPair], object], bool, str]] = {
    "other files": (lambda pair: write_files(pair.out, {"notes.md": b"mine"}), False, "output-exists"),
    "other files, overwriting": (
        lambda pair: write_files(pair.out, {"notes.md": b"mine"}), True, "output-not-replaceable",
    ),
    "results and more, overwriting": (
        lambda pair: write_files(pair.out, dict.fromkeys(["results.csv", "summary.json", "z.md", "hybrid/x"], b"")),
        True,
        "output-not-replaceable",
    ),
    "a checkpoint, overwriting": (
        lambda pair: shutil.copytree(pair.folder / "pre", pair.out), True, "output-not-replaceable",
    ),
    "a file": (lambda pair: pair.out.write_text("mine"), True, "output-is-a-file"),
}  # fmt: skip


@hurried
@pytest.mark.parametrize("case", REFUSED)
def test_only_the_results_of_a_search_are_replaced(small: SmallPair, case: str) -> None:
    prepare, overwrite, code = REFUSED[case]
    prepare(small)
    recipe = small.recipe()
    before = tree(small.folder)
    with refused(OutputError, code) as caught:
        small.search(recipe).run(small.out, overwrite=overwrite)
    assert caught.value.problems[0].where == str(small.out)
    assert tree(small.folder) == before


@hurried
def test_older_results_are_replaced_only_with_overwrite(small: SmallPair) -> None:
    small.run(spaces="soups")
    old = snapshot(small.out)
    with refused(OutputError, "output-exists"):
        small.run(spaces="intervals")
    assert snapshot(small.out) == old
    small.run(spaces="intervals", overwrite=True)
    assert len(read_result(small.out).rows) == 12
    assert not (small.out / "soup.yaml").exists()
    assert leftovers(small.out) == []


@hurried
@pytest.mark.parametrize("side", ["pre", "post"])
def test_a_source_is_never_written_to(small: SmallPair, side: str) -> None:
    for out in (small.folder / side, small.folder / side / "search"):
        with refused(OutputError, "output-overlaps") as caught:
            small.run(out, overwrite=True)
        assert caught.value.problems[0].where == str(out)


@hurried
def test_an_output_that_another_process_writes_is_busy(small: SmallPair) -> None:
    with OutputFolder(small.out).locked(Progress()), refused(BusyError, "output-busy"):
        small.run()
    assert not small.out.exists()
    assert not staging_folder(small.out).exists()


@hurried
def test_the_staging_folder_of_a_killed_merge_is_not_mixed_with_results(small: SmallPair) -> None:
    write_files(
        staging_folder(small.out),
        {"model.safetensors": b"half", ".slrmerge-journal": b"x", "plots/x.png": b"", "x.csv.new": b""},
    )
    small.run(spaces=())
    assert sorted(snapshot(small.out) or {}) == sorted({*ALL} - {"slr.yaml", "soup.yaml", "early.yaml", "late.yaml"})
    assert leftovers(small.out) == []


@hurried
def test_a_merge_after_a_killed_search_is_not_mixed_with_its_states(small: SmallPair) -> None:
    with pytest.raises(Stop):
        small.run(progress=Watcher(3, stop))
    merge(small.recipe(restore=[1, 2]), small.out, fsync=False)
    assert "results.csv" not in (snapshot(small.out) or {})
    assert not (small.out / "first").exists()
    assert leftovers(small.out) == []


# disk and memory


@hurried
def test_missing_space_is_reported_before_anything_is_written(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slrmerge.io.output_folder.files.free_bytes", lambda target: 2_000_000)
    cost = Cost(flop=1.0, states_bytes=3_210_000_000, states=1)
    monkeypatch.setattr(LocalScorer, "cost", lambda self, request: cost)
    ready = small.search()
    before = tree(small.folder)
    with refused(NoSpaceError, "no-space") as caught:
        ready.run(small.out)
    assert caught.value.problems[0].where == str(small.out)
    assert "3.21 GB" in caught.value.problems[0].what
    assert tree(small.folder) == before


@hurried
@pytest.mark.parametrize(
    ("options", "is_refused", "may_skip_states"),
    [
        ({}, True, True),
        ({"max_memory": 1}, True, False),
        ({"max_memory": 1, "resume": False}, True, False),
        ({"resume": False}, False, False),
    ],
)
def test_states_in_files_need_space(
    small: SmallPair,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    is_refused: bool,
    may_skip_states: bool,
) -> None:
    monkeypatch.setattr("slrmerge.io.output_folder.files.free_bytes", lambda target: 10)
    ready = small.search(**options)
    if not is_refused:
        assert ready.output_folder(small.out, overwrite=False).path == small.out
        return
    with refused(NoSpaceError, "no-space") as caught:
        ready.output_folder(small.out, overwrite=False)
    assert ("resume=False" in caught.value.problems[0].remedy) == may_skip_states


@hurried
@pytest.mark.parametrize("resume", [True, False])
def test_states_that_exceed_the_memory_are_kept_in_files_and_the_results_are_the_same(
    small: SmallPair, plain: dict[str, bytes], resume: bool
) -> None:
    staging = staging_folder(small.out)
    seen: set[str] = set()

    class Looking(Watcher):
        def on_advance(self, count: int) -> None:
            seen.update(path.name.partition("-")[0] for path in staging.glob("first/*"))

    small.run(progress=Looking(), max_memory=1, resume=resume)
    assert seen == {"progress.json", "states", "states.new", "log_probs.npz"}
    assert results(small.out) == plain
    assert leftovers(small.out) == []


@hurried
def test_without_resume_nothing_is_written_while_searching(small: SmallPair) -> None:
    seen: list[dict[str, bytes]] = []
    watcher = Watcher(STAGES, lambda: seen.append(snapshot(staging_folder(small.out)) or {}))
    small.run(progress=watcher, resume=False)
    assert seen == [{}]


# killed and resumed


@hurried
@pytest.mark.parametrize("at", [1, 3, STAGES])
def test_a_stopped_search_resumes_after_the_last_finished_layer(
    small: SmallPair, plain: dict[str, bytes], at: int
) -> None:
    with pytest.raises(Stop) as caught:
        small.run(progress=Watcher(at, stop))
    assert len(getattr(caught.value, "__notes__", ())) == 1
    assert not small.out.exists()
    again = Watcher()
    small.run(progress=again)
    assert len(again.messages) == 1
    assert len(again.stages) == ALL_STAGES - (at - 1)
    assert sum(again.totals) == again.advanced
    assert results(small.out) == plain
    assert leftovers(small.out) == []


@hurried
def test_a_killed_search_resumes(small: SmallPair, plain: dict[str, bytes]) -> None:
    small.recipe_file()
    command = [sys.executable, "-m", "tests.searching.pairs", "3", str(small.folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    assert not small.out.exists()
    again = Watcher()
    small.run(progress=again)
    assert len(again.stages) == ALL_STAGES - 2
    assert results(small.out) == plain
    assert leftovers(small.out) == []


@hurried
def test_a_search_that_stopped_while_writing_its_results_is_not_computed_again(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("slrmerge.searching.plots.draw_result", failing)
        with pytest.raises(Stop):
            small.run()
    assert not small.out.exists()
    again = Watcher()
    small.run(progress=again)
    assert again.stages == []
    assert sorted(snapshot(small.out) or {}) == ALL


@hurried
def test_without_resume_a_search_starts_again(small: SmallPair) -> None:
    with pytest.raises(Stop) as caught:
        small.run(progress=Watcher(3, stop), resume=False)
    assert not hasattr(caught.value, "__notes__")
    assert leftovers(small.out) == []
    again = Watcher()
    small.run(progress=again)
    assert again.messages == []
    assert len(again.stages) == ALL_STAGES


OTHERS: dict[str, Callable[[SmallPair], dict[str, Any]]] = {
    "other candidates": lambda pair: {"spaces": ("intervals",)},
    "another dtype": lambda pair: {"dtype": "bfloat16"},
    "fewer prompts": lambda pair: {"quick": True},
    "a source that was touched": lambda pair: age(pair.folder / "pre") or {},  # type: ignore[func-returns-value]
}


@hurried
@pytest.mark.parametrize("case", OTHERS)
def test_states_of_another_search_are_not_resumed(small: SmallPair, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr("slrmerge.searching.prepare.QUICK_PROMPTS", 2)
    with pytest.raises(Stop):
        small.run(progress=Watcher(3, stop))
    options, again = OTHERS[case](small), Watcher()
    small.run(progress=again, **options)
    small.run(small.folder / "plain", **options)
    assert len(again.messages) == 1
    assert len(again.stages) >= STAGES
    assert results(small.out) == results(small.folder / "plain")
    assert leftovers(small.out) == []


def spoil_states(folder: Path) -> None:
    (states,) = folder.glob("states-*")
    states.write_bytes(bytes(states.stat().st_size))


SPOILED: dict[str, Callable[[Path], object]] = {
    "altered states": spoil_states,
    "missing states": lambda folder: [path.unlink() for path in folder.glob("states-*")],
    "an empty progress file": lambda folder: (folder / "progress.json").write_bytes(b""),
    "a progress file with a list": lambda folder: (folder / "progress.json").write_bytes(b"[]"),
}


@hurried
@pytest.mark.parametrize("case", SPOILED)
def test_damaged_states_are_not_resumed(small: SmallPair, plain: dict[str, bytes], case: str) -> None:
    with pytest.raises(Stop):
        small.run(progress=Watcher(3, stop))
    SPOILED[case](staging_folder(small.out) / "first")
    again = Watcher()
    small.run(progress=again)
    assert len(again.messages) == 1
    assert len(again.stages) == ALL_STAGES
    assert results(small.out) == plain


@hurried
def test_a_source_that_changes_during_the_search_is_an_error_without_results(small: SmallPair) -> None:
    age(small.folder / "post")

    def touch() -> None:
        os.utime(small.folder / "post" / "model.safetensors")

    with pytest.raises(SourceChangedError) as caught:
        small.run(progress=Watcher(2, touch))
    assert {problem.where for problem in caught.value.problems} == {str(small.folder / "post" / "model.safetensors")}
    assert not small.out.exists()


@hurried
@pytest.mark.parametrize(
    "place", ["numpy.savez", "slrmerge.searching.plots.draw_result", "slrmerge.io.output_folder.os.replace"]
)
def test_a_full_disk_is_reported(small: SmallPair, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with refused(NoSpaceError, "no-space"):
            small.run(spaces=())
    assert not small.out.exists()


# a first pass that is not exact


@pytest.fixture(scope="module")
def exact(tiny_search: Path) -> SearchResult:
    """The example pair, searched exactly."""
    return read_result(tiny_search / "search")


@pytest.mark.parametrize(
    ("options", "first"),
    [({"quick": True}, "8 prompts, float32"), ({"dtype": "bfloat16"}, "40 prompts, bfloat16")],
    ids=["quick", "bfloat16"],
)
def test_two_passes_select_as_an_exact_search(
    tiny_search: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exact: SearchResult,
    options: dict[str, Any],
    first: str,
) -> None:
    monkeypatch.setattr("slrmerge.searching.plots.draw_result", no_pictures)
    watcher = Watcher()
    result = search(tiny_search / "pair.yaml", tmp_path / "search", threads=1, progress=watcher, **options)
    assert len(watcher.totals) == 3  # all candidates, finalists, held-out prompts
    assert 0 < watcher.advanced <= sum(watcher.totals)  # fewer where both sides have the same layer
    again = [each for each in result.rows if each.exact]
    assert 20 < len(again) < len(result.rows) == len(exact.rows)
    (note,) = result.notes
    for figure in (str(len(result.rows)), str(len(again)), first, "40 prompts, float32"):
        assert figure in note
    assert list(result.post_quality) == [first, "40 prompts, float32"]
    by_label = {each.info.label: each for each in exact.rows}
    for each in again:
        assert (each.prompts, each.dtype) == (40, "float32")
        assert each.quality == pytest.approx(by_label[each.info.label].quality, abs=1e-6)
        assert each.diversity == pytest.approx(by_label[each.info.label].diversity, abs=1e-6)
    assert {each.conditions for each in result.rows if not each.exact} == {first}
    selected, wanted = result.choice.named(), exact.choice.named()
    assert {name: each.info for name, each in selected.items()} == {name: each.info for name, each in wanted.items()}
    kept = prompts_of(tmp_path / "search")
    assert kept["quality"].shape == (len(result.rows), 40)
    asked = (~np.isnan(kept["quality"])).sum(1)
    assert list(asked) == [each.prompts for each in result.rows]
    assert np.allclose(np.nanmean(kept["quality"], 1), [each.quality for each in result.rows], rtol=0, atol=1e-12)


def test_the_selection_in_the_example_pair_is_that_of_its_readme(exact: SearchResult) -> None:
    named = exact.choice.named()
    shown = {
        "pre": ("pre-trained", 0.652, 1.927),
        "post": ("post-trained", 0.964, 1.048),
        "soup": ("soup 0.80", 0.873, 1.838),
        "slr": ("layers 2–8", 0.891, 1.907),
        "early": ("layers 0–6", 0.936, 1.738),
        "late": ("layers 3–9", 0.865, 1.892),
    }
    assert len(exact.rows) == 76
    text = (TINY / "README.md").read_text()
    for name, (label, quality, diversity) in shown.items():
        found = named[name]
        assert (found.info.label, round(found.quality, 3), round(found.diversity, 3)) == (label, quality, diversity)
        assert f"| {quality:.3f} | {diversity:.3f} |" in text.replace("**", "")


@hurried
def test_a_search_that_stopped_among_its_finalists_resumes_there(small: SmallPair) -> None:
    small.run(small.folder / "plain", dtype="bfloat16")
    with pytest.raises(Stop):
        small.run(progress=Watcher(STAGES + 3, stop), dtype="bfloat16")
    again = Watcher()
    small.run(progress=again, dtype="bfloat16")
    assert len(again.stages) == ALL_STAGES - 2
    assert results(small.out) == results(small.folder / "plain")


def test_the_example_pair_has_no_near_ties(exact: SearchResult) -> None:
    assert exact.choice.slr is not None
    assert exact.choice.near_ties == ()
    runner_up = max(
        each.diversity for each in exact.rows
        if each.info.space == "interval" and each.feasible and each is not exact.choice.slr
    )  # fmt: skip
    assert NEAR_TIE < exact.choice.slr.diversity - runner_up < 0.01


# the right question


def spoil_template(pair: SmallPair, template: str) -> None:
    (pair.folder / "post" / "chat_template.jinja").write_text(template)


DATED = "{{ 'integer' if strftime_now('%d') == '07' else 'letter' }}" + TEMPLATE


@hurried
@pytest.mark.parametrize("code", ["question-not-in-prompt", "open-thinking"])
def test_a_wrong_prompt_is_refused_before_anything_is_downloaded_or_written(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    changed = {
        "question-not-in-prompt": TEMPLATE.replace("message.content", "message.text"),
        "open-thinking": TEMPLATE.replace("<|assistant|>{%", "<|assistant|><think>{%"),
    }
    spoil_template(small, changed[code])
    downloads: list[object] = []
    monkeypatch.setattr(ModelPair, "download", lambda *args, **_: downloads.append(args))
    for attempt in (lambda: small.run(), lambda: small.search().estimate()):
        with refused(UnsupportedModelError, code):
            attempt()
    assert downloads == []
    assert leftovers(small.out) == []


@hurried
def test_a_token_without_a_row_in_the_embedding_is_refused(small: SmallPair) -> None:
    path = small.folder / "post" / "tokenizer.json"
    content = json.loads(path.read_bytes())
    content["model"]["vocab"]["integer"] = 9999
    path.write_text(json.dumps(content))
    with refused(UnsupportedModelError, "token-without-embedding"):
        small.search().estimate()


@hurried
def test_the_summary_has_a_prompt_and_the_date_in_it(small: SmallPair) -> None:
    spoil_template(small, DATED)
    result = small.run(spaces=(), date="2025-03-07")
    assert (result.date, result.prompt[:21]) == ("2025-03-07", "integer<|user|>Genera")
    summary = json.loads((small.out / "summary.json").read_bytes())
    assert (summary["date"], summary["prompt"]) == (result.date, result.prompt)
    assert read_result(small.out).summary() == result.summary()


@hurried
def test_a_search_that_resumes_on_another_day_keeps_its_date(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_template(small, DATED)
    with pytest.raises(Stop):
        small.run(progress=Watcher(3, stop), date="2025-03-07")
    again = Watcher()
    result = small.run(progress=again)
    assert (result.date, len(again.stages)) == ("2025-03-07", ALL_STAGES - 2)
    assert sorted(snapshot(small.out) or {}) == ALL


@hurried
def test_another_date_starts_a_search_anew(small: SmallPair) -> None:
    spoil_template(small, DATED)
    with pytest.raises(Stop):
        small.run(progress=Watcher(3, stop), date="2025-03-07")
    again = Watcher()
    assert small.run(progress=again, date="2025-03-08").date == "2025-03-08"
    assert len(again.stages) == ALL_STAGES


@hurried
def test_a_task_of_answers_of_any_length_is_searched(small: SmallPair) -> None:
    """Scores are those of transformers, token by token."""
    task = small.folder / "mine.yaml"
    task.write_text("questions: [{text: Generate a random letter, answers: [A, A B, A B C, D E, F]}]")
    result = small.run(task=str(task), spaces="intervals")
    assert result.task == "mine.yaml"
    assert read_result(small.out).rows == result.rows
    (prompt,) = small.search(task=str(task)).prepared.prompts
    assert [len(path) for path in prompt.answers] == [2, 3, 3, 2, 1]
    for row, side in ((result.choice.post, "post"), (result.choice.pre, "pre")):
        assert row is not None
        quality, diversity = scores_of_paths(small.folder / side, prompt)
        assert (row.quality, row.diversity) == (
            pytest.approx(quality, abs=1e-6), pytest.approx(diversity, abs=1e-6),
        )  # fmt: skip


# vocabularies of different sizes


@pytest.fixture
def unlike(made_pair: Path, tmp_path: Path) -> SmallPair:
    """A pair whose post-trained side has more tokens."""
    shutil.copytree(made_pair / "pre", tmp_path / "pre")
    make_model(tmp_path / "post", seed=126, more_words=8)
    return SmallPair(tmp_path)


@hurried
def test_vocabularies_of_different_sizes_leave_out_what_cannot_be_asked(unlike: SmallPair) -> None:
    result = unlike.run()
    assert {row.info.space for row in result.rows} == {"post", "interval"}
    assert len(result.rows) == 1 + LAYERS * (LAYERS + 1) // 2
    (note,) = result.notes
    assert "lm_head.weight" in note
    assert "3 soups" in note
    assert result.choice.pre is None
    found = read_result(unlike.out)
    assert (found.rows, found.choice, found.summary()) == (result.rows, result.choice, result.summary())
    best = select(unlike.out, min_quality=0.0).choice
    assert best.slr is not None
    merge(best, unlike.folder / "merged", fsync=False)
    pictures = unlike.folder / "pictures"
    pictures.mkdir()
    draw_result(pictures, result.rows, result.choice, result.summary())
    assert (pictures / "tradeoff.png").is_file()


@hurried
def test_a_shared_vocabulary_is_still_shared_after_another_selection(unlike: SmallPair) -> None:
    unlike.run(recipe=unlike.recipe(vocabulary="shared"))
    select(unlike.out, min_quality=0.0)
    written = load_recipe(unlike.out / "soup.yaml")
    assert written.vocabulary == "shared"
    assert plan_merge(written).kinds["linear"]


@hurried
def test_a_recipe_that_needs_another_vocabulary_is_refused_and_its_remedy_helps(unlike: SmallPair) -> None:
    with refused(PlanError, "different-shapes") as caught:
        unlike.search(also=unlike.recipe_file("soup.yaml", alpha=0.3)).estimate()
    assert caught.value.problems[0].where == "soup.yaml"
    kept = [{"match": name, "alpha": 0} for name in ("lm_head.weight", "model.embed_tokens.weight")]
    better = unlike.recipe_file("soup.yaml", alpha=0.3, tensors=kept)
    assert unlike.run(spaces=(), also=better).rows[-1].info.label == "soup.yaml"


# costs


@hurried
def test_an_estimate_writes_nothing_and_covers_the_papers_models(small: SmallPair) -> None:
    ready = small.search()
    before = tree(small.folder)
    estimate = ready.estimate()
    assert tree(small.folder) == before
    contexts = ready.prepared.first.request.contexts
    assert (estimate.prompts, estimate.prompt_tokens) == (6, sum(len(context.ids) for context in contexts))
    assert estimate.packed_tokens < estimate.prompt_tokens
    assert [(row.name, row.candidates, row.dtype) for row in estimate.rows] == [
        ("post", 15, "float32"), ("post, held-out", 6, "float32"), ("Llama-3.1-8B", 530, "bfloat16"),
        ("Qwen2.5-7B", 408, "bfloat16"), ("Gemma-2-9B", 905, "bfloat16"),
    ]  # fmt: skip
    for row in estimate.rows:
        assert row.seconds == row.cost.flop / 1e11 + row.overhead_s > 0
    assert [row.overhead_s > 0 for row in estimate.rows] == [
        True,
        True,
        False,
        False,
        False,
    ]  # layers of width 16 are small
    assert json.loads(json.dumps(estimate.to_dict()))["rows"][0]["seconds"] == estimate.rows[0].seconds


@hurried
def test_the_number_of_states_is_that_of_the_estimate(small: SmallPair) -> None:
    watcher = Watcher()
    ready = small.search()
    states = ready.estimate().rows[0].cost.states
    ready.run(small.out, progress=watcher)
    assert watcher.totals[0] == states
    assert watcher.advanced == sum(watcher.totals)


@hurried
def test_a_quick_estimate_is_of_the_quick_pass(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrmerge.searching.prepare.QUICK_PROMPTS", 2)
    assert small.search(quick=True).estimate().prompts == 2


@hurried
def test_an_estimate_bounds_the_finalists_of_a_rough_first_pass(small: SmallPair) -> None:
    """Where all scores tie, every candidate is a finalist."""
    first, finalists, held_out, *_ = small.search(dtype="bfloat16").estimate().rows
    (exact, *_) = small.search().estimate().rows
    assert (first.dtype, finalists.dtype, held_out.dtype) == ("bfloat16", "float32", "float32")
    assert finalists.candidates == first.candidates == exact.candidates
    assert (finalists.name, finalists.cost) == ("post, finalists at most", exact.cost)


# models that cannot be searched


def without_template(pair: SmallPair) -> None:
    (pair.folder / "post" / "chat_template.jinja").unlink()


def with_experts(pair: SmallPair) -> None:
    path = pair.folder / "post" / "config.json"
    values = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}))


def without_tokenizer(pair: SmallPair) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (pair.folder / "post" / name).unlink()


@hurried
@pytest.mark.parametrize("spoil", [without_template, with_experts, without_tokenizer])
def test_an_unsupported_model_is_refused_before_anything_is_written(
    small: SmallPair, spoil: Callable[[SmallPair], None]
) -> None:
    spoil(small)
    with pytest.raises(UnsupportedModelError) as caught:
        small.run()
    assert {problem.where for problem in caught.value.problems} == {str(small.folder / "post")}
    assert leftovers(small.out) == []
    assert not small.out.exists()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, llama_tensors(side))
    with refused(UnsupportedModelError, "no-tokenizer") as caught:
        SmallPair(tmp_path).run()
    assert caught.value.problems[0].where == str(tmp_path / "post")


def test_weights_without_decoder_layers_are_refused(tmp_path: Path) -> None:
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, {"w": llama_tensors(side)["lm_head.weight"]}, {"model_type": "llama"})
    assert open_checkpoint(tmp_path / "post").stack is None
    with refused(PlanError, "no-layers"):
        SmallPair(tmp_path).run()


def test_sides_of_different_depth_are_refused(made_pair: Path, tmp_path: Path) -> None:
    shutil.copytree(made_pair / "post", tmp_path / "post")
    make_model(tmp_path / "pre", seed=1, layers=3)
    with refused(PlanError, "different-depth"):
        SmallPair(tmp_path).run()


@hurried
def test_a_model_without_probability_on_valid_answers_is_refused(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = small.search()
    count = len(ready.prepared.candidates), len(ready.prepared.prompts)
    monkeypatch.setattr(LocalScorer, "score", lambda *_: np.full((*count, 26), -np.inf))
    with refused(UnsupportedModelError, "no-valid-answers") as caught:
        ready.run(small.out)
    assert caught.value.problems[0].where == str(small.folder / "post")
    assert not small.out.exists()


@hurried
def test_a_recipe_that_does_not_fit_is_refused_before_anything_is_written(small: SmallPair) -> None:
    with refused(PlanError, "layer-out-of-range"):
        small.search(small.recipe(restore=[1, 9])).run(small.out)
    assert leftovers(small.out) == []


@hurried
def test_a_search_can_be_run_twice(small: SmallPair) -> None:
    ready = small.search(spaces="intervals")
    first, second = ready.run(small.folder / "one"), ready.run(small.folder / "two")
    assert first.rows == second.rows
    assert ready.estimate().rows[0].candidates == 12


def test_the_public_names_are_those_of_the_package(made_pair: Path) -> None:
    assert slr.search is search
    assert slr.open_pair is open_pair
    assert issubclass(OptionError, SlrmergeError)


def test_gguf_files_are_not_searched(tmp_path: Path) -> None:
    pair = open_pair(write_gguf(tmp_path / "pre.gguf", "pre"), write_gguf(tmp_path / "post.gguf", "post"))
    with refused(UnsupportedModelError, "gguf") as caught:
        search(pair, tmp_path / "search")
    assert caught.value.problems[0].remedy
    assert not (tmp_path / "search").exists()
