"""The page of samples and the charts; a text never becomes markup of the page."""

from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from math import nan
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from slrmerge.evaluation import charts
from slrmerge.evaluation.metrics import Metric
from slrmerge.evaluation.output import as_markdown
from slrmerge.evaluation.page import PROMPTS_SHOWN, TEXTS_SHOWN, page
from slrmerge.evaluation.result import EvaluationResult, summarise
from slrmerge.evaluation.tasks.base import ModelResponses, Score
from slrmerge.evaluation.tasks.reasoning import KS
from slrmerge.io.figures import model_colours, save_figure
from tests.evaluation.test_result import result


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.items: list[tuple[str | None, str]] = []
        self.text = ""
        self._in_list = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.elements.append((tag, dict(attrs)))
        self._in_list = tag == "ol" or (self._in_list and tag in ("li", "span"))
        if self._in_list and tag == "li":
            self.items.append((dict(attrs).get("class"), ""))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_list and self.items:
            kind, text = self.items[-1]
            self.items[-1] = kind, text + data


def saying(*texts: str | None, mark: str = "") -> EvaluationResult:
    """A result with one prompt and one model with these responses."""
    found = result(post=[1.0])
    question = found.responses[0].question
    return replace(
        found,
        responses=[ModelResponses("post", question, texts)],
        scores=[Score({"m": 1.0, "none": nan}, [mark] * len(texts))],
    )


def test_the_page_has_table_prompts_and_responses() -> None:
    text = Tags(page(result(post=[1.0, 2.0], slr=[3.0, 4.0]))).text
    assert text.count("Prompt 0, “quoted”") == 1
    for shown in ("creative", "m: what it means", "first line\nsecond line", "2.000 (", "from post"):
        assert shown in text
    assert [text.count(f"m {value:.3f}") for value in (1, 2, 3, 4)] == [1, 1, 1, 1]


def test_a_frequent_text_is_shown_once_and_first() -> None:
    text = Tags(page(saying("rare", "often", "often", None, "", mark="✓"))).text
    assert "2 × often ✓" in text
    assert text.index("often") < text.index("rare")
    assert "(no answer)" in text
    assert "(empty)" in text


@pytest.mark.parametrize(
    ("marks", "right", "expected"),
    [
        (["Ohio", ""], [True, False], [("right", "✓ It is Ohio. Ohio"), ("wrong", "✗ Utah")]),
        (["It is Ohio.", ""], [True, False], [("right", "✓ It is Ohio."), ("wrong", "✗ Utah")]),
        (["4", "5"], [True, False], [("right", "✓ It is Ohio. 4"), ("wrong", "✗ Utah 5")]),
        (["0.60", ""], None, [(None, "It is Ohio. 0.60"), (None, "Utah")]),
    ],
)
def test_right_and_wrong_answers_are_marked(
    marks: list[str], right: list[bool] | None, expected: list[tuple[str | None, str]]
) -> None:
    found = saying("It is Ohio.", "Utah")
    shown = Tags(page(replace(found, scores=[Score({"m": 1.0, "none": nan}, marks, right)])))
    assert [(kind, text.rstrip("\n ")) for kind, text in shown.items] == expected


def test_the_page_embeds_its_chart_and_loads_nothing() -> None:
    shown = Tags(page(result(post=[1.0, 2.0]), b"<svg>chart</svg>"))
    (image,) = [attributes for tag, attributes in shown.elements if tag == "img"]
    kind, _, data = (image["src"] or "").partition(",")
    assert (kind, b64decode(data)) == ("data:image/svg+xml;base64", b"<svg>chart</svg>")
    (policy,) = [each["content"] for _, each in shown.elements if each.get("http-equiv") == "Content-Security-Policy"]
    assert (policy or "").startswith("default-src 'none';")
    assert not {"script", "link", "iframe"} & set(shown.tags)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_bars_show_each_model_in_its_colour_and_its_change_from_the_first(count: int) -> None:
    names = ["post", "slr", *map(str, range(6))][:count]
    found = result(**{name: [1.0 + place, 2.0, 4.0 - place] for place, name in enumerate(names)})
    figure = charts.bars(found)
    means, *changes = figure.axes
    colours = list(model_colours(names).values())
    assert [to_hex(bar.get_facecolor()) for bar in means.patches] == colours
    assert len(changes) == (count > 1)
    for axes in changes:
        places = axes.collections[0].get_offsets()
        expected = [found.cell(name, "m").change for name in names]
        assert [float(y) for _, y in places[1:]] == pytest.approx(expected[1:])
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    assert min(box.x0, box.y0) >= 0
    assert (box.x1, box.y1) <= (figure.get_figwidth(), figure.get_figheight())


