"""Figures are drawn, name what they show, and have the same bytes every time."""

import re
import struct
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations_with_replacement
from math import sin
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from slrmerge.io.figures import save_figure
from slrmerge.recipe.rules import Rules
from slrmerge.searching.candidates import CandidateInfo
from slrmerge.searching.plots import draw_result, heatmaps_figure, tradeoff_figure
from slrmerge.searching.results import SearchResult
from slrmerge.searching.results_folder import FIGURES
from slrmerge.searching.selection import ScoredCandidate
from tests.searching.pairs import POST, PRE, interval, made_result, made_rows, row

SPANS = list(combinations_with_replacement(range(4), 2))
SCORES = {(i, j): (0.95 - 0.07 * (j - i), 1.0 + 0.1 * (j - i) + 0.03 * i) for i, j in SPANS}
OTHERS = [
    row(replace(interval(0, 1), space="attention", label="layers 0–1, self_attn only", modules="self_attn"), 0.9, 1.2),
    row(replace(interval(0, 1), space="mlp", label="layers 0–1, mlp only", modules="mlp"), 0.8, 1.3),
    row(CandidateInfo(space="recipe", label="mine", rules=Rules(alpha=0.3)), 0.7, 1.4),
]


FILLED = made_result(made_rows(SCORES) + OTHERS)


def draw(folder: Path, result: SearchResult) -> dict[str, bytes]:
    draw_result(folder, result.rows, result.choice, result.summary())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The figures of a result with candidates of every kind."""
    return draw(tmp_path_factory.mktemp("pictures"), FILLED)


def words(svg: bytes) -> list[str]:
    """The texts of a figure."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.decode())


def test_both_figures_are_drawn_as_png_and_svg(drawn: dict[str, bytes]) -> None:
    assert sorted(drawn) == sorted(FIGURES)
    for name in ("tradeoff.png", "heatmaps.png"):
        assert drawn[name].startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", drawn[name][16:24])
        assert width > 1000
        assert height > 700


def test_the_tradeoff_names_its_axes_its_marks_and_the_selection(drawn: dict[str, bytes]) -> None:
    assert FILLED.choice.slr is not None
    expected = {
        "quality Q: probability of a valid answer", "diversity D: entropy of the valid answers (nats)", "intervals",
        "attention only", "MLPs only", "their front, with the layers restored", "soups, with alpha", "recipes",
        "post-trained", f"selected: {FILLED.choice.slr.label}", "0.9 · Q(post)",
    }  # fmt: skip
    assert expected <= set(words(drawn["tradeoff.svg"]))


def test_the_front_is_labelled_with_its_restored_layers(drawn: dict[str, bytes]) -> None:
    front = [each for each in FILLED.rows if each.space == "interval" and each.pareto]
    assert len(front) > 1
    spans = {str(i) if i == j else f"{i}–{j}" for i, j in SPANS}
    others = [each for each in front if each is not FILLED.choice.slr]
    named = {str(each.start) if each.start == each.end else f"{each.start}–{each.end}" for each in others}
    assert set(words(drawn["tradeoff.svg"])) & spans == named


def many_layers() -> SearchResult:
    """Eighty layers: 3,240 intervals, of which the controls have nearly equal scores, and nineteen soups."""
    waves = {(i, j): sin(37 * i + 11 * j) for i, j in combinations_with_replacement(range(80), 2)}
    scores = {
        (i, j): (0.95 - 0.7 * ((j - i) / 80) ** 1.7 + 0.01 * wave, 1 + (j - i + 1) ** 0.3 * (0.2 + 0.003 * wave))
        for (i, j), wave in waves.items()
    }
    soups = [
        row(
            CandidateInfo(space="soup", label=f"soup {alpha}", rules=Rules(alpha=alpha), alpha=alpha),
            0.96 - alpha**3 / 2,
            1 + alpha,
        )
        for alpha in (step / 20 for step in range(1, 20) if step != 10)
    ]
    return made_result(
        [*made_rows(scores), *soups, row(CandidateInfo(space="recipe", label="mine", rules=Rules(alpha=0.3)), 0.9, 1.5)]
    )


