"""The report of a search: its selections are those of `select_from`, it loads nothing, and no text becomes markup."""

import json
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from slrmerge.io.strict_yaml import write_yaml
from slrmerge.merging.finding import HeldOut, HeldOutScores, ScoreChange
from slrmerge.recipe.model import Recipe
from slrmerge.recipe.rules import Rules
from slrmerge.searching.candidates import CandidateInfo
from slrmerge.searching.report import report, report_data, selections
from slrmerge.searching.results import SearchResult
from slrmerge.searching.selection import ScoredCandidate, mark_feasible, possibly_better, select_from
from tests.searching.pairs import made_result, made_rows, row
from tests.searching.test_selection import BASE, any_rows

SCORES = {(0, 0): (0.95, 1.4), (1, 1): (0.9, 1.7), (2, 2): (0.87, 1.6), (0, 1): (0.95, 1.6), (1, 2): (0.3, 2.2)}


class Page(HTMLParser):
    """The tags of a page with their attributes, its text, and the data that its script reads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.data: Any = None
        self._is_data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._is_data = dict(attrs).get("type") == "application/json"

    def handle_data(self, data: str) -> None:
        if self._is_data:
            self.data, self._is_data = json.loads(data), False
        self.text += data


def page(result: SearchResult) -> Page:
    return Page(report(result.rows, result.choice, result.summary()))


@pytest.fixture
def small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of a few kilobytes."""
    monkeypatch.setattr("slrmerge.searching.report.plotly_js", lambda: Markup("/* plotly.js */"))


# the selection by minimum quality

any_share = st.floats(0, 1) | st.sampled_from([step / 200 for step in range(201)])


def some_rough(rows: list[ScoredCandidate], rough: set[int]) -> list[ScoredCandidate]:
    """The rows, some of them (but no parent) scored roughly."""
    return [
        replace(row, exact=False, prompts=8) if place in rough and row.space not in ("post", "pre") else row
        for place, row in enumerate(rows)
    ]


@given(any_rows, st.sets(st.integers(0, 20)), st.floats(0, 1), st.lists(any_share, min_size=5, max_size=5))
def test_the_step_of_a_minimum_quality_is_what_select_from_selects(
    rows: list[ScoredCandidate], rough: set[int], rough_quality: float, shares: list[float]
) -> None:
    rows = some_rough(rows, rough)
    post_quality = {rows[0].conditions: rows[0].quality, "8 prompts, float32": rough_quality}
    steps = selections(rows, select_from(rows, base=BASE, min_quality=0.9), post_quality)
    decisive = [row.quality / quality for row in rows for quality in post_quality.values() if quality]
    limits = [step["up_to"] for step in steps]
    assert limits == sorted(limits)
    assert limits[-1] == 1
    for share in [*shares, *limits, *(each for each in decisive if 0 <= each <= 1)]:
        marked = mark_feasible(rows, post_quality=post_quality, min_quality=share)
        expected = select_from(marked, base=BASE, min_quality=share)
        step = next(step for step in steps if share <= step["up_to"])
        found = {
            name: rows[step[name]].label for name in ("slr", "soup", "early", "late", "post", "pre") if name in step
        }
        assert found == {name: row.label for name, row in expected.named().items()}
        for name, doubtful in (("near_ties", expected.near_ties), ("rough", possibly_better(marked, expected))):
            assert [rows[place].label for place in step[name]] == [row.label for row in doubtful[:4]]


@given(any_rows, any_share)
def test_a_candidate_is_feasible_up_to_the_share_that_it_keeps(rows: list[ScoredCandidate], share: float) -> None:
    result = made_result(rows)
    keeps = [each["keeps"] for each in report_data(result.rows, result.choice, result.summary())["rows"]]
    for limit in [share, *keeps]:
        marked = mark_feasible(rows, post_quality=result.post_quality, min_quality=limit)
        assert [limit <= kept for kept in keeps] == [row.feasible for row in marked]


# the page


