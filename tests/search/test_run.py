"""A search from a recipe to its folder: what may be written where, killed and taken up, bounded, quick, exact."""

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

from slrmerge import files, merge_checkpoints
from slrmerge.errors import (
    BusyError,
    MissingExtraError,
    NoSpaceError,
    OutputError,
    PlanError,
    SlrmergeError,
    SourceChangedError,
    UnsupportedModelError,
)
from slrmerge.hub import open_checkpoint
from slrmerge.recipe import load_recipe
from slrmerge.search.choose import NEAR_TIE
from slrmerge.search.results import Report, read_report
from slrmerge.search.run import Search, SearchOptions
from slrmerge.sweep.cost import Cost
from tests.checkpoints import llama_tensors, write_checkpoint
from tests.conftest import TINY
from tests.merge.faults import Stop, age, leftovers, snapshot, stop, tree, write_files
from tests.search.pairs import (
    CHECKING,
    LAYERS,
    ROOT,
    SmallPair,
    Watcher,
    hurry,
    make_model,
    no_pictures,
    prompts_of,
)

ALL = ["early.yaml", "heatmaps.png", "heatmaps.svg", "late.yaml", "prompts.npz", "results.csv", "slr.yaml",
       "soup.yaml", "summary.json", "tradeoff.png", "tradeoff.svg"]  # fmt: skip
STAGES = LAYERS + 1  # every layer, and the head

hurried = pytest.mark.usefixtures("hurried")


def results(folder: Path) -> dict[str, bytes]:
    """What a search left, without the time it took."""
    found = snapshot(folder) or {}
    summary = json.loads(found.pop("summary.json"))
    del summary["elapsed_s"]
    return {**found, "summary.json": json.dumps(summary).encode()}


