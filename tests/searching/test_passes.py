"""A first pass that is not exact, over fewer prompts or in bfloat16, selects as an exact search."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slrmerge.searching.results import SearchResult
from slrmerge.searching.results_folder import read_result
from slrmerge.searching.run import search
from slrmerge.searching.selection import NEAR_TIE
from tests.conftest import TINY
from tests.searching.pairs import Watcher, no_pictures, prompts_of


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
    by_label = {each.label: each for each in exact.rows}
    for each in again:
        assert (each.prompts, each.dtype) == (40, "float32")
        assert each.quality == pytest.approx(by_label[each.label].quality, abs=1e-6)
        assert each.diversity == pytest.approx(by_label[each.label].diversity, abs=1e-6)
    assert {each.conditions for each in result.rows if not each.exact} == {first}
    selected, wanted = result.choice.named(), exact.choice.named()
    assert {name: each.label for name, each in selected.items()} == {name: each.label for name, each in wanted.items()}
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
        assert (found.label, round(found.quality, 3), round(found.diversity, 3)) == (label, quality, diversity)
        assert f"| {quality:.3f} | {diversity:.3f} |" in text.replace("**", "")


def test_the_example_pair_has_no_near_ties(exact: SearchResult) -> None:
    assert exact.choice.slr is not None
    assert exact.choice.near_ties == ()
    runner_up = max(
        each.diversity for each in exact.rows
        if each.space == "interval" and each.feasible and each is not exact.choice.slr
    )  # fmt: skip
    assert NEAR_TIE < exact.choice.slr.diversity - runner_up < 0.01