def test_further_texts_are_counted() -> None:
    assert "and 3 more texts" in Tags(page(saying(*map(str, range(TEXTS_SHOWN + 3))))).text


@given(
    st.lists(st.text(), min_size=1, max_size=3).map(lambda texts: [*texts, "</li></ol><script>alert(1)</script>&amp;"])
)
def test_no_text_becomes_markup(texts: list[str]) -> None:
    plain = Tags(page(saying(*(f"text {number}" for number, _ in enumerate(dict.fromkeys(texts))))))
    assert Tags(page(saying(*dict.fromkeys(texts)))).tags == plain.tags


@pytest.mark.parametrize("values", [{"post": [1.0, 2.0], "slr": [0.5, nan]}, {"post": [1.0]}])
def test_bars_are_drawn_where_there_are_values(tmp_path: Path, values: dict[str, list[float]]) -> None:
    found = result(**values)
    save_figure(charts.draw(found), tmp_path / "metrics")
    drawn = (tmp_path / "metrics.svg").read_text()
    assert all(f">{name}</text>" in drawn for name in ("m", *values))
    assert ">none</text>" not in drawn
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_pass_at_k_is_drawn_as_a_curve_for_each_model() -> None:
    metrics = tuple(Metric(f"pass@{k}", "") for k in KS)
    values = {metric.name: [place / 6, place / 7] for place, metric in enumerate(metrics)} | {"pass@64": [nan, nan]}
    models = ("post", "slr")
    found = replace(
        result(post=[1.0, 1.0], slr=[1.0, 1.0]),
        metrics=metrics,
        cells=summarise({model: {name: np.array(numbers) for name, numbers in values.items()} for model in models}),
        plot="curves",
    )
    (axes,) = charts.draw(found).axes
    assert [line.get_label() for line in axes.lines] == list(models)
    assert axes.lines[0].get_xdata().tolist() == [1, 4, 8, 16, 32]  # no model has 64 samples
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([sum(values[f"pass@{k}"]) / 2 for k in KS[:-1]])


def test_further_prompts_are_counted() -> None:
    text = Tags(page(result(post=[1.0] * (PROMPTS_SHOWN + 2)))).text
    assert f"Prompt {PROMPTS_SHOWN - 1}," in text
    assert f"Prompt {PROMPTS_SHOWN}," not in text
    assert "and 2 more prompts in samples.jsonl" in text


def test_prompts_with_long_texts_are_shown_until_the_page_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    found = result(post=[1.0] * 5)
    long = [replace(each, texts=["x" * 500, "y" * 500]) for each in found.responses]
    long = replace(found, responses=long, scores=[replace(each, marks=["", ""]) for each in found.scores])
    for limit, count in ((10_000, 5), (3000, 3), (2999, 2), (10, 1)):
        monkeypatch.setattr("slrmerge.evaluation.page.CHARACTERS_SHOWN", limit)
        text = Tags(page(long)).text
        assert text.count("x" * 500) == count
        assert (f"and {5 - count} more prompts" in text) == (count < 5)


def test_bars_of_values_that_are_all_equal_are_drawn_whatever_their_rounding(tmp_path: Path) -> None:
    save_figure(charts.draw(result(post=[0.3] * 37)), tmp_path / "metrics")
    assert (tmp_path / "metrics.png").exists()


def test_a_result_without_values_is_shown(tmp_path: Path) -> None:
    found = result(post=[nan], slr=[nan])
    assert "<table>" in page(found)
    save_figure(charts.draw(found), tmp_path / "metrics")
    assert (tmp_path / "metrics.png").exists()


def test_what_does_not_print_is_escaped_everywhere() -> None:
    bad = "x\x1b[31m\x9b\u202e\ud800"
    found = replace(saying(bad, "two\nlines", "👩\u200d🚀"), settings={"data": bad}, notes=(bad,))
    for text in (page(found), as_markdown(found), found._repr_html_()):
        assert text.encode()
        assert not set(text) & set(bad.removeprefix("x").replace("[31m", ""))
        assert r"x\x1b[31m" in text.replace("\\\\", "\\")
    assert "👩\u200d🚀" in page(found)


@pytest.mark.parametrize("label", ["$x^$", "_hidden", "a$b$c", "x\n\x1b"])
def test_charts_show_any_label(tmp_path: Path, label: str) -> None:
    found = result(**{label: [1.0, 2.0], "post": [1.0, 3.0]})
    save_figure(charts.bars(found), tmp_path / "bars")
    assert (tmp_path / "bars.svg").stat().st_size > 0