@pytest.fixture(scope="module")
def plain(made_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of a search of the small pair that nothing disturbed."""
    pair = SmallPair(Path(shutil.copytree(made_pair, tmp_path_factory.mktemp("plain") / "pair")))
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        pair.report()
    return results(pair.out)


# what comes out


@hurried
def test_a_search_leaves_its_results_and_nothing_else(small: SmallPair) -> None:
    before = tree(small.folder)
    watcher = Watcher()
    report = small.report(progress=watcher)
    assert sorted(snapshot(small.out) or {}) == ALL
    assert read_report(small.out).rows == report.rows
    assert leftovers(small.out) == []
    after = tree(small.folder)
    assert {path for path in before if before[path] != after.get(path)} <= {str(small.folder)}
    assert watcher.said == [CHECKING]
    assert watcher.started == [("all candidates", watcher.states)]
    assert watcher.stages[-1] == "head"
    assert watcher.stages[:-1] == [f"layer {k + 1} of {LAYERS}, {len(report.rows)} candidates" for k in range(LAYERS)]
    assert len(report.rows) == 2 + LAYERS * (LAYERS + 1) // 2 + 3


@hurried
def test_the_values_of_each_prompt_are_those_whose_means_the_table_has(small: SmallPair) -> None:
    report, kept = small.report(), prompts_of(small.out)
    assert kept["quality"].shape == kept["diversity"].shape == (len(report.rows), 6)
    assert list(kept["candidates"]) == [each.candidate.label for each in report.rows]
    assert [each.quality for each in report.rows] == list(kept["quality"].mean(1))
    assert [each.diversity for each in report.rows] == list(kept["diversity"].mean(1))
    assert kept["questions"][0].startswith("Generate a random integer in the range [")
    assert kept["questions"][-1].startswith("Generate a random letter from ")
    assert ((kept["quality"] > 0) & (kept["quality"] < 1)).all()


@hurried
def test_the_same_search_leaves_the_same_bytes(small: SmallPair, plain: dict[str, bytes]) -> None:
    small.report()
    assert results(small.out) == plain


@hurried
def test_what_to_try_is_up_to_the_spaces(small: SmallPair) -> None:
    report = small.report(spaces=("attention", "mlp"))
    assert [each.candidate.space for each in report.rows] == ["post", "pre", *["attention"] * 10, *["mlp"] * 10]
    assert list(report.choice.named()) == ["post", "slr", "early", "late", "pre"]
    assert {row.candidate.space for name, row in report.choice.named().items() if name not in ("post", "pre")} == {
        "attention"
    }
    assert {path.name for path in small.out.glob("*.yaml")} == {"slr.yaml", "early.yaml", "late.yaml"}


@hurried
def test_a_slerp_is_not_tried_besides(small: SmallPair) -> None:
    other = load_recipe(small.recipe_file("other.yaml", alpha=0.5, blend="slerp"))
    with pytest.raises(PlanError) as caught, small.search(small.recipe(), also=(("other.yaml", other),)):
        pass
    assert str(caught.value) == "other.yaml: is a slerp, and searches score means only; leave it out"


@hurried
def test_a_recipe_for_other_checkpoints_is_not_tried_besides(small: SmallPair) -> None:
    other = load_recipe(small.recipe_file("other.yaml", pretrained="./elsewhere", alpha=0.5))
    with pytest.raises(PlanError) as caught, small.search(small.recipe(), also=(("other.yaml", other),)):
        pass
    assert str(caught.value) == (
        "other.yaml: $.pretrained: names ./elsewhere, which is not the pretrained side of this search; "
        "try only recipes for the same two checkpoints"
    )


@hurried
def test_a_model_that_answers_nothing_valid_is_nothing_to_search(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small.search(small.recipe()) as search:
        count = len(search.candidates), len(search.prompts)
        monkeypatch.setattr("slrmerge.search.scoring.PairSweeper.run", lambda *_, **__: np.full((*count, 9), -np.inf))
        with pytest.raises(UnsupportedModelError) as caught:
            search.run(small.out)
    assert str(caught.value) == (
        f"{small.folder / 'post'}: gives no valid answer any probability, so there is nothing to hold hybrids against; "
        "name an instruct model"
    )


@hurried
def test_what_a_killed_selection_left_beside_the_results_does_not_keep_them(small: SmallPair) -> None:
    small.report()
    (small.out / "results.csv.new").touch()
    small.report(overwrite=True)
    assert not (small.out / "results.csv.new").exists()


@hurried
def test_a_recipe_with_rules_is_scored_itself(small: SmallPair) -> None:
    mine, also = small.recipe(restore=[1, 2]), load_recipe(small.recipe_file("soup.yaml", alpha=0.5))
    with small.search(mine, also=(("soup.yaml", also),)) as search:
        report = search.run(small.out)
    rows = {each.candidate.label: each for each in report.rows}
    assert [each.candidate.label for each in report.rows[-2:]] == ["the recipe's own", "soup.yaml"]
    for recipe, same in (("the recipe's own", "layers 1–2"), ("soup.yaml", "soup 0.50")):
        assert rows[recipe].quality == rows[same].quality
        assert rows[recipe].diversity == rows[same].diversity
    assert report.choice.slr is not None
    assert report.choice.slr.candidate.space == "interval"


# where it may go


@hurried
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_may_be_filled(small: SmallPair, overwrite: bool) -> None:
    small.out.mkdir()
    small.report(overwrite=overwrite, spaces=())
    assert (small.out / "results.csv").exists()


REFUSED: dict[str, tuple[Callable[[SmallPair], object], bool, str]] = {
    "something else": (
        lambda pair: write_files(pair.out, {"notes.md": b"mine"}), False,
        "exists and is not empty; choose another --out, or replace it: --overwrite",
    ),
    "something else, overwriting": (
        lambda pair: write_files(pair.out, {"notes.md": b"mine"}), True,
        "does not hold the results of a search, so --overwrite leaves it alone; choose another --out",
    ),
    "results and more, overwriting": (
        lambda pair: write_files(pair.out, dict.fromkeys(["results.csv", "summary.json", "z.md", "hybrid/x"], b"")),
        True,
        "holds more than the results of a search (hybrid, z.md), so --overwrite leaves it alone; choose another --out",
    ),
    "a checkpoint, overwriting": (
        lambda pair: shutil.copytree(pair.folder / "pre", pair.out), True,
        "does not hold the results of a search, so --overwrite leaves it alone; choose another --out",
    ),
    "a file": (lambda pair: pair.out.write_text("mine"), True, "is a file; name a folder"),
}  # fmt: skip


@hurried
@pytest.mark.parametrize("case", REFUSED)
def test_only_the_results_of_a_search_are_ever_replaced(small: SmallPair, case: str) -> None:
    prepare, overwrite, what = REFUSED[case]
    prepare(small)
    small.recipe_file()
    before = tree(small.folder)
    with pytest.raises(OutputError) as caught:
        small.report(overwrite=overwrite)
    assert str(caught.value) == f"{small.out}: {what}"
    del before[str(small.folder / "pair.yaml")]
    assert {path: tree(small.folder)[path] for path in before if path != str(small.folder)} == {
        path: seen for path, seen in before.items() if path != str(small.folder)
    }


@hurried
def test_the_results_of_an_older_search_are_replaced_by_request_only(small: SmallPair) -> None:
    small.report(spaces=("soups",))
    old = snapshot(small.out)
    with pytest.raises(OutputError):
        small.report(spaces=("intervals",))
    assert snapshot(small.out) == old
    small.report(spaces=("intervals",), overwrite=True)
    assert len(read_report(small.out).rows) == 12
    assert not (small.out / "soup.yaml").exists()
    assert leftovers(small.out) == []


@hurried
@pytest.mark.parametrize("side", ["pre", "post"])
def test_a_source_is_never_written_to(small: SmallPair, side: str) -> None:
    with pytest.raises(OutputError) as caught:
        small.report(small.folder / side, overwrite=True)
    assert str(caught.value) == f"{small.folder / side}: is one of the sources; choose another --out"
    with pytest.raises(OutputError) as caught:
        small.report(small.folder / side / "search")
    assert str(caught.value) == (
        f"{small.folder / side / 'search'}: is inside the source {small.folder / side}; choose an --out outside it"
    )


@hurried
def test_another_run_on_the_same_target_is_waited_for_by_nobody(small: SmallPair) -> None:
    with files.exclusive(small.out), pytest.raises(BusyError) as caught:
        small.report()
    assert str(caught.value) == (
        f"{small.out}: another slrmerge is writing it; wait for that run, or choose another --out"
    )
    assert not small.out.exists()
    assert not files.staging_folder(small.out).exists()


@hurried
def test_what_a_killed_merge_left_in_the_same_place_is_not_mixed_with_the_results(small: SmallPair) -> None:
    staging = files.staging_folder(small.out)
    write_files(
        staging, {"model.safetensors": b"half", ".slrmerge-journal": b"x", "plots/x.png": b"", "x.csv.new": b""}
    )
    small.report(spaces=())
    assert sorted(snapshot(small.out) or {}) == sorted({*ALL} - {"slr.yaml", "soup.yaml", "early.yaml", "late.yaml"})
    assert leftovers(small.out) == []


@hurried
def test_a_merge_after_a_killed_search_in_the_same_place_is_not_mixed_with_its_states(small: SmallPair) -> None:
    with pytest.raises(Stop):
        small.report(progress=Watcher(3, stop))
    recipe = load_recipe(small.recipe_file("merge.yaml", restore=[1, 2]))
    merge_checkpoints(recipe, small.out, fsync=False)
    assert "results.csv" not in (snapshot(small.out) or {})
    assert not (small.out / "first").exists()
    assert leftovers(small.out) == []


# disk and memory


@hurried
def test_too_little_room_is_said_before_anything_is_written(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrmerge.search.run.files.free_bytes", lambda target: 2_000_000)
    cost = Cost(flop=1.0, states_bytes=3_210_000_000, states=1)
    monkeypatch.setattr("slrmerge.search.scoring.PairSweeper.cost", lambda self, wanted: cost)
    before = tree(small.folder)
    recipe = small.recipe()
    with small.search(recipe) as search, pytest.raises(NoSpaceError) as caught:
        search.run(small.out)
    assert str(caught.value) == (
        f"{small.out}: the search's states need 3.21 GB there, the disk has 0.00 GB free; "
        "choose --out on another disk, or --no-resume to keep none"
    )
    assert tree(small.folder).keys() - before.keys() == {str(small.folder / "pair.yaml")}


@hurried
@pytest.mark.parametrize(
    ("options", "refused", "remedy"),
    [
        ({}, True, "choose --out on another disk, or --no-resume to keep none"),
        ({"max_memory_bytes": 1}, True, "choose --out on another disk"),
        ({"max_memory_bytes": 1, "resumable": False}, True, "choose --out on another disk"),
        ({"resumable": False}, False, ""),
    ],
)
def test_states_that_lie_in_files_need_room(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], refused: bool, remedy: str
) -> None:
    monkeypatch.setattr("slrmerge.search.run.files.free_bytes", lambda target: 10)
    with small.search(**options) as search:
        if not refused:
            search.require_target(small.out, overwrite=False)
            return
        with pytest.raises(NoSpaceError) as caught:
            search.require_target(small.out, overwrite=False)
    assert caught.value.problems[0].remedy == remedy


@hurried
@pytest.mark.parametrize("resumable", [True, False])
def test_states_that_find_no_memory_lie_in_a_file_and_the_results_are_the_same(
    small: SmallPair, plain: dict[str, bytes], resumable: bool
) -> None:
    staging = files.staging_folder(small.out)
    seen: list[list[str]] = []

    class Looking(Watcher):
        def advance(self, count: int) -> None:
            seen.append([path.name for path in sorted(staging.glob("first/*"))])

    small.report(progress=Looking(), max_memory_bytes=1, resumable=resumable)
    assert {name.partition("-")[0] for names in seen for name in names} == {"progress.json", "states", "states.new"}
    assert results(small.out) == plain
    assert leftovers(small.out) == []


@hurried
def test_without_states_to_keep_nothing_lies_about_while_searching(small: SmallPair) -> None:
    seen: list[dict[str, bytes]] = []
    act = lambda: seen.append(snapshot(files.staging_folder(small.out)) or {})  # noqa: E731
    small.report(progress=Watcher(STAGES, act), resumable=False)
    assert seen == [{}]


# killed and taken up


@hurried
@pytest.mark.parametrize("at", [1, 3, STAGES])
def test_a_search_that_stopped_goes_on_after_the_last_layer_it_finished(
    small: SmallPair, plain: dict[str, bytes], at: int
) -> None:
    second = Watcher()
    with pytest.raises(Stop):
        small.report(progress=Watcher(at, stop))
    assert not small.out.exists()
    small.report(progress=second)
    where = "the embedding" if at == 1 else f"layer {at - 1} of {LAYERS}"
    assert second.said == [CHECKING, f"going on after {where}, which an earlier run finished"]
    assert len(second.stages) == STAGES - (at - 1)
    assert second.started == [("all candidates", second.states)]
    assert results(small.out) == plain
    assert leftovers(small.out) == []


@hurried
def test_a_search_that_was_killed_goes_on_too(small: SmallPair, plain: dict[str, bytes]) -> None:
    small.recipe_file()
    command = [sys.executable, "-m", "tests.search.pairs", "3", str(small.folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    assert not small.out.exists()
    again = Watcher()
    small.report(progress=again)
    assert again.said == [CHECKING, f"going on after layer 2 of {LAYERS}, which an earlier run finished"]
    assert results(small.out) == plain
    assert leftovers(small.out) == []


@hurried
def test_a_search_that_stopped_while_its_results_were_written_is_not_done_again(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("slrmerge.search.run.draw_report", failing)
        with pytest.raises(Stop):
            small.report()
    assert not small.out.exists()
    again = Watcher()
    small.report(progress=again)
    assert again.stages == []
    assert sorted(snapshot(small.out) or {}) == ALL


@hurried
def test_not_to_keep_states_is_to_begin_anew(small: SmallPair) -> None:
    with pytest.raises(Stop):
        small.report(progress=Watcher(3, stop), resumable=False)
    again = Watcher()
    small.report(progress=again)
    assert again.said == [CHECKING]
    assert len(again.stages) == STAGES


OTHERS: dict[str, Callable[[SmallPair], dict[str, Any]]] = {
    "other candidates": lambda pair: {"spaces": ("intervals",)},
    "another dtype": lambda pair: {"dtype": "bfloat16"},
    "fewer prompts": lambda pair: {"quick": True},
    "a source that was touched": lambda pair: age(pair.folder / "pre") or {},  # type: ignore[func-returns-value]
}


@hurried
@pytest.mark.parametrize("case", OTHERS)
def test_states_of_another_search_are_not_taken_up_and_that_is_said(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("slrmerge.search.run.QUICK_PROMPTS", 2)
    with pytest.raises(Stop):
        small.report(progress=Watcher(3, stop))
    options, again = OTHERS[case](small), Watcher()
    small.report(progress=again, **options)
    small.report(small.folder / "plain", **options)
    assert again.said == [
        CHECKING,
        "starting anew: what an earlier run left belongs to another search, or to other checkpoints",
    ]
    assert len(again.stages) >= STAGES
    assert results(small.out) == results(small.folder / "plain")
    assert leftovers(small.out) == []


def spoil_states(folder: Path) -> None:
    (states,) = folder.glob("states-*")
    states.write_bytes(bytes(states.stat().st_size))


SPOILED: dict[str, Callable[[Path], object]] = {
    "states that were altered": spoil_states,
    "states that are gone": lambda folder: [path.unlink() for path in folder.glob("states-*")],
    "an empty note of progress": lambda folder: (folder / "progress.json").write_bytes(b""),
    "a note of progress that is a list": lambda folder: (folder / "progress.json").write_bytes(b"[]"),
}


@hurried
@pytest.mark.parametrize("case", SPOILED)
def test_states_that_are_damaged_are_not_taken_up_and_that_is_said(
    small: SmallPair, plain: dict[str, bytes], case: str
) -> None:
    with pytest.raises(Stop):
        small.report(progress=Watcher(3, stop))
    SPOILED[case](files.staging_folder(small.out) / "first")
    again = Watcher()
    small.report(progress=again)
    assert again.said == [CHECKING, "starting anew: what an earlier run left is damaged"]
    assert results(small.out) == plain


@hurried
def test_a_source_that_changes_during_the_search_is_an_error_and_nothing_is_left_that_looks_like_results(
    small: SmallPair,
) -> None:
    age(small.folder / "post")

    def touch() -> None:
        os.utime(small.folder / "post" / "model.safetensors")

    with pytest.raises(SourceChangedError) as caught:
        small.report(progress=Watcher(2, touch))
    assert str(caught.value) == (
        f"{small.folder / 'post' / 'model.safetensors'}: was changed while it was read; "
        "run again when nothing else writes to it"
    )
    assert not small.out.exists()


@hurried
def test_a_disk_that_fills_up_is_said_in_words(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for place in ("numpy.savez", "slrmerge.search.run.draw_report", "slrmerge.search.run.files.publish"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(SlrmergeError):
                small.report(spaces=())
        assert not small.out.exists()


# a first pass that is not exact


@pytest.fixture(scope="module")
def exact(tiny_search: Path) -> Report:
    """The example pair, searched exactly."""
    return read_report(tiny_search / "search")


def in_two_passes(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Report, Watcher]:
    """The example pair, searched by a rough pass and an exact one."""
    monkeypatch.setattr("slrmerge.search.run.draw_report", no_pictures)
    watcher = Watcher()
    with Search(load_recipe(source / "pair.yaml", pair_only=True), SearchOptions(threads=1, **options)) as search:
        return search.run(out, progress=watcher), watcher


@pytest.mark.parametrize(
    ("options", "first"),
    [({"quick": True}, "8 prompts, float32"), ({"dtype": "bfloat16"}, "40 prompts, bfloat16")],
    ids=["quick", "bfloat16"],
)
def test_two_passes_choose_as_an_exact_search_and_say_what_they_skipped(
    tiny_search: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exact: Report,
    options: dict[str, Any],
    first: str,
) -> None:
    report, watcher = in_two_passes(tiny_search, tmp_path / "search", monkeypatch, **options)
    assert [what for what, _ in watcher.started] == ["all candidates", "the leaders again, exactly"]
    again = [each for each in report.rows if each.exact]
    assert 20 < len(again) < len(report.rows) == len(exact.rows)
    (note,) = report.notes
    assert note == (
        f"all {len(report.rows)} candidates were asked {first}; the {len(again)} that may win or that the winner is "
        "held against were asked again: 40 prompts, float32"
    )
    assert report.post_quality.keys() == {first, "40 prompts, float32"}
    by_label = {each.candidate.label: each for each in exact.rows}
    for each in again:
        assert (each.prompts, each.dtype) == (40, "float32")
        assert each.quality == pytest.approx(by_label[each.candidate.label].quality, abs=1e-6)
        assert each.diversity == pytest.approx(by_label[each.candidate.label].diversity, abs=1e-6)
    rough = {f"{each.prompts} prompts, {each.dtype}" for each in report.rows if not each.exact}
    assert rough == {first}
    chosen, wanted = report.choice.named(), exact.choice.named()
    assert {name: each.candidate for name, each in chosen.items()} == {
        name: each.candidate for name, each in wanted.items()
    }
    kept = prompts_of(tmp_path / "search")
    assert kept["quality"].shape == (len(report.rows), 40)
    asked = (~np.isnan(kept["quality"])).sum(1)
    assert list(asked) == [each.prompts for each in report.rows]
    assert np.allclose(np.nanmean(kept["quality"], 1), [each.quality for each in report.rows], rtol=0, atol=1e-12)


def test_the_example_pairs_choice_is_the_one_its_readme_shows(exact: Report) -> None:
    named = exact.choice.named()
    shown = {
        "pre": ("pre-trained", 0.652, 1.927),
        "post": ("post-trained", 0.964, 1.048),
        "soup": ("soup 0.80", 0.873, 1.838),
        "slr": ("layers 2–8", 0.891, 1.907),
        "early": ("layers 0–6", 0.936, 1.738),
        "late": ("layers 3–9", 0.865, 1.892),
    }
    text = (TINY / "README.md").read_text()
    for name, (label, quality, diversity) in shown.items():
        found = named[name]
        assert (found.candidate.label, round(found.quality, 3), round(found.diversity, 3)) == (
            label,
            quality,
            diversity,
        )
        assert f"| {quality:.3f} | {diversity:.3f} |" in text.replace("**", "")


@hurried
def test_a_search_that_stopped_among_its_leaders_goes_on_there(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.report(small.folder / "plain", dtype="bfloat16")
    with pytest.raises(Stop):
        small.report(progress=Watcher(STAGES + 3, stop), dtype="bfloat16")
    again = Watcher()
    small.report(progress=again, dtype="bfloat16")
    assert again.said[0] == CHECKING
    assert again.said[-1] == f"going on after layer 2 of {LAYERS}, which an earlier run finished"
    assert len(again.stages) == STAGES - 2
    assert results(small.out) == results(small.folder / "plain")


def test_near_ties_of_the_choice_are_within_a_thousandth_of_a_nat(exact: Report) -> None:
    assert exact.choice.slr is not None
    assert exact.choice.near_ties == ()
    runner_up = max(
        each.diversity for each in exact.rows
        if each.candidate.space == "interval" and each.feasible and each is not exact.choice.slr
    )  # fmt: skip
    assert NEAR_TIE < exact.choice.slr.diversity - runner_up < 0.01


# what it costs


@hurried
def test_an_estimate_writes_nothing_and_knows_the_papers_models(small: SmallPair) -> None:
    recipe = small.recipe()
    before = tree(small.folder)
    with small.search(recipe) as search:
        estimate = search.estimate()
    assert tree(small.folder) == before
    assert (estimate.prompts, estimate.prompt_tokens) == (6, sum(len(prompt.ids) for prompt in search.prompts))
    assert estimate.packed_tokens < estimate.prompt_tokens
    assert [(line.name, line.candidates, line.dtype) for line in estimate.lines] == [
        ("post", 15, "float32"), ("Llama-3.1-8B", 530, "bfloat16"), ("Qwen2.5-7B", 408, "bfloat16"),
        ("Gemma-2-9B", 905, "bfloat16"),
    ]  # fmt: skip
    for line in estimate.lines:
        assert line.seconds == line.cost.flop / 1e11 > 0


@hurried
def test_the_states_are_as_many_as_the_estimate_says(small: SmallPair) -> None:
    watcher = Watcher()
    with small.search() as search:
        wanted = search.estimate().lines[0].cost.states
        search.run(small.out, progress=watcher)
    assert watcher.started == [("all candidates", wanted)]
    assert watcher.states == wanted


# what cannot be searched


def without_template(pair: SmallPair) -> None:
    (pair.folder / "post" / "chat_template.jinja").unlink()


def with_config(**values: object) -> Callable[[SmallPair], None]:
    def edit(pair: SmallPair) -> None:
        path = pair.folder / "post" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}))

    return edit


UNSUPPORTED: dict[str, tuple[Callable[[SmallPair], None], str]] = {
    "no chat template": (
        without_template,
        (
            "its tokenizer has no chat template, so how to ask is not known; "
            "add the chat_template that the model was trained with"
        ),
    ),
    "experts": (
        with_config(architectures=["MixtralForCausalLM"], model_type="mixtral", num_local_experts=4),
        (
            "is a mixture of experts (mixtral), which has not been tried; "
            "dense decoder-only models that transformers loads without custom code can be searched"
        ),
    ),
}


@hurried
@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_model_that_cannot_be_searched_is_refused_by_name_with_a_reason(small: SmallPair, case: str) -> None:
    spoil, what = UNSUPPORTED[case]
    spoil(small)
    with pytest.raises(UnsupportedModelError) as caught:
        small.report()
    assert str(caught.value) == f"{small.folder / 'post'}: {what}"
    assert not small.out.exists()


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path) -> None:
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, llama_tensors(side))
    with pytest.raises(UnsupportedModelError) as caught:
        SmallPair(tmp_path).report()
    assert str(caught.value).startswith(f"{tmp_path / 'post'}: its tokenizer cannot be loaded (")


def test_weights_whose_layers_cannot_be_told_are_refused(tmp_path: Path) -> None:
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, {"w": llama_tensors(side)["lm_head.weight"]}, {"model_type": "llama"})
    assert open_checkpoint(tmp_path / "post").stack is None
    with pytest.raises(PlanError) as caught:
        SmallPair(tmp_path).report()
    assert str(caught.value) == (
        f"{tmp_path / 'post'}: no stack of layers in these weights is as long as the config says, or more than one is"
    )


def test_sides_of_different_depth_are_refused(made_pair: Path, tmp_path: Path) -> None:
    shutil.copytree(made_pair / "post", tmp_path / "post")
    make_model(tmp_path / "pre", seed=1, layers=3)
    with pytest.raises(PlanError) as caught:
        SmallPair(tmp_path).report()
    assert {problem.where for problem in caught.value.problems} <= {str(tmp_path / side) for side in ("pre", "post")}


@hurried
def test_a_recipe_of_ones_own_that_does_not_fit_is_said_before_anything_is_written(small: SmallPair) -> None:
    with small.search(small.recipe(restore=[1, 9])) as search, pytest.raises(PlanError) as caught:
        search.run(small.out)
    assert str(caught.value) == "the recipe's own: 9 is past the last layer (3); use 0–3"
    assert leftovers(small.out) == []


@pytest.mark.parametrize("missing", ["transformers", "matplotlib"])
def test_what_a_search_needs_and_is_not_installed_is_named(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr("slrmerge.errors.find_spec", lambda name: None if name == missing else object())
    with pytest.raises(MissingExtraError) as caught:
        small.search()
    assert str(caught.value) == f"slrmerge search: needs {missing}; pip install 'slrmerge[search]'"


def test_both_packages_that_are_missing_are_named_at_once(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrmerge.errors.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        small.search()
    assert str(caught.value) == "slrmerge search: needs transformers and matplotlib; pip install 'slrmerge[search]'"