@pytest.mark.usefixtures("small_library")
def test_the_page_has_every_candidate_with_its_scores_and_recipe() -> None:
    base = Recipe(pretrained="../a: #b", posttrained="../post", dtype="bfloat16")
    mergekit = row(CandidateInfo(space="recipe", label="mergekit.yml", rules=Rules()), 0.4, 0.5)
    result = made_result([*made_rows(SCORES), mergekit], base=base)
    data = page(result).data
    for each, shown in zip(result.rows, data["rows"], strict=True):
        assert (shown["label"], shown["quality"], shown["diversity"]) == (each.label, each.quality, each.diversity)
        if each is result.rows[-1]:
            assert shown["recipe_rest"] is None
        else:
            recipe = write_yaml(result.choice.recipe_for(each).to_dict())
            assert data["recipe_head"] + shown["recipe_rest"] == recipe


@pytest.mark.usefixtures("small_library")
def test_the_page_has_the_scores_on_held_out_prompts() -> None:
    result = made_result(made_rows(SCORES))
    assert "Held-out prompts" not in page(result).text
    change = ScoreChange(mean=0.25, low=-0.5, high=0.75)
    scores = {
        "post": HeldOutScores(label="post-trained", quality=0.9881, diversity=1.2342),
        "runner_up": HeldOutScores(
            label="<b>&", quality=0.8769, diversity=2.3458, quality_change=change, diversity_change=ScoreChange(mean=1)
        ),
    }
    asked = replace(
        result, held_out=HeldOut(prompts=12, scores=scores), reselected={"layers 1–2": 0.625, "layers 3": 0.2}
    )
    text = page(asked).text
    for expected in (
        "Held-out prompts", "post-trained", "0.988", "1.234", "runner-up", "<b>&", "0.877", "2.346",
        "+0.250 [−0.500,\u00a0+0.750]", "+1.000", "12 prompts", "layers 1–2 most often, in 62% of the draws",
    ):  # fmt: skip
        assert expected in text
    assert "layers 3" not in text[text.index("Held-out prompts") :].split("Recipe")[0]


@pytest.mark.usefixtures("small_library")
def test_the_page_names_pair_task_prompt_notes_and_versions() -> None:
    result = made_result(
        made_rows(SCORES), notes=("a note",), prompt="<|user|>Why?", date="2025-03-07", versions={"torch": "2.13.0"}
    )
    text = page(replace(result, rows=(replace(result.rows[0], quality=0.1), *result.rows[1:]))).text
    for expected in (
        "../pre",
        "../post",
        "task crc",
        "<|user|>Why?",
        "2025-03-07",
        "a note",
        "torch 2.13.0",
        "plotly.js ",
    ):
        assert expected in text


def test_the_page_loads_nothing() -> None:
    tags = page(made_result(made_rows(SCORES))).tags
    for tag, attributes in tags:
        assert not attributes.keys() & {"src", "srcset", "data", "action"}
        assert tag in ("a",) or "href" not in attributes
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
    (policy,) = [each["content"] for tag, each in tags if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    assert [tag for tag, _ in tags].count("script") == 3


@pytest.mark.usefixtures("small_library")
@given(
    st.text(),
    st.text(),
    st.sampled_from(["</script><script>alert(1)</script>", "<!--", "<b>&amp;", "\u202e\x1b[31m\ud800"]),
)
def test_no_text_becomes_markup(label: str, other: str, more: str) -> None:
    result = filled(label + more, other + more)
    shown = report(result.rows, result.choice, result.summary())
    assert shown.encode()
    assert not set(shown) & set("\u202e\x1b\ud800")
    assert [tag for tag, _ in Page(shown).tags] == tags_of_plain_text()


def filled(text: str, other: str) -> SearchResult:
    """A result with one text, or another, wherever a text may stand."""
    info = CandidateInfo(space="recipe", label=text, also_named=(other,), rules=Rules(alpha=0.3))
    return made_result([*made_rows(SCORES), row(info, 0.9, 2.9)], notes=(text,), prompt=other, task=f"{text}.yaml")


@cache
def tags_of_plain_text() -> list[str]:
    return [tag for tag, _ in page(filled("plain", "text")).tags]
