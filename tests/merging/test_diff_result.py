"""The page of a comparison, whose numbers are those of the result: it loads nothing, and no text becomes markup."""

from math import inf, nan

import pytest
from markupsafe import Markup

from slrmerge.merging.diff_result import OUTSIDE, DiffResult, Distance, diff_figure, diff_page, grid
from tests.searching.test_report import Page

SAME, MOVED, NEW = Distance(4, 2.0, 2.0, 0.0, 2.0), Distance(4, 2.0, 4.0, 0.5, 2.0), Distance(4, 0.0, 1.0, 1.0, 0.0)


@pytest.fixture(autouse=True)
def small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of a few kilobytes."""
    monkeypatch.setattr("slrmerge.merging.diff_result.plotly_js", lambda: Markup("/* plotly.js */"))


def result(*notes: str, module: str = "mlp", name: str = "org/post") -> DiffResult:
    found = {(0, module): SAME, (1, module): MOVED, (1, "attn"): NEW, (OUTSIDE, "lm_head"): SAME}
    return DiffResult(2, found, notes, "org/pre", name)


def test_the_page_has_every_number() -> None:
    page = Page(diff_page(result("a note")))
    assert page.data == {
        "modules": ["mlp", "attn"],
        "by_layer": [0, pytest.approx((1.5 / 2) ** 0.5)],
        "relative_change": [[0, 0.5], [None, None]],
        "cosine": [[1, MOVED.cosine], [None, None]],
    }
    for text in ("org/pre", "org/post", "lm_head", "a note", "16 parameters", "0.866"):
        assert text in page.text


def test_a_module_that_a_layer_lacks_or_whose_measure_is_not_finite_has_none() -> None:
    assert (NEW.relative_change, NEW.cosine) == (inf, pytest.approx(nan, nan_ok=True))
    assert grid(result(), "relative_change") == [[0, 0.5], [None, None]]
    assert diff_figure(result()).axes


def test_a_model_without_layers_has_no_figures() -> None:
    page = Page(diff_page(DiffResult(0, {(OUTSIDE, "head"): MOVED})))
    assert page.data is None
    assert "script" not in [tag for tag, _ in page.tags]
    assert "head" in page.text


def test_the_page_loads_nothing() -> None:
    tags = Page(diff_page(result())).tags
    assert not [attributes for _, attributes in tags if {"src", "href"} & attributes.keys()]
    policy = next(each["content"] for _, each in tags if each.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize("text", ["</script><script>alert(1)</script>", "<!--", "<b>&amp;", "\u202e\x1b[31m\ud800"])
def test_no_text_becomes_markup(text: str) -> None:
    shown = diff_page(result(text, module=text, name=text))
    assert shown.encode()
    assert not set(shown) & set("\u202e\x1b\ud800")
    assert [tag for tag, _ in Page(shown).tags] == [tag for tag, _ in Page(diff_page(result("plain"))).tags]