def test_labels_of_eighty_layers_do_not_overlap_and_are_inside_the_axes() -> None:
    result = many_layers()
    figure = tradeoff_figure(result.rows, result.choice)
    (axes,) = figure.axes
    labels = {text.get_text(): text for text in axes.texts}
    slr, early, late = result.choice.slr, result.choice.early, result.choice.late
    assert slr is not None
    assert early is not None
    assert late is not None
    controls = {f"early control: {early.label}", f"late control: {late.label}"}
    needed = {"post-trained", "pre-trained", "mine", f"selected: {slr.label}", *controls}
    assert needed <= labels.keys()
    assert sum("–" in name for name in labels.keys() - needed) > 5
    assert len({"0.1", "0.5", "0.9"} & labels.keys()) >= 2
    figure.canvas = FigureCanvasAgg(figure)
    figure.canvas.draw()
    boxes = {name: Text.get_window_extent(text) for name, text in labels.items()}  # without the stroke to its point
    for name, box in boxes.items():
        assert [other for other, there in boxes.items() if other != name and box.overlaps(there)] == []
        assert axes.bbox.padded(1).containsx(box.x0)
        assert axes.bbox.padded(1).containsx(box.x1)


@pytest.mark.parametrize("result", [FILLED, many_layers()], ids=["4 layers", "80 layers"])
def test_every_text_is_inside_the_canvas(result: SearchResult) -> None:
    for figure in (
        tradeoff_figure(result.rows, result.choice),
        heatmaps_figure(result.rows, result.choice, result.layers),
    ):
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= figure.get_figwidth()
        assert box.y1 <= figure.get_figheight()


def test_the_heatmaps_name_both_scores_and_both_ends(drawn: dict[str, bytes]) -> None:
    texts = words(drawn["heatmaps.svg"])
    assert {"quality Q", "diversity D (nats)"} <= set(texts)
    assert texts.count("first restored layer") == texts.count("last restored layer") == 2


def test_the_heatmaps_have_every_interval_in_its_place_and_the_selection_framed() -> None:
    assert FILLED.choice.slr is not None
    choice = FILLED.choice.slr
    assert choice.start is not None
    assert choice.end is not None
    for number, axes in enumerate(
        axes for axes in heatmaps_figure(FILLED.rows, FILLED.choice, FILLED.layers).axes if axes.get_images()
    ):
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


def test_the_settings_of_matplotlib_are_not_changed(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    save_figure(tradeoff_figure(FILLED.rows, FILLED.choice), tmp_path / "x")
    assert dict(mpl.rcParams) == before


PLAIN: dict[str, tuple[Sequence[ScoredCandidate], float]] = {
    "nothing is feasible": ([row(POST, 1, 1), *made_rows(SCORES)[1:]], 1),
    "no soups": ([each for each in made_rows(SCORES) if each.space != "soup"], 0.9),
    "no intervals": (made_rows({}), 0.9),
    "only the parents": ([row(POST, 0.9, 1), row(PRE, 0.5, 2)], 0.9),
    "attention only": ([row(POST, 0.9, 1), row(PRE, 0.5, 2), OTHERS[0]], 0.9),
    "one layer": ([row(POST, 0.9, 1), row(PRE, 0.5, 2), row(interval(0, 0), 0.9, 1.5)], 0.9),
    "all the same": ([row(POST, 0.9, 1), row(PRE, 0.9, 1), row(interval(0, 0), 0.9, 1)], 0.9),
    "no quality and no diversity": ([row(POST, 0, 0), row(PRE, 0, 0), row(interval(0, 0), 0, 0)], 0.9),
}


@pytest.mark.parametrize("case", PLAIN)
def test_any_candidates_can_be_drawn(case: str) -> None:
    rows, min_quality = PLAIN[case]
    result = made_result(rows, min_quality=min_quality)
    for figure in (
        figures := [
            tradeoff_figure(result.rows, result.choice),
            heatmaps_figure(result.rows, result.choice, result.layers),
        ]
    ):
        figure.draw_without_rendering()
    (legend,) = figures[0].legends
    names = [text.get_text() for text in legend.get_texts()]
    assert "post-trained" in names
    assert ("soups, with alpha" in names) == any(each.space == "soup" for each in rows)
    assert any(word.startswith("selected: ") for word in names) == (result.choice.slr is not None)
    assert ("their front, with the layers restored" in names) == any(
        each.space in ("interval", "attention") for each in rows
    )
    frames = [patch for axes in figures[1].axes if axes.get_images() for patch in axes.patches]
    assert bool(frames) == (result.choice.slr is not None)
