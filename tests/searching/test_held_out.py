"""A second look at a selection: intervals as scipy's, selections as of all resamples, scores as a search's."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml

from slrmerge.merging.finding import ScoreChange
from slrmerge.searching.held_out import candidates_to_ask, look_again, reselect
from slrmerge.searching.prompt_scores import PromptScores
from slrmerge.searching.proxy_tasks import ConstrainedRandomCharacter, Scores
from slrmerge.searching.results_folder import read_result
from slrmerge.searching.select import select
from slrmerge.searching.selection import ScoredCandidate, mark_feasible, select_from
from tests.merging.faults import Stop, leftovers, snapshot, stop
from tests.searching.pairs import (
    LAYERS,
    POST,
    SmallPair,
    Watcher,
    interval,
    made_result,
    made_rows,
    prompt_scores,
    prompts_of,
    row,
)

STAGES = LAYERS + 1
INTERVALS = {(0, 0): (0.95, 1.4), (1, 1): (0.9, 1.7), (2, 2): (0.95, 1.6), (1, 2): (0.3, 2.2)}

hurried = pytest.mark.usefixtures("hurried")


def rows_of(scores: PromptScores) -> list[ScoredCandidate]:
    """Rows of the post-trained model and intervals with the means of these scores."""
    infos = {info.label: info for info in (POST, *(interval(a, b) for a in range(4) for b in range(a, 4)))}
    means = zip(scores.candidates, scores.scores.quality.mean(1), scores.scores.diversity.mean(1), strict=True)
    return [row(infos[label], float(q), float(d)) for label, q, d in means]


# which candidates


def test_the_runner_up_is_selected_without_the_selection() -> None:
    rows = made_rows(INTERVALS)
    choice = made_result(rows).choice
    assert (choice.slr, choice.runner_up) == (made_result(rows).rows[4], made_result(rows).rows[5])
    without = made_result([row for row in rows if row.label != choice.slr.label]).choice  # type: ignore[union-attr]
    assert without.slr == choice.runner_up


def test_the_named_candidates_and_the_runner_up_are_asked() -> None:
    choice = made_result(made_rows(INTERVALS)).choice
    asked = candidates_to_ask(choice)
    assert list(asked) == ["post", "slr", "runner_up", "soup", "early", "late", "pre"]
    assert asked["runner_up"].label == "layers 2–2"
    only = made_result(made_rows({(0, 0): (0.1, 1.4)})).choice
    assert list(candidates_to_ask(only)) == ["post", "soup", "pre"]


# scores and intervals


def test_scores_are_means_and_changes_are_paired() -> None:
    choice = made_result(made_rows(INTERVALS)).choice
    answered = prompt_scores(["post-trained", "layers 1–1", "layers 2–2"], 7, seed=3)
    found = look_again(choice, answered)
    assert found is not None
    assert (found.prompts, list(found.scores)) == (7, ["post", "slr", "runner_up", "late"])
    assert found.scores["late"] == found.scores["runner_up"]  # layers 2–2 are both
    post, slr = answered.of("post-trained"), answered.of("layers 1–1")
    assert found.scores["post"].quality_change is None
    assert found.scores["slr"].quality == pytest.approx(slr.quality.mean())
    change = found.scores["slr"].diversity_change
    assert change is not None
    assert change.mean == pytest.approx((slr.diversity - post.diversity).mean())


@pytest.mark.parametrize("prompts", [5, 40])
def test_intervals_are_those_of_scipys_bootstrap(prompts: int) -> None:
    from scipy.stats import bootstrap

    choice = made_result(made_rows(INTERVALS)).choice
    answered = prompt_scores(["post-trained", "layers 1–1"], prompts, seed=prompts)
    found = look_again(choice, answered)
    assert found is not None
    change = found.scores["slr"].quality_change
    assert change is not None
    pairs = answered.of("layers 1–1").quality, answered.of("post-trained").quality
    expected = bootstrap(
        pairs, lambda a, b, axis: (a - b).mean(axis), paired=True, vectorized=True, method="percentile", rng=1
    )
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert change.low == pytest.approx(expected.confidence_interval.low, abs=0.04 * width)
    assert change.high == pytest.approx(expected.confidence_interval.high, abs=0.04 * width)
    assert look_again(choice, answered) == found


def test_one_prompt_gives_no_interval() -> None:
    found = look_again(
        made_result(made_rows(INTERVALS)).choice, prompt_scores(["post-trained", "layers 1–1"], 1, seed=0)
    )
    assert found is not None
    change = found.scores["slr"].quality_change
    assert change == ScoreChange(mean=change.mean) if change else False


# resampled prompts


def test_shares_are_those_of_all_resamples() -> None:
    """Of four prompts, all 256 resamples are enumerated, and each is selected from as a search does."""
    asked = prompt_scores(["post-trained", "layers 0–0", "layers 1–1", "layers 2–2", "layers 0–1"], 4, seed=8)
    asked.scores.quality[:] = 0.5 + asked.scores.quality / 2
    rows = rows_of(asked)
    base = made_result(made_rows(INTERVALS)).choice.base
    times: Counter[str] = Counter()
    for drawn in product(range(4), repeat=4):
        scores = Scores(*(values[:, drawn] for values in asked.scores))
        again = rows_of(PromptScores(asked.candidates, asked.questions, scores))
        post_quality = {again[0].conditions: again[0].quality}
        marked = mark_feasible(again, post_quality=post_quality, min_quality=0.9)
        slr = select_from(marked, base=base, min_quality=0.9).slr
        times[slr.label if slr else "nothing"] += 1
    expected = {label: count / 256 for label, count in times.items()}
    assert len(expected) > 3
    assert expected["nothing"] > 0.01
    found = reselect(rows, asked, min_quality=0.9)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    nothing = 1 - sum(found.values())
    for label, share in ({**found, "nothing": nothing}).items():
        assert share == pytest.approx(expected.pop(label), abs=0.05)
    assert sum(expected.values()) < 0.01


def test_among_equals_the_shorter_interval_is_selected() -> None:
    asked = prompt_scores(["post-trained", "layers 0–1", "layers 1–1", "layers 0–0"], 6, seed=0)
    for values in asked.scores:
        values[:] = 0.75
    assert reselect(rows_of(asked), asked, min_quality=1.0) == {"layers 0–0": 1.0}


def test_roughly_scored_candidates_are_not_selected_by_resampled_prompts() -> None:
    asked = prompt_scores(["post-trained", "layers 0–0", "layers 1–1"], 6, seed=0)
    asked.scores.quality[:] = 1.0
    asked.scores.diversity[1] = 9.0
    asked.scores.quality[1, 3:] = np.nan
    rows = rows_of(asked)
    rows[1] = replace(rows[1], exact=False, prompts=3)
    assert reselect(rows, asked, min_quality=0.9) == {"layers 1–1": 1.0}


def test_one_prompt_or_no_interval_selects_nothing_again() -> None:
    one = prompt_scores(["post-trained", "layers 0–0"], 1, seed=0)
    assert reselect(rows_of(one), one, min_quality=0.9) == {}
    alone = prompt_scores(["post-trained"], 5, seed=0)
    assert reselect(rows_of(alone), alone, min_quality=0.9) == {}


# in a search


@hurried
def test_held_out_scores_are_those_of_a_search_with_these_questions(small: SmallPair) -> None:
    result = small.run(spaces=("intervals", "soups"))
    held_out = ConstrainedRandomCharacter().held_out_questions()
    task = small.folder / "held-out.yaml"
    listed = [{"text": question.text, "answers": list(question.answers)} for question in held_out]
    task.write_text(yaml.safe_dump({"questions": listed}), encoding="utf-8")
    there = small.run(small.folder / "there", task=str(task))
    expected = {row.label: row for row in there.rows}
    assert result.held_out is not None
    assert result.held_out.prompts == len(held_out) == 6
    assert result.held_out.scores.keys() == candidates_to_ask(result.choice).keys()
    for name, row_ in candidates_to_ask(result.choice).items():
        found, wanted = result.held_out.scores[name], expected[row_.label]
        assert found.label == wanted.label
        assert found.quality == pytest.approx(wanted.quality, abs=1e-6)
        assert found.diversity == pytest.approx(wanted.diversity, abs=1e-6)
    kept = prompts_of(small.out)
    assert list(kept["held_out_questions"]) == [question.text for question in held_out]
    assert kept["held_out_quality"].shape == (len(set(kept["held_out_candidates"])), 6)
    summary = json.loads((small.out / "summary.json").read_bytes())
    assert summary["held_out"]["scores"]["slr"]["quality"] == result.held_out.scores["slr"].quality
    assert summary["reselected"] == result.reselected
    assert sum(result.reselected.values()) == pytest.approx(1, abs=0.5)
    assert read_result(small.out).summary() == result.summary()


@hurried
def test_without_held_out_prompts_a_search_has_one_pass(small: SmallPair) -> None:
    watcher = Watcher()
    result = small.run(held_out=False, progress=watcher)
    assert (len(watcher.stages), len(watcher.totals)) == (STAGES, 1)
    assert result.held_out is None
    assert result.notes == ()
    assert result.reselected
    assert "held_out" not in json.loads((small.out / "summary.json").read_bytes())
    assert not [name for name in prompts_of(small.out) if name.startswith("held_out")]
    assert len(small.search(held_out=False).estimate().rows) == 4


@hurried
def test_a_task_without_held_out_prompts_is_noted(small: SmallPair) -> None:
    task = small.folder / "mine.yaml"
    task.write_text("questions: [{text: Generate a random letter, answers: [A, B, C, D]}]")
    result = small.run(task=str(task))
    assert result.held_out is None
    (note,) = result.notes
    assert "held_out" in note
    assert small.run(small.folder / "other", task=str(task), held_out=False).notes == ()


@hurried
def test_an_estimate_includes_the_held_out_prompts(small: SmallPair) -> None:
    ready = small.search()
    first, held_out, *_ = ready.estimate().rows
    assert held_out.name == f"{first.name}, held-out"
    assert 4 <= held_out.candidates <= 7
    assert 0 < held_out.cost.states < first.cost.states
    watcher = Watcher()
    ready.run(small.out, progress=watcher)
    assert watcher.totals[0] == first.cost.states
    assert watcher.totals[1] == pytest.approx(held_out.cost.states, rel=0.5)  # of the interval that is selected


@hurried
def test_a_search_that_stopped_among_its_held_out_prompts_resumes_there(small: SmallPair) -> None:
    small.run(small.folder / "plain")
    with pytest.raises(Stop):
        small.run(progress=Watcher(STAGES + 3, stop))
    again = Watcher()
    small.run(progress=again)
    assert len(again.stages) == STAGES - 2
    plain, resumed = (snapshot(small.folder / name) or {} for name in ("plain", "search"))
    assert plain["prompts.npz"] == resumed["prompts.npz"]
    assert leftovers(small.out) == []


# selecting again


@hurried
def test_another_selection_says_where_it_was_not_asked(tiny_search: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_search / "search", tmp_path / "search"))
    before, after = read_result(folder), select(folder, min_quality=0.95)
    assert after.choice.slr is not None
    assert after.held_out is not None
    assert before.held_out is not None
    asked = {found.label for found in before.held_out.scores.values()}
    assert after.choice.slr.label not in asked
    assert {name: found.label for name, found in after.held_out.scores.items()} == {
        "post": "post-trained", "pre": "pre-trained"
    }  # fmt: skip
    assert after.held_out.scores["post"] == before.held_out.scores["post"]
    assert after.reselected != before.reselected
    assert any(after.choice.slr.label in doubt and "held-out" in doubt for doubt in after.doubts)
    again = select(folder, min_quality=before.choice.min_quality)
    assert (again.held_out, again.reselected, again.doubts) == (before.held_out, before.reselected, before.doubts)


@hurried
def test_results_without_prompts_are_selected_from_without_a_second_look(small: SmallPair) -> None:
    small.run()
    (small.out / "prompts.npz").unlink()
    again = select(small.out, min_quality=0.8)
    assert (again.held_out, again.reselected) == (None, {})


# doubts


@pytest.mark.parametrize(
    ("quality", "diversity", "words"),
    [(0.80, 2.0, ["80.0%"]), (0.95, 1.0, ["not clearly"]), (0.5, 1.0, ["50.0%", "not clearly"]), (0.95, 2.0, [])],
)
def test_a_selection_that_is_worse_on_held_out_prompts_is_doubted(
    tmp_path: Path, quality: float, diversity: float, words: list[str]
) -> None:
    answered = prompt_scores(["post-trained", "layers 1–1"], 20, seed=0)
    for values, post, slr in zip(answered.scores, (1.0, 1.0), (quality, diversity), strict=True):
        values[0], values[1] = post, slr
    answered.scores.diversity[1, ::2] -= 0.01
    result = made_result(made_rows(INTERVALS))
    doubted = replace(result, held_out=look_again(result.choice, answered))
    found = [doubt for doubt in doubted.doubts if "held-out" in doubt]
    assert len(found) == len(words)
    assert all(word in doubt for word, doubt in zip(words, found, strict=True))
