"""What a search returns and writes: the same bytes every time, results that merge."""

import os
from pathlib import Path

import pytest

import slrmerge as slr
from slrmerge.checkpoint.opening import open_pair
from slrmerge.errors import OptionError, SlrmergeError, SourceChangedError
from slrmerge.merging.executor import merge
from slrmerge.searching.results_folder import read_result
from slrmerge.searching.run import search
from tests.merging.faults import age, leftovers, snapshot, tree
from tests.searching.pairs import (
    ALL,
    ALL_STAGES,
    LAYERS,
    SmallPair,
    Watcher,
    hurried,
    prompts_of,
    results,
    scores_of_paths,
)


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
    assert list(kept["candidates"]) == [each.label for each in result.rows]
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
    assert [each.space for each in result.rows] == ["post", "pre", *["attention"] * 10, *["mlp"] * 10]
    assert list(result.choice.named()) == ["post", "slr", "early", "late", "pre"]
    named = result.choice.named().items()
    assert {row.space for name, row in named if name not in ("post", "pre")} == {"attention"}
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
    assert f"**{result.choice.slr.label}**" in card
    assert (small.folder / "chosen" / "tradeoff.png").read_bytes() == (small.out / "tradeoff.png").read_bytes()
    chosen, from_file = ((small.folder / name / "model.safetensors").read_bytes() for name in ("chosen", "from-file"))
    assert chosen == from_file


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


@hurried
def test_a_source_that_changes_during_the_search_is_an_error_without_results(small: SmallPair) -> None:
    age(small.folder / "post")

    def touch() -> None:
        os.utime(small.folder / "post" / "model.safetensors")

    with pytest.raises(SourceChangedError) as caught:
        small.run(progress=Watcher(2, touch))
    assert {problem.where for problem in caught.value.problems} == {str(small.folder / "post" / "model.safetensors")}
    assert not small.out.exists()
