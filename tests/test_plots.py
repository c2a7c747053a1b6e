"""The pictures are there, say what they show, and are the same bytes every time."""

import re
import struct
from collections.abc import Sequence
from itertools import combinations_with_replacement
from pathlib import Path

import pytest

from slrmerge.plots import PICTURES, draw_report, heatmaps, save, tradeoff
from slrmerge.search.candidates import Candidate
from slrmerge.search.choose import Row
from slrmerge.search.results import Report
from tests.search.pairs import POST, PRE, interval, made_report, made_rows, row

SPANS = list(combinations_with_replacement(range(4), 2))
SCORES = {(i, j): (0.95 - 0.07 * (j - i), 1.0 + 0.1 * (j - i) + 0.03 * i) for i, j in SPANS}
OTHERS = [
    row(Candidate("attention", {}, "layers 0–1, self_attn only", 0, 1, modules="self_attn"), 0.9, 1.2),
    row(Candidate("mlp", {}, "layers 0–1, mlp only", 0, 1, modules="mlp"), 0.8, 1.3),
    row(Candidate("recipe", {}, "mine"), 0.7, 1.4),
]


FILLED = made_report(made_rows(SCORES) + OTHERS)


def draw(folder: Path, report: Report) -> dict[str, bytes]:
    draw_report(folder, report)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The pictures of a report with something of every kind in it."""
    return draw(tmp_path_factory.mktemp("pictures"), FILLED)


def words(svg: bytes) -> list[str]:
    """The texts of a picture."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.decode())


def test_both_pictures_are_drawn_as_png_and_svg(drawn: dict[str, bytes]) -> None:
    assert sorted(drawn) == sorted(PICTURES)
    for name in ("tradeoff.png", "heatmaps.png"):
        assert drawn[name].startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", drawn[name][16:24])
        assert width > 1000
        assert height > 700


def test_the_trade_off_names_its_axes_its_marks_and_the_choice(drawn: dict[str, bytes]) -> None:
    assert FILLED.choice.slr is not None
    expected = {
        "quality Q: probability of a valid answer", "diversity D: entropy of the valid answers (nats)", "intervals",
        "attention only", "MLPs only", "their front, with layers restored", "soups", "recipes", "post-trained",
        f"choice: {FILLED.choice.slr.candidate.label}", "0.9 · Q(post)",
    }  # fmt: skip
    assert expected <= set(words(drawn["tradeoff.svg"]))


def test_the_numbers_of_restored_layers_stand_beside_the_front(drawn: dict[str, bytes]) -> None:
    front = [each for each in FILLED.rows if each.candidate.space == "interval" and each.pareto]
    assert len(front) > 1
    lengths = [word for word in words(drawn["tradeoff.svg"]) if word in {"1", "2", "3", "4"}]
    assert sorted(lengths) == sorted(str(each.candidate.layers_restored) for each in front)


def test_the_heat_maps_name_both_scores_and_both_ends(drawn: dict[str, bytes]) -> None:
    said = words(drawn["heatmaps.svg"])
    assert {"quality Q", "diversity D (nats)"} <= set(said)
    assert said.count("first restored layer") == said.count("last restored layer") == 2


def test_the_heat_maps_have_every_interval_in_its_place_and_the_choice_framed() -> None:
    assert FILLED.choice.slr is not None
    choice = FILLED.choice.slr.candidate
    for number, axes in enumerate(axes for axes in heatmaps(FILLED).axes if axes.get_images()):
        shown = axes.get_images()[0].get_array()
        assert shown is not None
        assert {span: shown[span] for span in SPANS} == {span: SCORES[span][number] for span in SPANS}
        assert shown.mask.sum() == 16 - len(SPANS)
        (frame,) = axes.patches
        assert (frame.get_x(), frame.get_y()) == (choice.end - 0.5, choice.start - 0.5)


def test_the_same_results_give_the_same_bytes(drawn: dict[str, bytes], tmp_path: Path) -> None:
    assert draw(tmp_path, FILLED) == drawn
    assert b"<dc:date>" not in drawn["tradeoff.svg"]
    assert b"Software" not in drawn["tradeoff.png"]


def test_the_settings_of_whoever_imports_it_are_left_alone(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    save(tradeoff(FILLED), tmp_path / "x")
    assert dict(mpl.rcParams) == before


PLAIN: dict[str, tuple[Sequence[Row], float]] = {
    "nothing suffices": ([row(POST, 1, 1), *made_rows(SCORES)[1:]], 1),
    "no soups": ([each for each in made_rows(SCORES) if each.candidate.space != "soup"], 0.9),
    "no intervals": (made_rows({}), 0.9),
    "the two models only": ([row(POST, 0.9, 1), row(PRE, 0.5, 2)], 0.9),
    "attention only": ([row(POST, 0.9, 1), row(PRE, 0.5, 2), OTHERS[0]], 0.9),
    "one layer": ([row(POST, 0.9, 1), row(PRE, 0.5, 2), row(interval(0, 0), 0.9, 1.5)], 0.9),
    "all the same": ([row(POST, 0.9, 1), row(PRE, 0.9, 1), row(interval(0, 0), 0.9, 1)], 0.9),
    "no quality and no variety anywhere": ([row(POST, 0, 0), row(PRE, 0, 0), row(interval(0, 0), 0, 0)], 0.9),
}


@pytest.mark.parametrize("case", PLAIN)
def test_whatever_was_tried_can_be_drawn(case: str) -> None:
    rows, min_quality = PLAIN[case]
    report = made_report(rows, min_quality=min_quality)
    for figure in (figures := [tradeoff(report), heatmaps(report)]):
        figure.draw_without_rendering()
    legend = figures[0].axes[0].get_legend()
    assert legend is not None
    said = [text.get_text() for text in legend.get_texts()]
    assert "post-trained" in said
    assert ("soups" in said) == any(each.candidate.space == "soup" for each in rows)
    assert any(word.startswith("choice: ") for word in said) == (report.choice.slr is not None)
    assert ("their front, with layers restored" in said) == any(
        each.candidate.space in ("interval", "attention") for each in rows
    )
    frames = [patch for axes in figures[1].axes if axes.get_images() for patch in axes.patches]
    assert bool(frames) == (report.choice.slr is not None)
